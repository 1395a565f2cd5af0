"""Packed patch vectors with a (time, height, width) grid per item, and how items lie that are parts of a picture."""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Tiling:
    """How the items of one picture lie: the whole of it first, then tiles row by row, in whose middle it was padded.

    rows, columns: of the tiles. width, height: of the original picture, whose proportions tell what is padding.
    """

    rows: int
    columns: int
    width: int
    height: int

    @property
    def items(self) -> int:
        """How many items the picture has."""
        return 1 + self.rows * self.columns

    def padding(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows above and below, columns left and right that are padding, of tiles of so many rows and columns each."""
        down, across = self.rows * rows, self.columns * columns
        # the quotients are compared, and rounded to 7 places before they are cut, as the published code does
        if self.width / self.height > across / down:
            return (down - int(round(self.height * (across / self.width), 7))) // 2, 0
        return 0, (across - int(round(self.width * (down / self.height), 7))) // 2


@dataclass(frozen=True)
class Patches:
    """Vectors of all items one after the other, each item in row-major order of its grid.

    values: [sum of t*h*w, width]; raw pixels in (channel, row, column) order before an encoder, of several frames in
    (channel, frame, row, column) order; features after it.
    grids: (time, height, width) of each item; their products add up to len(values).
    tilings: one per picture where the items are parts of pictures; without them each item is a picture of its own.
    """

    values: Tensor
    grids: tuple[Grid, ...]
    tilings: tuple[Tiling, ...] = ()

    def __post_init__(self) -> None:
        total = sum(t * h * w for t, h, w in self.grids)
        if total != self.values.shape[0]:
            raise ValueError(f"{self.values.shape[0]} patch vectors for grids that hold {total}")
        parts = sum(tiling.items for tiling in self.tilings)
        if self.tilings and parts != len(self.grids):
            raise ValueError(f"{len(self.grids)} items for tilings of {parts}")

    @property
    def uniform(self) -> bool:
        """Whether all items have the same grid, so that they can be computed as one dense batch."""
        return len(set(self.grids)) <= 1

    def dense(self) -> Tensor:
        """[items, t*h*w, width]; only for a uniform batch."""
        dense: Tensor = self.values.unflatten(0, (len(self.grids), -1))
        return dense

    def items(self) -> list[Tensor]:
        """One tensor [t*h*w, width] per item."""
        return list(self.values.split([t * h * w for t, h, w in self.grids]))

    def pictures(self) -> list[tuple[Grid, Tiling | None]]:
        """The grid of each picture's items, and how they lie."""
        if not self.tilings:
            return [(grid, None) for grid in self.grids]
        first = accumulate((tiling.items for tiling in self.tilings[:-1]), initial=0)
        return [(self.grids[i], tiling) for i, tiling in zip(first, self.tilings, strict=True)]

    def with_values(self, values: Tensor) -> "Patches":
        return replace(self, values=values)

    def to(self, device: torch.device | str) -> "Patches":
        return replace(self, values=self.values.to(device))


def patchify(pixels: Tensor, patch: int) -> Patches:
    """Cut pictures [items, channels, height, width] into patch vectors; what does not fill a patch is dropped.

    Dropping the remainder is what a convolution without padding does (SigLIP at 384 with patch 14 keeps 27x27).
    """
    items, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    kept = pixels[:, :, : rows * patch, : columns * patch]
    cut = kept.reshape(items, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return Patches(cut.reshape(items * rows * columns, channels * patch * patch), ((1, rows, columns),) * items)


def patchify_film(pixels: Tensor, patch: int) -> Patches:
    """Cut one item [time, frames, channels, height, width], a film or a still, each patch holding so many frames."""
    time, frames, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    kept = pixels[..., : rows * patch, : columns * patch]
    cut = kept.reshape(time, frames, channels, rows, patch, columns, patch).permute(0, 3, 5, 2, 1, 4, 6)
    return Patches(cut.reshape(time * rows * columns, -1), ((time, rows, columns),))


def unpatchify(patches: Patches, patch: int) -> Tensor:
    """The pictures [items, channels, height, width] of a uniform batch of single-frame patch vectors."""
    _, rows, columns = patches.grids[0]
    cut = patches.values.reshape(len(patches.grids), rows, columns, -1, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def join(batches: list[Patches]) -> Patches:
    """Several packs as one."""
    return Patches(
        torch.cat([b.values for b in batches]),
        tuple(grid for b in batches for grid in b.grids),
        tuple(tiling for b in batches for tiling in b.tilings),
    )
