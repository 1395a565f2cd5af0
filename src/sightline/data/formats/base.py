"""What readers of data sets share: rows found by number, pictures that stay in their folder, faults told by name."""

import base64
import binascii
import hashlib
import json
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...core.errors import CapacityError, ConfigError, DataError, InputError
from ...core.folders import user_cache
from ...core.sequence import Conversation, Image, Message, Part, Role, Text, Video
from ..media import MAX_BYTES, frame_files, open_image, open_video, taken

T = TypeVar("T")
WORTH_KEEPING = 1 << 20  # bytes of a file from which on its index is kept in the user's cache
PACKED = {  # what files begin with that have to be unpacked or converted before they are read
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
}


@dataclass(frozen=True)
class Files:
    """Where a data set lies and how it is read.

    path: the file of its rows, or the file or folder of its shards. images: the folder that its pictures are in; None:
    that of `path`. annotations: a second file, for formats that have one. prompt: what is asked about a row that brings
    no question; `{}` in it stands for the row's own words. frames: the most that are taken of a video.
    """

    path: Path
    images: Path | None = None
    annotations: Path | None = None
    prompt: str = ""
    frames: int = 8


@dataclass(frozen=True)
class Record:
    """One sample: a conversation that ends with an answer, or with a question and a better and a worse answer to it."""

    conversation: Conversation
    chosen: Message | None = None
    rejected: Message | None = None


class Reader(ABC):
    """The samples of a data set by their number; nothing is read of a sample before it is asked for.

    DataError, with the file and line or key, for a sample that cannot be used; with the file, at the start, for a file
    that cannot be read at all.
    """

    prompt = "{}"  # what is asked where the files say nothing else

    def __init__(self, files: Files) -> None:
        self.files = files
        self.folder = files.images or (files.path if files.path.is_dir() else files.path.parent)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Where a sample is found: file and line, or file and key."""

    @abstractmethod
    def read(self, index: int) -> Record:
        """A sample; DataError, InputError or CapacityError say what is wrong with it."""

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self.read(index)
        except (DataError, InputError, CapacityError) as error:
            raise DataError(f"{self.name(index)}: {error}") from None

    # ---------------------------------------------------------------------------------------- what rows are made into

    def question(self, words: str = "") -> Text:
        """What is asked, with a row's own words in it."""
        return Text((self.files.prompt or self.prompt).replace("{}", words))

    def picture(self, source: Any) -> Image:
        """The picture that a row names by a path in the data set's folder, or brings as a data URL."""
        if not isinstance(source, str):
            raise DataError(f"{source!r:.40} for a picture, expected a path or a data URL")
        if source.startswith("data:"):
            head, comma, data = source.partition(",")
            try:
                if not comma or not head.endswith(";base64"):
                    raise ValueError
                return open_image(base64.b64decode(data, validate=True), "a data URL")
            except (ValueError, binascii.Error):
                raise DataError("a data URL that is not base64") from None
        return open_image(self.inside(source), source)

    def inside(self, path: str) -> Path:
        """A path of a row in the data set's folder; nothing outside is read, whatever a row says."""
        if re.match(r"\w+://", path):
            raise DataError(f"{path:.60}: an address, expected a path; nothing is fetched")
        try:
            folder = self.folder.resolve()
            found = (folder / path).resolve()
        except (OSError, ValueError):
            raise DataError(f"{path!r:.60}: no such file") from None
        if not found.is_relative_to(folder):
            raise DataError(f"{path:.60}: leads out of {self.folder}")
        return found

    def video(self, source: Any, times: Any = None, rate: Any = 1.0) -> Video:
        """Frames that a row names by their folder or one by one, with their times or how many there are a second.

        A path of anything but a folder is a film, which tells its times itself.
        """
        if isinstance(source, str):
            folder = self.inside(source)
            if not folder.is_dir():
                return open_video(folder, self.files.frames, name=source)
            paths = [f"{source}/{path.name}" for path in frame_files(folder)]
        else:
            paths = checked(source, list, "frames")
        if times is None:
            times = [i / float(number(rate, "fps")) for i in range(len(paths))] if number(rate, "fps") > 0 else []
        if not paths or len(checked(times, list, "times")) != len(paths):
            raise DataError(f"{len(paths)} frames for {len(times)} times, expected as many and at least one")
        seconds = [number(time, "a time") for time in times]
        if any(b <= a for a, b in pairwise(seconds)):
            raise DataError("the times of a video do not rise")
        which = taken(seconds, self.files.frames)
        return Video(tuple(self.picture(paths[i]) for i in which), tuple(seconds[i] for i in which))


# ------------------------------------------------------------------------------------------------------ parts of a row


def checked(value: Any, kind: type[T], what: str) -> T:
    """A value of a row if it is of this type."""
    if not isinstance(value, kind):
        raise DataError(f"{what} is {type(value).__name__}, expected {kind.__name__}")
    return value


def take(row: Any, key: str, kind: type[T]) -> T:
    """The value of a row under a key."""
    if key not in checked(row, dict, "a row"):
        raise DataError(f"{key!r} is missing")
    return checked(row[key], kind, repr(key))


def number(value: Any, what: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise DataError(f"{what} is {value!r:.40}, expected a number")
    return float(value)


def text(value: Any, what: str = "text") -> str:
    """Text that can be written as UTF-8 and says something."""
    said = checked(value, str, what)
    if not said.strip():
        raise DataError(f"{what} is empty")
    try:
        said.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} holds half a character") from None
    return said


def dialogue(messages: Sequence[Message]) -> Conversation:
    """Messages that alternate from a user to an answer, after what the system may say."""
    talk = [message.role for message in messages if message.role != "system"]
    if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
        raise DataError(f"{', '.join(talk)[:60] or 'nobody'} speak, expected user and assistant in turn")
    if any(message.role == "system" for message in messages[1:]):
        raise DataError("the system speaks in between, expected it to speak first")
    return tuple(messages)


def asked(parts: Sequence[Part], answer: Part) -> Conversation:
    """One question and its answer."""
    return (Message("user", tuple(parts)), Message("assistant", (answer,)))


def by_id(rows: Any, key: str = "id") -> dict[str, list[dict[str, Any]]]:
    """The objects of a list by what each has under a key."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in objects(rows):
        found.setdefault(str(row.get(key)), []).append(row)
    return found


def only(found: Mapping[str, list[dict[str, Any]]], key: Any, what: str) -> dict[str, Any]:
    """The object of an id; DataError where there is none, or where several have it and say different things."""
    rows = found.get(str(key), [])
    if not rows:
        raise DataError(f"no {what} {key!r:.40}")
    if any(row != rows[0] for row in rows[1:]):
        raise DataError(f"{len(rows)} different ones for {what} {key!r:.40}")
    return rows[0]


def role_of(name: Any, known: Mapping[str, Role]) -> Role:
    """Who speaks, by the name that a format has for it."""
    if not isinstance(name, str) or name not in known:
        raise DataError(f"{name!r:.40} speaks, expected {', '.join(known)}")
    return known[name]


# --------------------------------------------------------------------------------------------------------------- files


class Rows:
    """The objects of a JSONL file or of a JSON array by their number; only where they begin and end is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spans = indexed(path, _spans)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, stop, _ = self.spans[index].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        try:
            return checked(json.loads(data), dict, "the row")
        except (ValueError, RecursionError):
            raise DataError("not JSON") from None

    def name(self, index: int) -> str:
        """File and line, or for an array the number of its element."""
        line = int(self.spans[index][2])
        return f"{self.path}:{line}" if line else f"{self.path}[{index}]"


def _spans(path: Path) -> np.ndarray:
    """Where rows begin and end in a file, and their lines (0 in an array), int64 [rows, 3]."""
    found: list[tuple[int, int, int]] = []
    with path.open("rb") as file:
        if file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            return _elements(path)
        file.seek(0)
        at = 0
        for line, data in enumerate(file, 1):
            if data.strip():
                found.append((at, at + len(data), line))
            at += len(data)
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def _elements(path: Path) -> np.ndarray:
    """The spans of the elements of a JSON array."""
    found: list[tuple[int, int, int]] = []
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    try:
        words = path.read_bytes().decode()
        at, before, here = words.index("[") + 1, 0, 0
        while True:
            at = between.match(words, at).end()  # type: ignore[union-attr]
            if words[at : at + 1] == "]":
                return np.array(found, dtype=np.int64).reshape(-1, 3)
            _, stop = decoder.raw_decode(words, at)
            start = here + len(words[before:at].encode())
            here, before = start + len(words[at:stop].encode()), stop
            found.append((start, here, 0))
            at = stop
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON array ({str(error).splitlines()[0]})") from None


def load(path: Path | None, *lists: str) -> Any:
    """A whole JSON file, in which there is a list under each of these keys."""
    if path is None:
        raise ConfigError("this format has a second file of annotations; none is named")
    try:
        plain(path)
        content = json.loads(path.read_bytes())
        for key in lists:
            take(content, key, list)
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not JSON") from None
    return content


def plain(path: Path) -> None:
    """DataError for a file that is compressed, or of a format that is not read."""
    with path.open("rb") as file:
        head = file.read(8)
    for mark, name in PACKED.items():
        if head.startswith(mark):
            raise DataError(f"a {name} file, expected plain content; unpack or convert it first")


def objects(found: Any) -> list[dict[str, Any]]:
    """The objects of a list; what is none of them belongs to no sample."""
    return [each for each in found if isinstance(each, dict)]


def indexed(path: Path, build: Callable[[Path], np.ndarray]) -> np.ndarray:
    """What `build` finds in a file; of a large file it is kept in the user's cache until the file changes."""
    try:
        about = path.stat()
        if not path.is_file():
            raise DataError("not a file")
        plain(path)
        if about.st_size < WORTH_KEEPING:
            return build(path)
        identity = f"{build.__module__}.{build.__name__} {path.resolve()} {about.st_size} {about.st_mtime_ns}"
        kept = user_cache() / "index" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npy"
        try:
            return np.load(kept, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            found = build(path)
        _keep(found, kept)
        return found
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None


def _keep(found: np.ndarray, path: Path) -> None:
    """Write an index whole or not at all; a cache that cannot be written costs time only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".npy", dir=path.parent)
        os.close(handle)
        try:
            np.save(name, found, allow_pickle=False)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError:
        return


def read_span(path: Path, start: int, size: int) -> bytes:
    """Bytes of a file."""
    if size > MAX_BYTES:
        raise CapacityError(f"{size >> 20} MiB, at most {MAX_BYTES >> 20} MiB are read")
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise DataError("the file is cut off")
    return data
