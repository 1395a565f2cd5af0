"""A vision transformer that sees all tiles of a picture at once: Llama 3.2's (arXiv:2407.21783, section 7).

A picture is a canvas of whole tiles. Every tile has a class token, and embeddings that say where on which shape of
canvas it lies; blocks attend across all of them. Further blocks behind gates follow, and what comes out of them is
joined with the outputs of earlier blocks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ConfigError
from ..core.patches import Patches
from ..layers.linear import working_precision
from .vit import ViT, ViTBlock, ViTConfig

ALIGNED = 8  # tokens of a tile are filled up to a multiple of so many, and patches look at what fills them up


class GatedBlock(ViTBlock):
    """A block each of whose branches is behind a gate that is closed at the start."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__(cfg)
        self.gate1 = nn.Parameter(torch.zeros(1))
        self.gate2 = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        assert self.norm2 is not None
        x = x + torch.tanh(self.gate1) * self.attention(self.norm1(x), mask, rotary=rotary)
        return x + torch.tanh(self.gate2) * self.feedforward(self.norm2(x))


class TileTable(nn.Module):
    """A vector for each tile of each shape of canvas, or one for each token of it, behind a gate."""

    def __init__(self, shapes: int, tiles: int, tokens: int, width: int) -> None:
        super().__init__()
        self.size = (tiles, tokens, width)
        self.table = nn.Parameter(torch.zeros(shapes + 1, tiles * tokens * width))  # row 0 is that of no picture
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, shape: int) -> Tensor:
        """[tiles, tokens, width] for the canvas of that number, from 1."""
        return torch.tanh(self.gate) * self.table[shape].view(self.size)


class TiledViT(ViT):
    """A `ViT` whose pictures are canvases of whole tiles: rows and columns of patches are multiples of a tile's."""

    def __init__(self, cfg: ViTConfig) -> None:
        if cfg.tiles is None or cfg.residual != "pre-norm" or cfg.norm != "layer" or cfg.layer_scale or cfg.registers:
            raise ConfigError("an encoder of tiles has pre-norm blocks and layer norms, no registers and no scales")
        if not (cfg.class_token and cfg.keep_prefix and cfg.pre_norm and cfg.final_norm) or cfg.taken[0] != cfg.depth:
            raise ConfigError(
                "an encoder of tiles keeps its class token, has norms around its blocks and takes the last layer first"
            )
        super().__init__(cfg)
        self.tiles, tokens = cfg.tiles, 1 + cfg.grid**2
        count, most = len(self.tiles.shapes), self.tiles.most
        self.tile_positions = TileTable(count, most, tokens, cfg.width)
        self.tiles_before = TileTable(count, most, 1, cfg.width)
        self.tiles_after = TileTable(count, most, 1, cfg.width)
        self.gated = nn.ModuleList(GatedBlock(cfg) for _ in range(self.tiles.depth))
        self.reset()

    def tokens(self, patches: Patches) -> Tensor:
        """All tokens [canvases, tiles * (1 + patches of a tile), features] of canvases of one shape."""
        cfg, (_, rows, columns) = self.config, patches.grids[0]
        down, across = rows // cfg.grid, columns // cfg.grid
        if (down * cfg.grid, across * cfg.grid) != (rows, columns) or (down, across) not in self.tiles.shapes:
            wanted = ", ".join(f"{r}x{c}" for r, c in self.tiles.shapes)
            raise ConfigError(
                f"a canvas of {rows}x{columns} patches, expected tiles of {cfg.grid}x{cfg.grid} in one of {wanted}"
            )
        cut = patches.dense().unflatten(1, (down, cfg.grid, across, cfg.grid)).transpose(2, 3)
        cut = cut.flatten(3, 4).flatten(1, 2)  # [canvases, tiles, patches, numbers]
        x = working_precision(self.placed(cut, self.tiles.shapes.index((down, across)) + 1))
        count, tokens = down * across, x.shape[2]
        x = F.pad(x, (0, 0, 0, -tokens % ALIGNED))
        real = torch.zeros(x.shape[1:3], dtype=torch.bool, device=x.device)
        real[:count, :tokens] = True
        real = real.flatten()
        mask = real[:, None] | real  # what fills up is hidden from itself alone, as the weights were trained
        shape = x.shape
        x = x.flatten(1, 2)
        found: dict[int, Tensor] = {}
        for depth, block in enumerate(self.blocks, 1):
            x = block(x, mask=mask)
            if depth in cfg.taken[1:]:
                found[depth] = x
        assert self.norm is not None
        x = (self.norm(x).view(shape) + self.tiles_after(self.tiles.shapes.index((down, across)) + 1)).flatten(1, 2)
        for block in self.gated:
            x = block(x, mask=mask)
        if found:  # earlier layers lie channel by channel, not layer by layer
            x = torch.cat((x, torch.stack([found[depth] for depth in cfg.taken[1:]], dim=-1).flatten(2)), dim=-1)
        return x.unflatten(1, shape[1:3])[:, :count, :tokens].flatten(1, 2)

    def placed(self, cut: Tensor, shape: int) -> Tensor:
        """Patches [canvases, tiles, patches, numbers] to tokens [canvases, most tiles, 1 + patches, width]."""
        assert self.class_token is not None and self.pre_norm is not None
        x = self.patch(cut.to(self.class_token.dtype))
        x = F.pad(x, (0, 0, 0, 0, 0, self.tiles.most - x.shape[1])) + self.tiles_before(shape)
        x = torch.cat((self.class_token.to(x.dtype).expand(*x.shape[:2], 1, -1), x), dim=2)
        shared = (1 - torch.tanh(self.tile_positions.gate)) * self.positions
        return self.pre_norm(x + shared + self.tile_positions(shape))
