"""Checkpoints that exist under their final name only when they are whole: safetensors and JSON, no pickle.

Of a model in shards each process writes a file of its rows of every tensor; any number of processes can read them.

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

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.errors import CapacityError, CheckpointError
from ..zoo.checkpoint import digest, flush, write_tensors
from . import distributed

MANIFEST = "manifest.json"
Rows = Callable[[str, str], tuple[int, int] | None]  # which rows of a group's tensor are asked for; None: all of it
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
    shards: bool = False,
) -> Path:
    """Write folder/name whole or not at all; OSError (a full disk, say) leaves what was there, on every process.

    shards: each process has its own rows of the tensors to write; else all have the same, which the first one writes.
    """
    temporary, final = folder / f".{name}.tmp", folder / name
    first, parts = distributed.first(), f".{distributed.rank()}-of-{distributed.size()}" if shards else ""

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def write() -> Files:
        mine = []
        for group, content in tensors.items() if first or shards else ():
            mine.append(temporary / f"{group}{parts}.safetensors")
            write_tensors(mine[-1], content)
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


def read(path: Path, rows: Rows | None = None) -> Saved:
    """Read a checkpoint that has been checked: all of it, or of each tensor the rows that are asked for."""
    groups: dict[str, list[Path]] = {}
    for name in sorted(_manifest(path), key=_shard):
        if name.endswith(".safetensors"):
            groups.setdefault(name.split(".")[0], []).append(path / name)
    found = {group: _joined(group, files, rows or (lambda group, key: None)) for group, files in groups.items()}
    return Saved(found, json.loads((path / "state.json").read_text()), path)


def _shard(name: str) -> int:
    """The number of the process that a file is of."""
    parts = name.split(".")
    return int(parts[1].split("-")[0]) if len(parts) == 3 else 0


def _joined(group: str, files: list[Path], rows: Rows) -> dict[str, Tensor]:
    """The tensors of a group's files; of one that lies in several by rows, no other rows than asked for are read."""
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        names = [set(file.keys()) for file in opened]
        found = {}
        for key in names[0]:
            pieces = [file.get_slice(key) for file, known in zip(opened, names, strict=True) if key in known]
            asked = rows(group, key) if pieces[0].get_shape() else None
            if len(pieces) == 1 and asked is None:
                found[key] = opened[0].get_tensor(key)
                continue
            parts, at = [], 0
            for piece in pieces:
                count = piece.get_shape()[0]
                low, high = asked or (at, at + count)
                parts.append(piece[min(max(low - at, 0), count) : min(max(high - at, 0), count)])
                at += count
            found[key] = torch.cat(parts)
        return found


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
    rows: Rows | None = None,
) -> Saved | None:
    """The newest checkpoint that is whole and belongs here; others are passed over with a line to `warn`.

    fits: what is wrong with a state, or nothing. NoneWhole where there are some and none of them will do. Of several
    processes the first one chooses.
    """
    name, strange = distributed.gathered(_newest(folder, warn, fits) if distributed.first() else None)[0]
    if strange and name is None:
        raise NoneWhole(strange)
    return None if name is None else read(folder / name, rows)


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
