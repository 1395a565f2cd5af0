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


class Shards(Reader):
    """Members `KEY.jpg` with `KEY.txt`, or `caption` in `KEY.json`, of one archive or of all in a folder.

    Archives are never unpacked: each is looked through once, and a sample is read from where it lies. Only regular
    members count, and their names are keys, never paths. A picture without a caption is a sample that cannot be used.
    """

    prompt = "Describe the picture."

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self.paths = sorted(files.path.glob("*.tar")) if files.path.is_dir() else [files.path]
        if not self.paths:
            raise DataError(f"{files.path}: no .tar in it")
        self.spans = [indexed(path, members) for path in self.paths]
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
        words = self.caption(path, *caption)
        picture = open_image(read_span(path, start, size), "the picture")
        return Record(asked((picture, self.question()), Text(words)))

    def caption(self, path: Path, start: int, size: int, is_json: int) -> str:
        if size < 0:
            raise DataError("no caption")
        data = read_span(path, start, size)
        try:
            return text(take(json.loads(data), "caption", str) if is_json else data.decode().strip(), "the caption")
        except (ValueError, RecursionError):
            raise DataError("the caption cannot be read") from None


def members(path: Path) -> np.ndarray:
    """Where the samples of an archive lie, int64 [samples, 6].

    The picture's header, its first byte and size; the caption's first byte and size (-1: none); whether it is JSON.
    """
    pictures: dict[str, tuple[int, int, int]] = {}
    captions: dict[str, tuple[int, int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # which would hold on to every header
                if not member.isreg() or member.issparse():
                    continue
                key, kind = _key(member.name)
                if kind in PICTURES:
                    pictures.setdefault(key, (member.offset, member.offset_data, member.size))
                elif kind == ".txt" or (kind == ".json" and key not in captions):
                    captions[key] = (member.offset_data, member.size, int(kind == ".json"))
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a whole tar archive ({error})") from None
    none = (0, -1, 0)
    found = [(*place, *captions.get(key, none)) for key, place in pictures.items()]
    return np.array(found, dtype=np.int64).reshape(-1, 6)


def _key(member: str) -> tuple[str, str]:
    """The key of a member and the ending that says what it is."""
    path = PurePosixPath(member)
    return str(path.with_suffix("")) if path.suffix else member, path.suffix.lower()
