"""The Perceiver resampler: learned latents that look at a picture again and again, and become its tokens.

- Flamingo (arXiv:2204.14198) and its open versions OpenFlamingo (arXiv:2308.01390) and Otter (arXiv:2305.03726):
  exact GELU, embeddings of frames for video.
- IDEFICS (arXiv:2306.16527): ReLU, optionally a norm over each head of queries and keys.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ..core.config import config
from ..core.errors import ConfigError
from ..core.patches import Grid, Patches
from ..layers.cross_attention import CrossAttention
from ..layers.feedforward import FeedForward
from .bridge import Bridge, TokenFusion, by_grid, learned


@config
class ResamplerConfig:
    """Sizes and settings of a Perceiver resampler."""

    inputs: int  # width of the features and of the latents
    width: int | None = None  # of the decoder; None: the latents as they are, for cross-attention blocks to look at
    kind: Literal["resampler"] = "resampler"
    latents: int = 64
    depth: int = 6
    heads: int = 8
    head_dim: int = 64
    mlp: int | None = None  # None: four times the latents' width
    activation: str = "gelu"
    qk_norm: bool = False  # a LayerNorm over each head of queries and keys
    frames: int = 0  # how many frames have an embedding of their own; 0: none

    def __post_init__(self) -> None:
        if min(self.latents, self.depth, self.heads, self.head_dim) < 1:
            raise ConfigError("a resampler's latents, depth, heads and head_dim are at least 1")

    @property
    def note(self) -> str:
        return f"Perceiver of {self.latents} latents, {self.depth} blocks, {self.heads} heads, {self.activation}"

    def build(self) -> "Resampler":
        """The resampler of these settings."""
        return Resampler(self)


class ResamplerBlock(nn.Module):
    """Latents look at features and at themselves, then a feed-forward; a norm before each, no biases but the norms'."""

    def __init__(self, cfg: ResamplerConfig) -> None:
        super().__init__()
        width = cfg.inputs
        self.norm_features = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        qk_norm = nn.LayerNorm if cfg.qk_norm else None
        self.attention = CrossAttention(width, cfg.heads, cfg.head_dim, bias=False, qk_norm=qk_norm)
        self.norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, cfg.mlp or 4 * width, cfg.activation, bias=False)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        queries = self.norm_latents(latents)
        seen = torch.cat((self.norm_features(features), queries), dim=1)
        latents = latents + self.attention(queries, seen)
        return latents + self.feedforward(self.norm(latents))


class Resampler(TokenFusion):
    """As many tokens an item as there are latents, whatever its grid and its number of frames."""

    def __init__(self, cfg: ResamplerConfig) -> None:
        super().__init__()
        self.config = cfg
        self.latents = learned(cfg.latents, cfg.inputs)
        self.frames = learned(cfg.frames, cfg.inputs) if cfg.frames else None
        self.layers = nn.ModuleList(ResamplerBlock(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.inputs)
        self.out = nn.Identity() if cfg.width is None else nn.Linear(cfg.inputs, cfg.width)

    def num_tokens(self, grid: Grid) -> int:
        """How many slots of the sequence an item with this grid takes."""
        if self.frames is not None and grid[0] > len(self.frames):
            raise ConfigError(f"a video of {grid[0]} frames, this resampler has embeddings for {len(self.frames)}")
        return self.config.latents

    def forward(self, features: Patches) -> Bridge:
        """Features [n, inputs] to tokens [items * latents, width]; ConfigError for a video of too many frames."""
        for grid in set(features.grids):
            self.num_tokens(grid)
        return Bridge(tokens=self.out(by_grid(features, self.resample)))

    def resample(self, features: Tensor, grid: Grid, _: list[int]) -> Tensor:
        """Features [items, t*h*w, inputs] of one grid to latents [items, latents, inputs]."""
        if self.frames is not None:
            frames = self.frames[: grid[0], None]
            features = (features.unflatten(1, (grid[0], -1)) + frames).flatten(1, 2)
        latents = self.latents.expand(len(features), -1, -1)
        for block in self.layers:
            latents = block(latents, features)
        return self.norm(latents)
