"""Checkpoints that exist under their final name only when they are whole: safetensors and JSON, no pickle.

A checkpoint is written into a temporary folder, every file and the folder flushed to disk, a manifest with the
length and sha256 of each file written last, and the folder renamed. Whatever a crash leaves behind is either the old
state or a temporary folder that the next run sweeps away.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.errors import CapacityError, CheckpointError

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
            save_file({key: value.contiguous() for key, value in content.items()}, temporary / f"{group}.safetensors")
        (temporary / "state.json").write_text(json.dumps(dict(state)))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in temporary.iterdir()}
        (temporary / MANIFEST).write_text(json.dumps({"files": files}))
        for path in temporary.iterdir():
            flush(path)
        flush(temporary)
        if final.exists():  # the same step saved again after a resume
            shutil.rmtree(final)
        temporary.rename(final)
        flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> Saved:
    """Read a checkpoint after checking every file against the manifest; CheckpointError tells what is damaged."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: no readable {MANIFEST}, the checkpoint is not whole") from None
    for name, wanted in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != wanted["bytes"]:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, expected {wanted['bytes']}")
        if digest(file) != wanted["sha256"]:
            raise CheckpointError(f"{file}: content differs from its sha256")
    groups = {Path(name).stem: load_file(path / name) for name in files if name.endswith(".safetensors")}
    return Saved(groups, json.loads((path / "state.json").read_text()), path)


def listed(folder: Path) -> list[Path]:
    """Checkpoints under their final names, newest step last; ordered by name, never by a clock."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def newest(folder: Path, warn: Any = print) -> Saved | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a line to `warn`."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in reversed(listed(folder)):
        try:
            return load(path)
        except CheckpointError as error:
            warn(f"passed over a damaged checkpoint: {error}")
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep`; called only after a new one is on the disk."""
    for path in listed(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one trainer; CapacityError names who holds it already. A dead holder's lock is free."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise CapacityError(f"{folder}: another trainer ({file.read().strip()}) is at work in it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
