"""Checkpoints that exist under their final name only when they are whole: safetensors and JSON, no pickle.

A checkpoint is written into a temporary folder, every file and the folder flushed to disk, a manifest with the
length and sha256 of each file written last, and the folder renamed. Whatever a crash leaves behind is either the old
state or a temporary folder that the next run sweeps away.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..core.errors import CapacityError, CheckpointError
from ..zoo.checkpoint import digest, flush, write_tensors

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: tensors by group ("model", "optimizer", ...) and a JSON state."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


def save(folder: Path, name: str, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write folder/name whole or not at all; OSError (a full disk, say) leaves what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary, final = folder / f".{name}.tmp", folder / name
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for group, content in tensors.items():
            write_tensors(temporary / f"{group}.safetensors", content)
        (temporary / "state.json").write_text(json.dumps(dict(state)))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in temporary.iterdir()}
        (temporary / MANIFEST).write_text(json.dumps({"files": files}))
        for path in temporary.iterdir():
            flush(path)
        flush(temporary)
        if final.exists():  # the same step saved again: the one there was damaged, or a run would have gone on from it
            _remove(final)
        temporary.rename(final)
        flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(path: Path) -> Saved:
    """Read a checkpoint after checking every file against the manifest; CheckpointError tells what is damaged."""
    files = _manifest(path)
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, expected {size}")
        if digest(file) != sha256:
            raise CheckpointError(f"{file}: content differs from its sha256")
    groups = {Path(name).stem: load_file(path / name) for name in files if name.endswith(".safetensors")}
    return Saved(groups, json.loads((path / "state.json").read_text()), path)


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


def newest(folder: Path, warn: Callable[[str], None]) -> Saved | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a line to `warn`."""
    for path in reversed(listed(folder)):
        try:
            return load(path)
        except CheckpointError as error:
            warn(f"passed over a damaged checkpoint: {error}")
    return None


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
    """Hold a folder for one trainer; CapacityError names who holds it already. A dead holder's lock is free.

    The lock belongs to the process and not to the open file: loader processes that outlive a killed trainer for a
    moment must not keep the next one out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise CapacityError(f"{folder}: cannot be written to ({error.strerror})") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise CapacityError(f"{folder}: another trainer ({file.read().strip()}) is at work in it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
