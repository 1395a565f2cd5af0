"""Pictures with their captions in tar archives, as img2dataset writes CC3M, LAION and COYO (WebDataset)."""

import json
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np

from ...core.errors import DataError
from ...core.sequence import Text
from ..media import PICTURES, open_image
from .base import Files, Reader, Record, asked, indexed, read_span, take, text

NAME = 100  # bytes of the name in a member's header
NONE, CUT = -1, -2  # for the size of a picture or caption: there is none; the archive itself ends there
BLOCK = 512  # bytes, in which archives are counted; one of zeros ends them

Place = tuple[int, int, int]  # where the header of a member lies, its first byte, and its size


class Shards(Reader):
    """Members `KEY.jpg` with `KEY.txt`, or `caption` in `KEY.json`, of one archive or of all in a folder.

    Archives are never unpacked: each is looked through once, and a sample is read from where it lies. Only regular
    members count, and their names are keys, never paths. A picture without a caption, or a caption without a picture,
    is a sample that cannot be used; so is one, behind all others, for an archive that is cut off or damaged.
    """

    prompt = "Describe the picture."

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self.paths = sorted(files.path.glob("*.tar")) if files.path.is_dir() else [files.path]
        if not self.paths:
            raise DataError(f"{files.path}: no .tar in it")
        self.spans = [indexed(path, samples_in) for path in self.paths]
        self.ends = np.cumsum([len(spans) for spans in self.spans])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def find(self, index: int) -> tuple[Path, list[int]]:
        """The archive of a sample and its line of the archive's index."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        spans = self.spans[shard]
        return self.paths[shard], spans[index - int(self.ends[shard])].tolist()

    def name(self, index: int) -> str:
        path, (header, *_) = self.find(index)
        with path.open("rb") as file:
            file.seek(header)
            member = file.read(NAME).split(b"\0")[0].decode("utf-8", "replace")
        return f"{path}:{_key(member)[0]}"

    def read(self, index: int) -> Record:
        path, (_, start, size, *caption) = self.find(index)
        if size == CUT:
            raise DataError("the archive is cut off or damaged behind this; what follows is not read")
        if size == NONE:
            raise DataError(f"no picture beside it ({', '.join(PICTURES)})")
        words = self.caption(path, *caption)
        picture = open_image(read_span(path, start, size), "the picture")
        return Record(asked((picture, self.question()), Text(words)))

    def caption(self, path: Path, start: int, size: int, is_json: int) -> str:
        if size == NONE:
            raise DataError("no caption")
        data = read_span(path, start, size)
        try:
            return text(take(json.loads(data), "caption", str) if is_json else data.decode().strip(), "the caption")
        except (ValueError, RecursionError):
            raise DataError("the caption cannot be read") from None


def samples_in(path: Path) -> np.ndarray:
    """Where the samples of an archive lie, int64 [samples, 6].

    The header of its first member; the picture's first byte and size; the caption's, and whether it is JSON. A key that
    comes again with what it has already begins another sample. Of an archive that is cut off or damaged the last line
    says so, in place of a sample that is not whole.
    """
    found: list[dict[str, Place]] = []
    newest: dict[str, dict[str, Place]] = {}
    last, whole = (0, 0, 0), False
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # which would hold on to every header
                last = member.offset, member.offset_data, member.size
                key, ending = _key(member.name)
                kind = "picture" if ending in PICTURES else ending
                if not member.isreg() or member.issparse() or kind not in ("picture", ".txt", ".json"):
                    continue
                if key not in newest or kind in newest[key]:
                    newest[key] = {}
                    found.append(newest[key])
                newest[key][kind] = last
            whole = _ended(path, archive.offset)
    except tarfile.TarError as error:
        if not last[1]:
            raise DataError(f"not a tar archive ({error})") from None
    size = path.stat().st_size
    rows = [_row(each) for each in found if all(start + length <= size for _, start, length in each.values())]
    return np.array(rows if whole else [*rows, (last[0], 0, CUT, 0, NONE, 0)], dtype=np.int64).reshape(-1, 6)


def _row(sample: dict[str, Place]) -> tuple[int, ...]:
    """A sample's line of the index."""
    missing = (0, 0, NONE)
    (header, *_), caption = next(iter(sample.values())), sample.get(".txt", sample.get(".json", missing))
    return (header, *sample.get("picture", missing)[1:], *caption[1:], int(".txt" not in sample))


def _ended(path: Path, place: int) -> bool:
    """Whether an archive ends at a place as it should; tarfile takes anything that is no header for the end."""
    with path.open("rb") as file:
        file.seek(place)
        return file.read(BLOCK) == bytes(BLOCK)


def _key(member: str) -> tuple[str, str]:
    """The key of a member and the ending that says what it is."""
    path = PurePosixPath(member)
    return str(path.with_suffix("")) if path.suffix else member, path.suffix.lower()
