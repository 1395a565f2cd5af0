"""Learned queries that look at a picture once: the single-layer resamplers of Qwen-VL, Kosmos-2 and Aria."""

from typing import Literal

import torch
from torch import Tensor, nn

from ..core.config import config
from ..core.errors import ConfigError
from ..core.patches import Grid, Patches
from ..encoders.plane import resized
from ..layers.cross_attention import CrossAttention
from ..layers.feedforward import activation
from .bridge import Bridge, TokenFusion, by_grid, learned


@config
class PositionPoolConfig:
    """Sizes of a pool whose queries have places."""

    inputs: int  # width of the features
    width: int  # width of the decoder
    heads: int
    kind: Literal["position-pool"] = "position-pool"
    side: int = 16  # queries along one side of a square
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ConfigError(f"a pool has at least one query, not {self.side} along a side")
        if self.width % 4:
            raise ConfigError(f"sines and cosines of rows and columns need a width divisible by 4, not {self.width}")

    @property
    def note(self) -> str:
        return f"{self.side}x{self.side} queries with places, 1 layer, {self.heads} heads"

    def build(self) -> "PositionPool":
        """The pool of these settings."""
        return PositionPool(self)


class PositionPool(TokenFusion):
    """Qwen-VL's resampler (arXiv:2308.12966): places of two dimensions are added to queries and keys, not to values."""

    positions: Tensor

    def __init__(self, cfg: PositionPoolConfig) -> None:
        super().__init__()
        self.config = cfg
        width, eps = cfg.width, cfg.eps
        self.queries = learned(cfg.side**2, width)
        # never learned, but published with the weights and rounded as they are
        self.register_buffer("positions", sine_table(cfg.side, width))
        self.project = nn.Identity() if cfg.inputs == width else nn.Linear(cfg.inputs, width, bias=False)
        self.norm_queries, self.norm_features = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = CrossAttention(width, cfg.heads)
        self.norm = nn.LayerNorm(width, eps)
        self.out = nn.Linear(width, width, bias=False)

    def num_tokens(self, grid: Grid) -> int:
        """How many slots of the sequence an item with this grid takes."""
        return self.config.side**2

    def forward(self, features: Patches) -> Bridge:
        """Features [n, inputs] to tokens [items * side * side, width]."""
        return Bridge(tokens=by_grid(features, self.pool))

    def pool(self, features: Tensor, grid: Grid, _: list[int]) -> Tensor:
        """Features [items, t*h*w, inputs] of one grid to tokens [items, side * side, width]."""
        values = self.norm_features(self.project(features))
        keys = values + self.key_positions(grid).to(values.dtype)
        queries = (self.norm_queries(self.queries) + self.positions).to(values.dtype)
        pooled = self.attention(queries.expand(len(features), -1, -1), keys, values)
        return self.out(self.norm(pooled))

    def key_positions(self, grid: Grid) -> Tensor:
        """Places [t*h*w, width] of patches; bicubic from those of the queries where the grid differs from theirs."""
        frames, rows, columns = grid
        side, table = self.config.side, self.positions
        if (rows, columns) != (side, side):
            table = resized(table, side, grid)
        return table.repeat(frames, 1)


def sine_table(side: int, width: int) -> Tensor:
    """Places [side * side, width] row by row: sines, then cosines of the column, then both of the row.

    The frequencies are those of arXiv:1706.03762, a quarter of the width of each.
    """
    frequency = 10_000.0 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    line = torch.cat((angle.sin(), angle.cos()), dim=1)
    columns, rows = line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat((columns, rows), dim=2).flatten(0, 1)


@config
class LatentPoolConfig:
    """Sizes of a pool whose queries see each other."""

    inputs: int  # width of the features
    width: int  # width of the decoder
    heads: int
    kind: Literal["latent-pool"] = "latent-pool"
    queries: int = 64

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ConfigError(f"a pool has at least one query, not {self.queries}")

    @property
    def note(self) -> str:
        return f"{self.queries} queries that see each other, 1 layer, {self.heads} heads"

    def build(self) -> "LatentPool":
        """The pool of these settings."""
        return LatentPool(self)


class LatentPool(TokenFusion):
    """Kosmos-2's (arXiv:2306.14824): keys and values are the projected features and the queries themselves."""

    def __init__(self, cfg: LatentPoolConfig) -> None:
        super().__init__()
        self.config = cfg
        self.queries = learned(cfg.queries, cfg.width)
        self.project = nn.Linear(cfg.inputs, cfg.width)
        self.attention = CrossAttention(cfg.width, cfg.heads)

    def num_tokens(self, grid: Grid) -> int:
        """How many slots of the sequence an item with this grid takes."""
        return self.config.queries

    def forward(self, features: Patches) -> Bridge:
        """Features [n, inputs] to tokens [items * queries, width]."""
        return Bridge(tokens=by_grid(features, self.pool))

    def pool(self, features: Tensor, grid: Grid, _: list[int]) -> Tensor:
        """Features [items, t*h*w, inputs] of one grid to tokens [items, queries, width]."""
        values = self.project(features)
        queries = self.queries.to(values.dtype).expand(len(features), -1, -1)
        return self.attention(queries, torch.cat((values, queries), dim=1))


@config
class SizedPoolConfig:
    """Sizes of a pool that uses more queries for more patches."""

    inputs: int  # width of the features
    width: int  # width of the decoder
    heads: int
    queries: dict[int, int]  # how many are used, by the patches of the square around an item
    kind: Literal["sized-pool"] = "sized-pool"
    activation: str = "gelu_tanh"

    def __post_init__(self) -> None:
        if not self.queries or min(self.queries.values()) < 1:
            raise ConfigError(f"a pool has at least one query for a number of patches, not {self.queries}")

    @property
    def note(self) -> str:
        return f"up to {max(self.queries.values())} queries, 1 layer, {self.heads} heads, {self.activation}"

    def build(self) -> "SizedPool":
        """The pool of these settings."""
        return SizedPool(self)


class SizedPool(TokenFusion):
    """Aria's projector (arXiv:2410.05993): queries, keys and values are each projected twice, then an MLP.

    A picture that is not square is looked at without the padding that makes it so, and has the square's queries.
    """

    def __init__(self, cfg: SizedPoolConfig) -> None:
        super().__init__()
        self.config = cfg
        inputs = cfg.inputs
        self.queries = learned(max(cfg.queries.values()), inputs)
        self.norm_queries, self.norm_features = nn.LayerNorm(inputs), nn.LayerNorm(inputs)
        self.q, self.k, self.v = (nn.Linear(inputs, inputs, bias=False) for _ in range(3))
        self.attention = CrossAttention(inputs, cfg.heads)
        self.mix = nn.Linear(inputs, inputs)
        self.norm = nn.LayerNorm(inputs)
        self.up = nn.Linear(inputs, cfg.width, bias=False)
        self.down = nn.Linear(cfg.width, cfg.width, bias=False)
        self.act = activation(cfg.activation)

    def num_tokens(self, grid: Grid) -> int:
        """How many slots of the sequence an item with this grid takes."""
        frames, rows, columns = grid
        known, patches = self.config.queries, frames * max(rows, columns) ** 2
        if patches not in known:
            known_too = ", ".join(map(str, known))
            raise ConfigError(f"a picture in a square of {patches} patches, this pool knows {known_too}")
        return known[patches]

    def forward(self, features: Patches) -> Bridge:
        """Features [n, inputs] to tokens [m, width]; ConfigError for a size that has no queries."""
        return Bridge(tokens=by_grid(features, self.pool))

    def pool(self, features: Tensor, grid: Grid, _: list[int]) -> Tensor:
        """Features [items, t*h*w, inputs] of one grid to tokens [items, n, width]."""
        queries = self.q(self.norm_queries(self.queries[: self.num_tokens(grid)]))
        seen = self.norm_features(features)
        pooled = self.attention(queries.expand(len(features), -1, -1), self.k(seen), self.v(seen))
        return self.down(self.act(self.up(self.norm(self.mix(pooled)))))
