"""A visual expert: every block of the decoder has a second set of weights, for the tokens of pictures.

CogVLM (arXiv:2311.03079): queries, keys, values, output and feed-forward of its own for each kind of token; norms are
shared, and all tokens attend to one another. Which weights a token takes is its medium in the layout.
"""

from dataclasses import MISSING, fields
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.config import config
from ..core.errors import ConfigError
from ..core.patches import Grid, Patches
from ..language.cache import LayerCache
from ..language.context import Context, split_by
from ..language.decoder import DecoderConfig, SelfBlock
from ..layers.attention import Attention, attend, chosen
from ..layers.feedforward import GatedFeedForward
from ..layers.linear import together
from ..layers.packed import PackedLinear
from ..layers.rotary import rotate
from .bridge import Bridge
from .glu import GLUConfig
from .projector import ProjectorConfig
from .resampler import ResamplerConfig

# settings of a decoder that an expert's blocks follow; any other must be as it is without being named
FOLLOWED = (
    "vocab_size", "extra_vocab", "width", "depth", "heads", "kv_heads", "head_dim", "mlp", "activation", "eps",
    "norm_offset", "rope_theta", "qkv_bias", "out_bias", "tied", "scale_embedding", "max_length",
)  # fmt: skip


@config
class VisualExpertConfig:
    """What makes tokens of the features; the expert's sizes are the decoder's."""

    adapter: ProjectorConfig | GLUConfig | ResamplerConfig
    kind: Literal["visual-expert"] = "visual-expert"
    qkv_bias: bool = False  # of the expert's queries, keys and values where the decoder's have none (CogVLM2)

    @property
    def note(self) -> str:
        return f"{self.adapter.note}; an expert in every block"

    def build(self) -> "VisualExpert":
        """The fusion of these settings."""
        return VisualExpert(self)


class Expert(nn.Module):
    """One set of a block's weights."""

    def __init__(self, cfg: DecoderConfig, qkv_bias: bool = False) -> None:
        super().__init__()
        bias = cfg.qkv_bias or qkv_bias
        narrow = (cfg.kv_heads or cfg.heads) * cfg.rotary_dim
        self.q = nn.Linear(cfg.width, cfg.heads * cfg.rotary_dim, bias=bias)
        self.k = nn.Linear(cfg.width, narrow, bias=bias)
        self.v = nn.Linear(cfg.width, narrow, bias=bias)
        self.o = nn.Linear(cfg.heads * cfg.rotary_dim, cfg.width, bias=cfg.out_bias)
        self.feedforward = GatedFeedForward(cfg.width, cfg.mlp, cfg.activation)
        self.qkv: PackedLinear | None = None  # the first three as one, once packed for inference

    def pack(self, kernels: bool = False) -> None:
        """Join queries, keys and values into one product; for inference, there is no way back."""
        self.qkv = PackedLinear((self.q, self.k, self.v))
        del self.q, self.k, self.v


class ExpertBlock(SelfBlock):
    """The decoder's own block for words, and `vision` for the rest; without pictures it is that block and no more."""

    plain = False

    def __init__(self, cfg: DecoderConfig, qkv_bias: bool = False) -> None:
        for each in fields(cfg):
            usual = each.default if each.default_factory is MISSING else each.default_factory()
            if each.name not in FOLLOWED and getattr(cfg, each.name) != usual:
                raise ConfigError(f"{each.name} = {getattr(cfg, each.name)!r} in a decoder with a visual expert")
        super().__init__(cfg)
        self.vision = Expert(cfg, qkv_bias)
        self.shared = cfg.heads // (cfg.kv_heads or cfg.heads)  # heads of queries for each of keys

    @torch.no_grad()
    def begin(self) -> None:
        """Make the expert what the words' own weights are, as CogVLM's begins; biases that they lack are zero."""
        own = self.attention.state_dict() | {f"feedforward.{k}": v for k, v in self.feedforward.state_dict().items()}
        for name, weight in self.vision.state_dict().items():
            weight.copy_(own[name]) if name in own else weight.zero_()

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        c, own, expert, split = context, self.attention, self.vision, context.split
        if not len(split.others):
            return super().forward(x, c, cache)
        rows = split.apply(self.norm1(x).flatten(0, 1), lambda h: joined(own, h), lambda h: joined(expert, h))
        heads = rows.view(*x.shape[:2], -1, own.head_dim).transpose(1, 2)
        narrow = heads.shape[1] // (self.shared + 2)
        q, k, v = heads.split([self.shared * narrow, narrow, narrow], dim=1)
        if c.rotary is not None:
            q, k = rotate(q, *c.rotary), rotate(k, *c.rotary)
        if cache is not None:
            stored = cache.append(k, v)
            if stored[0].shape[2] > k.shape[2]:  # else all of them are here already, in the precision they came in
                k, v = stored
        seen = attend(q.to(k.dtype), k, v, c.mask, c.causal, runs=c.runs).to(x.dtype)
        seen = chosen(seen.transpose(1, 2).flatten(2), c.rows)
        if c.rows is not None:
            split = split_by(c.layout.medium.flatten()[c.rows])
        x = chosen(x, c.rows)
        x = x + split.apply(seen.flatten(0, -2), own.o, expert.o).view_as(x)
        return x + split.apply(self.norm2(x).flatten(0, -2), self.feedforward, expert.feedforward).view_as(x)


def joined(maps: Attention | Expert, x: Tensor) -> Tensor:
    """Queries, keys and values of x [n, width] side by side."""
    return maps.qkv(x) if maps.qkv is not None else torch.cat(together(x, (maps.q, maps.k, maps.v)), dim=-1)


class VisualExpert(nn.Module):
    """Tokens of pictures in the sequence, and a decoder that reads them with weights of their own."""

    def __init__(self, cfg: VisualExpertConfig) -> None:
        super().__init__()
        self.config = cfg
        self.adapter = cfg.adapter.build()

    def num_tokens(self, grid: Grid) -> int:
        """How many slots of the sequence an item with this grid takes."""
        return self.adapter.num_tokens(grid)

    def forward(self, features: Patches) -> Bridge:
        """Features [n, inputs] to tokens [m, width]."""
        bridge: Bridge = self.adapter(features)
        return bridge

    def blocks(self, decoder: DecoderConfig) -> list[nn.Module]:
        """As many blocks as the decoder has, each with an expert."""
        return [ExpertBlock(decoder, self.config.qkv_bias) for _ in range(decoder.depth)]
