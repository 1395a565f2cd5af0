"""Checkpoints that exist under their final name only when they are whole: safetensors and JSON, no pickle.

Of a model in shards each process writes a file of its part of every tensor; any number of processes can read them.

A checkpoint is written into a temporary folder, every file and the folder flushed to disk, a manifest with the
length and sha256 of each file written last, and the folder renamed. Whatever a crash leaves behind is either the old
state or a temporary folder that the next run sweeps away.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..core.errors import CapacityError, CheckpointError
from ..zoo.checkpoint import digest, flush, write_tensors
from . import distributed

MANIFEST = "manifest.json"
BEGINS = "begins"  # of a file of parts: where each of them begins, along every dimension
Box = tuple[tuple[int, int], ...]  # a part of a tensor: along each dimension from which to before which place
Part = Callable[[str, str], Box | None]  # which part of a group's tensor is asked for; None: all of it
Files = dict[str, dict[str, Any]]


class NoneWhole(CheckpointError):
    """There are checkpoints, and none that a run could go on from."""

    exit_code = 66


class Busy(CapacityError):
    """A folder is another trainer's, or cannot be written to."""

    exit_code = 73


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: tensors by group ("model", "optimizer", ...) and a JSON state."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


def save(
    folder: Path,
    name: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    boxes: Mapping[str, Box] | None = None,
) -> Path:
    """Write folder/name whole or not at all; OSError (a full disk, say) leaves what was there, on every process.

    boxes: which part of the tensors of these names is this process's, in shards; None: all processes have the same, and
    the first one writes.
    """
    temporary, final = folder / f".{name}.tmp", folder / name
    shards = boxes is not None
    first, parts = distributed.first(), f".{distributed.rank()}-of-{distributed.size()}" if shards else ""

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def write() -> Files:
        mine = []
        for group, content in tensors.items() if first or shards else ():
            mine.append(temporary / f"{group}{parts}.safetensors")
            begins = {key: [low for low, _ in boxes[key]] for key in content if key in boxes} if boxes else {}
            write_tensors(mine[-1], content, {BEGINS: json.dumps(begins)} if begins else {})
        if first:
            mine.append(temporary / "state.json")
            mine[-1].write_text(json.dumps(dict(state)))
        for path in mine:
            flush(path)
        return {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in mine}

    def finish() -> None:
        (temporary / MANIFEST).write_text(json.dumps({"files": files}))
        flush(temporary / MANIFEST)
        flush(temporary)
        if final.exists():  # the same step saved again: the one there was damaged, or a run would have gone on from it
            _remove(final)
        temporary.rename(final)
        flush(folder)

    try:
        distributed.together(lambda: begin() if first else None)
        files = {name: told for each in distributed.together(write) for name, told in each.items()}
        distributed.together(lambda: finish() if first else None)
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(path: Path) -> Saved:
    """Read a checkpoint after checking every file against the manifest; CheckpointError tells what is damaged."""
    check(path)
    return read(path)


def check(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files are all as the manifest says; CheckpointError for one that is damaged."""
    files = _manifest(path)
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, expected {size}")
        if digest(file) != sha256:
            raise CheckpointError(f"{file}: content differs from its sha256")
    return dict(json.loads((path / "state.json").read_text()))


def read(path: Path, part: Part | None = None) -> Saved:
    """Read a checkpoint that has been checked: all of it, or of each tensor the part that is asked for."""
    groups: dict[str, list[Path]] = {}
    for name in sorted(_manifest(path), key=_shard):
        if name.endswith(".safetensors"):
            groups.setdefault(name.split(".")[0], []).append(path / name)
    found = {group: _joined(group, files, part or (lambda group, key: None)) for group, files in groups.items()}
    return Saved(found, json.loads((path / "state.json").read_text()), path)


def _shard(name: str) -> int:
    """The number of the process that a file is of."""
    parts = name.split(".")
    return int(parts[1].split("-")[0]) if len(parts) == 3 else 0


def _joined(group: str, files: list[Path], part: Part) -> dict[str, Tensor]:
    """The tensors of a group's files; of one that lies in several no more than what is asked for is read."""
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        names = [set(file.keys()) for file in opened]
        begins = [json.loads((file.metadata() or {}).get(BEGINS, "{}")) for file in opened]
        found = {}
        for key in names[0]:
            asked = part(group, key)
            there = [i for i, known in enumerate(names) if key in known]
            if asked is None and len(there) == 1:
                found[key] = opened[0].get_tensor(key)
                continue
            pieces = [opened[i].get_slice(key) for i in there]
            found[key] = _assembled(pieces, [begins[i].get(key) for i in there], asked)
        return found


def _assembled(pieces: list[Any], begins: list[list[int] | None], asked: Box | None) -> Tensor:
    """A part of a tensor, or all of it, from pieces that begin there; those that do not say follow by their rows."""
    boxes: list[Box] = []
    for piece, begin in zip(pieces, begins, strict=True):
        shape = piece.get_shape()
        begin = begin or [boxes[-1][0][1] if boxes else 0, *(0 for _ in shape[1:])]
        boxes.append(tuple((low, low + size) for low, size in zip(begin, shape, strict=True)))
    asked = asked or tuple((0, max(high for _, high in along)) for along in zip(*boxes, strict=True))
    out: Tensor = pieces[0][:0].new_empty([high - low for low, high in asked])
    for piece, whole in zip(pieces, boxes, strict=True):
        both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(asked, whole, strict=True))
        if all(low < high for low, high in both):
            out[_within(both, asked)] = piece[_within(both, whole)]
    return out


def _within(part: Box, whole: Box) -> tuple[slice, ...]:
    """Where a part of a tensor is within a larger part of it."""
    return tuple(slice(low - at, high - at) for (low, high), (at, _) in zip(part, whole, strict=True))


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Length and sha256 of every file of a checkpoint, by name."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        found = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: no readable {MANIFEST}, the checkpoint is not whole") from None
    if "state.json" not in found or any(Path(name).name != name for name in found):
        raise CheckpointError(f"{path / MANIFEST}: does not name the files of a checkpoint")
    return found


def listed(folder: Path) -> list[Path]:
    """Checkpoints under their final names, newest step last; ordered by name, never by a clock."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def newest(
    folder: Path,
    warn: Callable[[str], None],
    fits: Callable[[dict[str, Any]], str] = lambda state: "",
    part: Part | None = None,
) -> Saved | None:
    """The newest checkpoint that is whole and belongs here; others are passed over with a line to `warn`.

    fits: what is wrong with a state, or nothing. NoneWhole where there are some and none of them will do. Of several
    processes the first one chooses.
    """
    name, strange = distributed.gathered(_newest(folder, warn, fits) if distributed.first() else None)[0]
    if strange and name is None:
        raise NoneWhole(strange)
    return None if name is None else read(folder / name, part)


def _newest(folder: Path, warn: Callable[[str], None], fits: Callable[[dict[str, Any]], str]) -> tuple[str | None, str]:
    """The name of the newest that fits, and what is wrong with the last that does not."""
    there, strange = listed(folder), ""
    for path in reversed(there):
        try:
            wrong = fits(check(path))
        except CheckpointError as error:
            warn(f"passed over a damaged checkpoint: {error}")
            strange = strange or f"{folder}: none of its checkpoints is whole; without it the stage begins again"
            continue
        if not wrong:
            return path.name, strange
        strange = f"{path}: belongs to another model or stage ({wrong})"
        warn(f"passed over a checkpoint: {strange}")
    return None, strange


def prune(folder: Path, newest: str, keep: int) -> None:
    """Delete all but `keep` checkpoints up to the one named `newest`, which is on the disk already.

    Later ones are what a resume passed over as damaged: they go too, or they would count as kept for ever.
    """
    upto = [path for path in listed(folder) if path.name <= newest]
    for path in listed(folder):
        if path not in upto[-keep:]:
            _remove(path)


def sweep(folder: Path) -> None:
    """Delete what interrupted saves and deletions left behind; only for who holds the folder's lock."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that half of one is never found under it."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one trainer; Busy names who holds it already. A dead holder's lock is free.

    The lock belongs to the process and not to the open file: loader processes that outlive a killed trainer for a
    moment must not keep the next one out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise Busy(f"{folder}: cannot be written to ({error.strerror})") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise Busy(f"{folder}: another trainer ({file.read().strip()}) is at work in it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
