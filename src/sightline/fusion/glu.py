"""CogVLM's adapter: each patch through a gated feed-forward, between two learned tokens."""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..core.config import config
from ..core.errors import ConfigError
from ..core.patches import Grid, Patches
from ..layers.feedforward import GatedFeedForward
from .bridge import Bridge, TokenFusion, learned
from .projector import fold


@config
class GLUConfig:
    """Sizes of a gated adapter."""

    inputs: int  # width of the features
    width: int  # width of the decoder
    hidden: int  # inside the gated feed-forward
    kind: Literal["glu"] = "glu"
    activation: str = "silu"
    stride: int = 1  # side of the squares of patches that a convolution makes one of first (CogVLM2)

    def __post_init__(self) -> None:
        if min(self.inputs, self.width, self.hidden, self.stride) < 1:
            raise ConfigError("a gated adapter's sizes are at least 1")

    @property
    def note(self) -> str:
        folded = "" if self.stride == 1 else f"{self.stride}x{self.stride} patches convolved into one, "
        return f"{folded}gated feed-forward, {self.activation}, a learned token on either side"

    def build(self) -> "GLUAdapter":
        """The adapter of these settings."""
        return GLUAdapter(self)


class GLUAdapter(TokenFusion):
    """CogVLM's adapter (arXiv:2311.03079): a linear map, norm and GELU, then a gated feed-forward, no biases.

    With a `stride`, CogVLM2's (arXiv:2408.16500), whose convolution, of kernels that do not overlap, is a linear map.
    """

    def __init__(self, cfg: GLUConfig) -> None:
        super().__init__()
        self.config = cfg
        self.conv = nn.Linear(cfg.inputs * cfg.stride**2, cfg.inputs) if cfg.stride > 1 else None
        self.project = nn.Linear(cfg.inputs, cfg.width, bias=False)
        self.norm = nn.LayerNorm(cfg.width)
        self.feedforward = GatedFeedForward(cfg.width, cfg.hidden, cfg.activation)
        self.begin, self.end = learned(cfg.width), learned(cfg.width)

    def num_tokens(self, grid: Grid) -> int:
        """How many slots of the sequence an item with this grid takes, the two learned tokens counted."""
        frames, rows, columns = self.convolved(grid)
        return frames * rows * columns + 2

    def convolved(self, grid: Grid) -> Grid:
        """The grid after the convolution, if there is one; ConfigError where its squares do not fill the picture."""
        (frames, rows, columns), side = grid, self.config.stride
        if rows % side or columns % side:
            raise ConfigError(f"a grid of {rows}x{columns} patches cannot be convolved in squares of {side}")
        return frames, rows // side, columns // side

    def forward(self, features: Patches) -> Bridge:
        """Features [n, inputs] to tokens [n / stride^2 + 2 * items, width]."""
        if self.conv is not None:
            grids = tuple(self.convolved(grid) for grid in features.grids)
            features = Patches(self.conv(fold(features, self.config.stride)), grids)
        x = features.with_values(self.feedforward(F.gelu(self.norm(self.project(features.values)))))
        begin, end = self.begin[None].to(x.values.dtype), self.end[None].to(x.values.dtype)
        return Bridge(tokens=torch.cat([part for item in x.items() for part in (begin, item, end)]))
