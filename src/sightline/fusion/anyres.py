"""Tiles of a picture as one large picture again, each of its rows ended by a learned vector: LLaVA-NeXT."""

from typing import Literal

import torch
from torch import Tensor, nn

from ..core.config import config
from ..core.patches import Grid, Patches, Tiling
from .bridge import Bridge, TokenFusion
from .projector import ProjectorConfig


@config
class AnyResConfig:
    """The projector whose tokens are laid out."""

    projector: ProjectorConfig
    kind: Literal["anyres"] = "anyres"

    @property
    def note(self) -> str:
        return f"{self.projector.note}; tiles, where there are some, joined row by row"

    def build(self) -> "AnyRes":
        """The fusion of these settings."""
        return AnyRes(self)


class AnyRes(TokenFusion):
    """LLaVA-NeXT's (haotian-liu/LLaVA, "spatial_unpad"): the whole picture's tokens, then the rows of its tiles.

    What was padding is left out. A picture without tiles is ended by one learned vector.
    """

    def __init__(self, cfg: AnyResConfig) -> None:
        super().__init__()
        self.config = cfg
        self.projector = cfg.projector.build()
        width = cfg.projector.width
        self.newline = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))

    def num_tokens(self, grid: Grid, tiling: Tiling | None = None) -> int:
        """How many slots of the sequence a picture takes whose items have this grid."""
        one = self.projector.num_tokens(grid)
        if tiling is None:
            return one + 1
        rows, columns = self._sides(grid)
        above, left = tiling.padding(rows, columns)
        return one + (tiling.rows * rows - 2 * above) * (tiling.columns * columns - 2 * left + 1)

    def forward(self, features: Patches) -> Bridge:
        """Features [n, inputs] to tokens [m, width]; all tiles of a picture have the grid of its first item."""
        tokens = self.projector(features).tokens
        assert tokens is not None
        items = list(tokens.split([self.projector.num_tokens(grid) for grid in features.grids]))
        newline = self.newline.to(tokens.dtype)[None]
        out: list[Tensor] = []
        for grid, tiling in features.pictures():
            out.append(items.pop(0))
            if tiling is None:
                out.append(newline)
            else:
                tiles = torch.stack([items.pop(0) for _ in range(tiling.items - 1)])
                out.append(self._rows(tiles, self._sides(grid), tiling, newline))
        return Bridge(tokens=torch.cat(out))

    def _sides(self, grid: Grid) -> tuple[int, int]:
        """Rows and columns of an item's tokens."""
        frames, rows, columns = grid
        side = self.config.projector.shuffle
        return frames * rows // side, columns // side

    def _rows(self, tiles: Tensor, sides: tuple[int, int], tiling: Tiling, newline: Tensor) -> Tensor:
        """Tokens [tiles, h*w, width] as the rows of one picture [rows, columns + 1, width], flattened."""
        cut = tiles.unflatten(1, sides).unflatten(0, (tiling.rows, tiling.columns))
        joined = cut.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        above, left = tiling.padding(*sides)
        kept = joined[above : len(joined) - above, left : joined.shape[1] - left]
        return torch.cat((kept, newline.expand(len(kept), 1, -1)), dim=1).flatten(0, 1)
