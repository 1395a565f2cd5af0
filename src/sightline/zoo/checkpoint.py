"""Published checkpoint folders: `config.json`, safetensors in one file or several, read whole or refused in one line.

Nothing is left random: a model is built without memory on the meta device, every parameter is assigned from the file,
and `torch` itself refuses a missing or superfluous name. Pickles are never opened.
"""

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import CheckpointError

M = TypeVar("M", bound=nn.Module)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_HEADER = 100_000_000  # safetensors' own limit
PIECE = 4 << 30  # bytes of weights in one file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError tells what else was there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = path.parent / "model"  # of a run
        near = f"; there is one in {inside}" if (inside / path.name).is_file() else ""
        raise CheckpointError(
            f"{path.parent}: no {path.name}, expected a folder with a published checkpoint{near}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})".splitlines()[0]) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by its published name, from one file or the files that an index names."""
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{folder / INDEX}: no weight_map")
        for name in index.values():
            plain = isinstance(name, str) and name.isprintable() and Path(name).name == name
            if not plain or not name.endswith(".safetensors"):
                raise CheckpointError(f"{folder / INDEX}: {str(name)[:60]!r} is not a safetensors file of this folder")
        tensors: dict[str, Tensor] = {}
        files = sorted(set(index.values()))
        if absent := [name for name in files if not (folder / name).exists()]:
            few = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
            raise CheckpointError(f"{folder}: {len(absent)} of {len(files)} files of weights are missing: {few}")
        for name in files:
            tensors |= read_file(folder / name)
        if missing := sorted(set(index) - set(tensors)):
            raise CheckpointError(f"{folder}: {len(missing)} tensors of the index are in no file, such as {missing[0]}")
        return tensors
    if (folder / WEIGHTS).exists():
        return read_file(folder / WEIGHTS)
    if pickles := sorted(path.name for kind in PICKLES for path in folder.glob(kind)):
        raise CheckpointError(
            f"{folder / pickles[0]} is a pickle, which can run code and is not opened; "
            "convert it to safetensors with the library that wrote it"
        )
    raise CheckpointError(f"{folder}: no {WEIGHTS}")


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file after its header has been held against its size."""
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error})".splitlines()[0]) from None


def check_header(path: Path) -> None:
    """Refuse a file that is shorter than its header says before anything is mapped into memory."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            header: Any = json.loads(file.read(length)) if 0 < length <= min(size - 8, MAX_HEADER) else None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({(error.strerror or 'unknown').lower()})") from None
    except (ValueError, RecursionError):
        header = None
    try:
        ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError):  # JSON, but no header
        raise CheckpointError(f"{path}: {size} bytes that are no safetensors file") from None
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise CheckpointError(f"{path}: {size} bytes, its header says {wanted}; the file is cut off or damaged")


def assign(model: M, tensors: Mapping[str, Tensor], dtype: torch.dtype, source: Path) -> M:
    """Give a model on the meta device its weights; every parameter must be there, in its shape, and be a number."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if missing := sorted(set(wanted) - set(tensors)):
        raise CheckpointError(f"{source}: {len(missing)} tensors are missing, such as {missing[0]}")
    if extra := sorted(set(tensors) - set(wanted)):
        raise CheckpointError(f"{source}: {len(extra)} tensors too many, such as {extra[0]}")
    ready: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        found = tensors[name]
        if tuple(found.shape) != shape:
            raise CheckpointError(f"{source}: {name} is {list(found.shape)}, expected {list(shape)}")
        if not found.is_floating_point():
            raise CheckpointError(f"{source}: {name} holds {found.dtype}, expected weights that are not quantised")
        ready[name] = found.to(dtype)  # checked afterwards: what bfloat16 holds may be too large for float16
        if not bool(torch.isfinite(ready[name]).all()):
            raise CheckpointError(f"{source}: {name} holds values that are not numbers")
    model.load_state_dict(ready, strict=True, assign=True)
    return model.eval()


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1), encoding="utf-8")


def write_pieces(folder: Path, tensors: Mapping[str, Tensor], piece: int = PIECE) -> None:
    """Write weights into as many files as pieces of at most `piece` bytes take, with an index if there are several."""
    pieces: list[dict[str, Tensor]] = [{}]
    room = piece
    for name, tensor in tensors.items():
        if tensor.nbytes > room and pieces[-1]:
            pieces.append({})
            room = piece
        pieces[-1][name] = tensor
        room -= tensor.nbytes
    if len(pieces) == 1:
        write_tensors(folder / WEIGHTS, pieces[0])
        return
    where: dict[str, str] = {}
    for i, content in enumerate(pieces, 1):
        file = f"model-{i:05d}-of-{len(pieces):05d}.safetensors"
        write_tensors(folder / file, content)
        where |= dict.fromkeys(content, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object as people read it."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A new folder to write into; once all of it is on the disk it takes the place of `folder`, or else it vanishes.

    Whatever was there stays until then. OSError (a full disk, say) leaves the old folder as it was.
    """
    temporary, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors' files are for their owner alone, which an installed package cannot use
            flush(path)
        flush(temporary)
        _swap(temporary, folder, old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap(new: Path, folder: Path, old: Path) -> None:
    """Put a finished folder in the place of another, which comes back if that fails."""
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file with notes in its header; a full disk is an OSError here as in every other write."""
    try:
        whole = {name: value.contiguous() for name, value in tensors.items()}
        save_file(whole, path, metadata={"format": "pt", **(notes or {})})
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from None
        raise


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
