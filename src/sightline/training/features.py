"""Features of an encoder that does not learn: computed once, kept on the disk, read in later epochs and by evaluation.

An entry is found by what it was made of: the pixels as they were prepared, how that was done, the encoder's weights and
the precision. So nothing ever has to be declared stale, and several runs may share a folder.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..core.config import to_dict
from ..core.patches import Grid, Patches, join
from .recipe import Source, Stage, without_files
from .records import tell

GIGABYTE = 1 << 30
LEFT = 0.9  # share of the limit that is still taken after some entries have gone
UNSEEN = 1 / 64  # share of the limit that is written before it is looked what others have written


def repeats(stage: Stage, sources: Mapping[str, Source]) -> float:
    """How often a stage meets the samples that it meets most often; 0 where its sources never repeat or are not known.

    Of such a stage features may be worth keeping from more than 1 on.
    """
    count, unknown = stage.steps * stage.accumulate * stage.batch, without_files(stage, sources)
    shares = {name: weight / sum(stage.data.values()) for name, weight in stage.data.items() if name not in unknown}
    lengths = {name: sources[name].length for name in shares}
    return max((count * shares[name] / length for name, length in lengths.items() if length), default=0.0)


class FeatureStore:
    """Features of single pictures in one folder of at most `limit` bytes; those that were read longest ago go first.

    Processes that share a folder see what the others wrote each time that they have written a 64th of the limit.

    Each is a safetensors file that comes under its name whole and carries a checksum: what a crash or a disk has
    damaged is computed again. hits, computed: how many pictures were read, and how many the encoder was asked for.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.hits = self.computed = 0
        self.full = self.closed = False
        self.used, self.unseen = sum(size for _, size, _ in self._entries()), 0

    def serve(self, encoder: nn.Module, preprocessing: Any) -> None:
        """Let a frozen encoder compute only what is not here.

        preprocessing: the settings by which its pixels are prepared. The encoder's weights must not change any more.
        """
        mark = hashlib.sha256(json.dumps([to_dict(preprocessing), str(getattr(encoder, "config", ""))]).encode())
        for name, value in encoder.state_dict().items():
            mark.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            mark.update(_bytes(value))
        encoder.forward = partial(self._seen, encoder.forward, mark.digest())  # type: ignore[method-assign]

    @contextmanager
    def only_read(self) -> Iterator[None]:
        """Within this context nothing is kept, so that what is found here later does not hang on what was asked."""
        self.closed = True
        try:
            yield
        finally:
            self.closed = False

    @torch.no_grad()
    def _seen(self, encode: Callable[[Patches], Patches], mark: bytes, patches: Patches) -> Patches:
        """The features of pictures, of which `encode` is given those that are not here."""
        device = patches.values.device
        head = mark + f"{patches.values.dtype} {_precision(device)}".encode()
        items = [Patches(item, (grid,)) for item, grid in zip(patches.items(), patches.grids, strict=True)]
        keys = [_key(head, item) for item in items]
        found = [self.read(key) for key in keys]
        missing = [i for i, each in enumerate(found) if each is None]
        if missing:
            made = encode(join([items[i] for i in missing]))
            for i, item, grid in zip(missing, made.items(), made.grids, strict=True):
                found[i] = Patches(item, (grid,))
                self.write(keys[i], item, grid)
        self.hits += len(items) - len(missing)
        self.computed += len(missing)
        features = join([each.to(device) for each in found if each is not None])
        return replace(features, tilings=patches.tilings)

    def read(self, key: str) -> Patches | None:
        """The features under a key; None where there are none, or damaged ones, which are then gone."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                values, about = file.get_tensor("features"), file.metadata()
            frames, rows, columns = json.loads(about["grid"])
            if int(about["crc32"]) != zlib.crc32(_bytes(values)):
                raise ValueError("content differs from its checksum")
            features = Patches(values, ((frames, rows, columns),))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # another user's, or gone by now
            os.utime(path)
        return features

    def write(self, key: str, values: Tensor, grid: Grid) -> None:
        """Keep the features of one picture; a full disk costs the entry and never the run."""
        if self.closed:
            return
        path, temporary = self._path(key), self._path(key).with_suffix(f".{os.getpid()}.tmp")
        values = values.detach().cpu().contiguous()
        about = {"grid": json.dumps(grid), "crc32": str(zlib.crc32(_bytes(values)))}
        content = save({"features": values}, about)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            if not self.full:
                tell(f"{self.folder}: {error.strerror}; training goes on without keeping more features")
            self.full = True
            return
        self.used += len(content)
        self.unseen += len(content)
        if self.used > self.limit or self.unseen > UNSEEN * self.limit:
            self._shrink()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.safetensors"

    def _entries(self) -> list[tuple[int, int, Path]]:
        """When each file was used last, its length and its path; another run may delete some at the same time."""
        found = []
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder, name)
                try:
                    about = path.stat()
                except FileNotFoundError:
                    continue
                found.append((about.st_mtime_ns, about.st_size, path))
        return found

    def _shrink(self) -> None:
        """Where there is more than the limit, delete what was used longest ago until some room is free."""
        entries = sorted(self._entries())
        self.used, self.unseen = sum(size for _, size, _ in entries), 0
        if self.used <= self.limit:
            return
        for _, size, path in entries:
            if self.used <= LEFT * self.limit:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
                self.used -= size


def _key(head: bytes, item: Patches) -> str:
    """What one picture's features are found by."""
    made = hashlib.sha256(head + str(item.grids).encode())
    made.update(_bytes(item.values))
    return made.hexdigest()


def _bytes(values: Tensor) -> Any:
    """The numbers of a tensor as they lie in memory."""
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _precision(device: torch.device) -> str:
    """What an encoder computes in here and now, besides its weights' own."""
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else ""
