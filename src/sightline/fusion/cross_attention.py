"""Gated cross-attention blocks among the decoder's own: text looks at pictures without their taking its room.

- Flamingo (arXiv:2204.14198; OpenFlamingo, arXiv:2308.01390): before every n-th block, counted so that the first comes
  before block n - 1; a token looks at the latest picture; plain GELU feed-forward, one gate per branch.
- IDEFICS (arXiv:2306.16527): before block 0 and every n-th after it; RMSNorm, SwiGLU, a norm over each head of queries
  and keys.
- Llama 3.2 (arXiv:2407.21783): the same where Flamingo has it, heads that share keys; a token that looks at nothing
  passes the blocks by, and pictures side by side are looked at together.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.config import config
from ..core.errors import ConfigError
from ..core.patches import Grid, Patches
from ..language.cache import LayerCache
from ..language.context import Context
from ..language.decoder import DecoderConfig, plain_blocks
from ..layers.attention import chosen
from ..layers.cross_attention import MemoryAttention
from ..layers.feedforward import FeedForward, GatedFeedForward
from ..layers.norms import RMSNorm
from .bridge import Bridge
from .projector import ProjectorConfig
from .resampler import ResamplerConfig


@config
class CrossAttentionConfig:
    """Sizes and settings of the blocks, and where they stand."""

    inputs: int  # width of the features
    width: int  # width of the decoder
    heads: int
    mlp: int
    kind: Literal["cross-attention"] = "cross-attention"
    resampler: ResamplerConfig | ProjectorConfig | None = None  # what makes the memory of the features; None: nothing
    head_dim: int | None = None  # None: width / heads
    kv_heads: int | None = None  # None: as many as heads
    interval: int = 4  # decoder's blocks from one cross-attention block to the next
    start: int | None = None  # the first of the decoder's blocks that has one before it; None: interval - 1
    latest: bool = True  # a token looks at the picture that began last, else at all that began
    adjacent: bool = False  # several pictures without a word between them count as one that began last
    blind_mlp: bool = True  # whether a token that looks at nothing goes through the feed-forward all the same
    norm: Literal["layer", "rms"] = "layer"
    eps: float = 1e-5
    activation: str = "gelu"
    gated_mlp: bool = False  # gate, up, down instead of up, down
    qk_norm: bool = False  # a norm over each head of queries and keys
    gate: Literal["scalar", "vector"] = "scalar"  # one number for a branch, or one for each channel

    def __post_init__(self) -> None:
        if min(self.inputs, self.width, self.heads, self.mlp, self.interval) < 1:
            raise ConfigError("sizes and interval of cross-attention are at least 1")
        if self.start is not None and self.start < 0:
            raise ConfigError(f"cross-attention from block {self.start} on, expected at least 0")
        if self.head_dim is None and self.width % self.heads:
            raise ConfigError(f"a width of {self.width} cannot be cut into {self.heads} heads alike")
        if self.heads % (self.kv_heads or self.heads):
            raise ConfigError(f"{self.heads} heads of cross-attention cannot share {self.kv_heads} heads of keys alike")
        if self.adjacent and not self.latest:
            raise ConfigError("adjacent pictures are looked at together in any case where all that began are")
        if self.resampler is not None and self.resampler.inputs != self.inputs:
            found = self.resampler.inputs
            raise ConfigError(f"a resampler that reads features of width {found}, expected {self.inputs}")

    @property
    def memory_width(self) -> int:
        """Width of the vectors that are looked at."""
        return self.inputs if self.resampler is None else self.resampler.width or self.inputs

    @property
    def note(self) -> str:
        kind = "SwiGLU" if self.gated_mlp and self.activation == "silu" else self.activation
        first = self.interval - 1 if self.start is None else self.start
        blocks = f"gated cross-attention, {self.heads} heads, {kind}, before blocks {first}, {first + self.interval}, …"
        return blocks if self.resampler is None else f"{self.resampler.note}; {blocks}"

    def places(self, depth: int) -> range:
        """The blocks of a decoder that have a cross-attention block before them."""
        return range(self.interval - 1 if self.start is None else self.start, depth, self.interval)

    def build(self) -> "CrossAttentionFusion":
        """The fusion of these settings."""
        return CrossAttentionFusion(self)


class CrossBlock(nn.Module):
    """Cross-attention and feed-forward, each behind a gate that is closed at the start.

    What a stage may teach while the decoder stays as it is begins with `cross_`.
    """

    def __init__(self, cfg: CrossAttentionConfig) -> None:
        super().__init__()
        norm = RMSNorm if cfg.norm == "rms" else nn.LayerNorm
        feedforward = GatedFeedForward if cfg.gated_mlp else FeedForward
        gate = cfg.width if cfg.gate == "vector" else 1
        self.cross_norm1 = norm(cfg.width, cfg.eps)
        qk_norm = partial(RMSNorm, eps=cfg.eps) if cfg.qk_norm else None
        sizes = cfg.width, cfg.heads, cfg.head_dim, cfg.memory_width
        self.cross_attention = MemoryAttention(*sizes, bias=False, qk_norm=qk_norm, kv_heads=cfg.kv_heads)
        self.cross_gate1 = nn.Parameter(torch.zeros(gate))
        self.cross_norm2 = norm(cfg.width, cfg.eps)
        self.cross_feedforward = feedforward(cfg.width, cfg.mlp, cfg.activation, bias=False)
        self.cross_gate2 = nn.Parameter(torch.zeros(gate))
        self.blind_mlp = cfg.blind_mlp

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        c = context
        if c.memory is not None and c.blind is not None:
            seen = self.cross_attention(self.cross_norm1(x), c.memory.values, c.looks, cache)
            x = x + torch.tanh(self.cross_gate1) * seen.masked_fill(c.blind, 0)
        x = chosen(x, c.rows)
        if self.blind_mlp:
            return x + torch.tanh(self.cross_gate2) * self.cross_feedforward(self.cross_norm2(x))
        if c.blind is None:
            return x
        out = self.cross_feedforward(self.cross_norm2(x)).masked_fill(chosen(c.blind, c.rows), 0)
        return x + torch.tanh(self.cross_gate2) * out


class CrossAttentionFusion(nn.Module):
    """Pictures as a memory that blocks of the decoder look at; in the sequence each has one token, its place."""

    def __init__(self, cfg: CrossAttentionConfig) -> None:
        super().__init__()
        self.config = cfg
        self.resampler = None if cfg.resampler is None else cfg.resampler.build()

    def num_tokens(self, grid: Grid) -> int:
        """How many slots of the sequence an item with this grid takes."""
        return 1

    def forward(self, features: Patches) -> Bridge:
        """Features [n, inputs] to a memory of as many items."""
        if self.resampler is None:
            return Bridge(memory=features, latest=self.config.latest, adjacent=self.config.adjacent)
        tokens = self.resampler(features).tokens
        grids = tuple((1, 1, self.resampler.num_tokens(grid)) for grid in features.grids)
        return Bridge(memory=Patches(tokens, grids), latest=self.config.latest, adjacent=self.config.adjacent)

    def blocks(self, decoder: DecoderConfig) -> list[nn.Module]:
        """The decoder's blocks with cross-attention blocks among them."""
        if decoder.width != self.config.width:
            raise ConfigError(f"cross-attention of width {self.config.width} in a decoder of {decoder.width}")
        places = self.config.places(decoder.depth)
        if not places:
            raise ConfigError(f"no cross-attention from block {places.start} on in a decoder of {decoder.depth}")
        out: list[nn.Module] = []
        for i, block in enumerate(plain_blocks(decoder)):
            out += [CrossBlock(self.config), block] if i in places else [block]
        return out
