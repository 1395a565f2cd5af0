"""Features to the decoder's width: linear, multi-layer perceptron, or one that folds squares of patches together."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.config import config
from ..core.errors import ConfigError
from ..core.patches import Grid, Patches
from ..layers.feedforward import activation
from .bridge import Bridge, TokenFusion


@config
class ProjectorConfig:
    """Sizes and settings of a projector."""

    inputs: int  # width of the features
    width: int  # width of the decoder
    kind: Literal["projector"] = "projector"
    layers: int = 2  # 0: features are tokens as they are
    hidden: int | None = None  # between two layers; None: the decoder's width
    activation: str = "gelu"
    bias: bool = True
    shuffle: int = 1  # side of the square of patches that becomes one token
    norm: bool = False  # a norm over the folded features (InternVL)
    transposed: bool = False  # folded tokens go column by column (the first InternVL-1.5, `ps_version` v1)

    def __post_init__(self) -> None:
        if self.layers < 0 or (self.layers == 0 and self.inputs * self.shuffle**2 != self.width):
            sizes = f"{self.inputs * self.shuffle**2} numbers into {self.width}"
            raise ConfigError(f"a projector of {self.layers} layers from {sizes}, expected one layer or more")
        if self.transposed and self.shuffle == 1:
            raise ConfigError("a projector that folds nothing has no order of squares to transpose")

    @property
    def note(self) -> str:
        few = ("as they are", "linear")
        layers = f"{self.layers} layers, {self.activation}" if self.layers > 1 else few[self.layers]
        return layers if self.shuffle == 1 else f"{self.shuffle}x{self.shuffle} patches folded into one, {layers}"

    def build(self) -> "Projector":
        """The projector of these settings."""
        return Projector(self)


class Projector(TokenFusion):
    """LLaVA's linear map or MLP (arXiv:2304.08485, 2310.03744); with `shuffle`, InternVL's (arXiv:2404.16821).

    Llama-4's pixel-shuffle MLP, with an activation after both its layers, and its projector are three layers. Without
    layers, features are of the decoder's width already, such as a linear map of pixels (Fuyu's early fusion).
    """

    def __init__(self, cfg: ProjectorConfig) -> None:
        super().__init__()
        self.config = cfg
        inputs, hidden = cfg.inputs * cfg.shuffle**2, cfg.hidden or cfg.width
        sizes = [inputs, *[hidden] * (cfg.layers - 1), cfg.width] if cfg.layers else [inputs]
        self.norm = nn.LayerNorm(inputs) if cfg.norm else None
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=cfg.bias) for a, b in pairwise(sizes))
        self.act = activation(cfg.activation)

    def num_tokens(self, grid: Grid) -> int:
        """How many slots of the sequence an item with this grid takes."""
        frames, rows, columns = grid
        side = self.config.shuffle
        if rows % side or columns % side:
            raise ConfigError(f"a grid of {rows}x{columns} patches cannot be folded in squares of {side}")
        return frames * (rows // side) * (columns // side)

    def forward(self, features: Patches) -> Bridge:
        """Features [n, inputs] to tokens [m, width]; ConfigError for a grid that cannot be folded."""
        for grid in set(features.grids):
            self.num_tokens(grid)  # reshaping alone would fold patches of different items into one token
        cfg = self.config
        x = features.values if cfg.shuffle == 1 else fold(features, cfg.shuffle, cfg.transposed)
        if self.norm is not None:
            x = self.norm(x)
        for i, layer in enumerate(self.layers):
            x = layer(self.act(x) if i else x)
        return Bridge(tokens=x)


def fold(features: Patches, side: int, transposed: bool = False) -> Tensor:
    """Squares of `side` x `side` patches as one vector, row by row within the square, on every frame.

    The squares themselves go row by row too, or if `transposed` column by column.
    """
    if features.uniform:
        frames, rows, columns = features.grids[0]
        x = features.values.reshape(-1, frames, rows // side, side, columns // side, side, features.values.shape[1])
        order = (0, 1, 4, 2, 3, 5, 6) if transposed else (0, 1, 2, 4, 3, 5, 6)
        return x.permute(order).flatten(4).flatten(0, 3)
    items = zip(features.items(), features.grids, strict=True)
    return torch.cat([fold(Patches(item, (grid,)), side, transposed) for item, grid in items])
