"""Patches in the plane: their positions on a grid of any size, and the squares that blocks may look within."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.patches import Grid
from ..layers.rotary import rotary_table


def resized(table: Tensor, side: int, grid: Grid, antialias: bool = False) -> Tensor:
    """Positions [side*side, width] of a square grid as those of another, [h*w, width]: bicubic, in float32."""
    wide = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    wide = F.interpolate(wide, size=grid[1:], mode="bicubic", antialias=antialias)
    return wide[0].flatten(1).T.to(table.dtype)


def looked_up(table: Tensor, side: int, grid: Grid) -> Tensor:
    """Positions [h*w, width] of a grid as rows of a table [side*side, width], by fractions of the side."""
    down, across = (buckets(count, side).to(table.device) for count in grid[1:])
    return table.unflatten(0, (side, side))[down][:, across].flatten(0, 1)


def buckets(count: int, side: int) -> Tensor:
    """For each of `count` patches along a side, the place of a table of `side` in which it begins [count].

    Both are fractions of the side in float32, on the CPU, so that every device rounds them alike.
    """
    edges = torch.arange(1 / side, 1.0, 1 / side, device="cpu")
    begins = torch.arange(count, dtype=torch.float32, device="cpu") * (1.0 / torch.tensor(count, device="cpu"))
    return torch.bucketize(begins.clamp(max=1 - 1e-6), edges, right=True)


def turns(grid: Grid, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [h*w, dim] in float32 of rotary positions in the plane.

    Columns and rows count from 1. The first half of the pairs that turn together are turned by the column.
    """
    (_, rows, columns), quarter = grid, dim // 4
    down = torch.arange(1, rows + 1, device=device).repeat_interleave(columns)
    across = torch.arange(1, columns + 1, device=device).repeat(rows)
    tables = [rotary_table(place, 2 * quarter, theta, torch.float32) for place in (across, down)]
    cos, sin = (torch.cat([t[:, :quarter] for t in both] * 2, dim=1) for both in zip(*tables, strict=True))
    return cos, sin


def windowed(x: Tensor, grid: Grid, side: int, look: Callable[[Tensor, Grid], Tensor]) -> Tensor:
    """Tokens [items, h*w, width] looked at in squares of `side` patches, cut from the top left on, each for itself.

    look: tokens [squares, h*w, width] of squares of one shape and that shape; what is left at the right and at the
    bottom makes smaller ones.
    """
    bands = []
    for band in _strips(x.unflatten(1, grid[1:]), side, 1):
        pieces = []
        for piece in _strips(band, side, 2):
            rows, columns = (min(side, length) for length in piece.shape[1:3])
            cut = piece.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
            seen = look(cut.flatten(3, 4).flatten(0, 2), (1, rows, columns)).view(cut.shape)
            pieces.append(seen.transpose(2, 3).flatten(3, 4).flatten(1, 2))
        bands.append(torch.cat(pieces, dim=2))
    return torch.cat(bands, dim=1).flatten(1, 2)


def _strips(x: Tensor, side: int, dim: int) -> list[Tensor]:
    """What of a dimension is whole lengths of `side`, and the rest; none of them empty."""
    rest = x.shape[dim] % side
    return [part for part in x.split([x.shape[dim] - rest, rest], dim) if part.shape[dim]]
