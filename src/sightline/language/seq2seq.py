"""An encoder and a decoder of text that looks at it: T5 (arXiv:1910.10683) and FlanT5 (arXiv:2210.11416).

RMSNorm before each branch, no biases, products of queries and keys as they are, and in their place of positions a bias
by distance that all blocks of a side share.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import config
from ..core.errors import ConfigError
from ..core.layout import Layout, visible
from ..layers.attention import Attention, attend
from ..layers.cross_attention import CrossAttention
from ..layers.feedforward import FeedForward, GatedFeedForward
from ..layers.linear import working_precision
from ..layers.norms import RMSNorm
from ..layers.scores import HIDDEN, Scores
from .cache import Cache, LayerCache


@config
class Seq2SeqConfig:
    """Sizes and settings of an encoder and a decoder."""

    vocab_size: int
    width: int
    encoder_depth: int
    decoder_depth: int
    heads: int
    head_dim: int
    mlp: int
    activation: str = "gelu_tanh"
    gated: bool = True  # gate, up, down instead of up, down
    eps: float = 1e-6
    buckets: int = 32  # distances that are told apart
    farthest: int = 128  # from here on all are one
    tied: bool = False  # the head is the embedding table, and reads hidden states times 1 / sqrt(width)

    def __post_init__(self) -> None:
        if min(self.vocab_size, self.width, self.heads, self.head_dim, self.mlp) < 1:
            raise ConfigError("the sizes of an encoder and a decoder are at least 1")
        if self.buckets % 4 or not 0 < self.buckets // 2 < self.farthest:
            raise ConfigError(f"{self.buckets} buckets of distances up to {self.farthest}, expected 4, 8, 12, ...")


@dataclass(frozen=True)
class Memory:
    """What a decoder looks at: vectors [batch, length, width] and the layout of their tokens."""

    values: Tensor
    layout: Layout


class MemoryCache(Cache):
    """A cache that also holds keys and values of a memory, which are made once."""

    def __init__(self, depth: int, capacity: int = 0, dtype: torch.dtype | None = None) -> None:
        super().__init__(depth, capacity, dtype)
        self.crossed = [LayerCache(0, dtype) for _ in range(depth)]

    def keep(self, rows: Tensor) -> "MemoryCache":
        kept, out = super().keep(rows), MemoryCache(0)
        out.layers, out.layout, out.first = kept.layers, kept.layout, kept.first
        out.crossed = [layer.rows(rows) for layer in self.crossed]
        return out

    def cut(self, length: int) -> "MemoryCache":
        short, out = super().cut(length), MemoryCache(0)
        out.layers, out.layout, out.first = short.layers, short.layout, short.first
        out.crossed = self.crossed
        return out


class DistanceBias(nn.Module):
    """What is added to scores by the distance of key and query, for each head; far ones share theirs."""

    def __init__(self, cfg: Seq2SeqConfig, ahead: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(cfg.buckets, cfg.heads)
        self.ahead, self.farthest = ahead, cfg.farthest

    def buckets(self, distance: Tensor) -> Tensor:
        """The row of the table for key minus query: exact for near ones, then in steps that grow like a logarithm."""
        count = self.table.num_embeddings
        start = torch.zeros_like(distance)
        if self.ahead:  # half of the table is for keys that come later
            count //= 2
            start = (distance > 0) * count
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = count // 2
        share = (distance.clamp(min=exact).float() / exact).log() / math.log(self.farthest / exact)
        far = exact + (share * (count - exact)).long()
        return start + torch.where(distance < exact, distance, far.clamp(max=count - 1))

    def forward(self, query: Layout, key: Layout, seen: Tensor) -> Tensor:
        """What is added to scores [batch, heads, queries, keys]; seen [batch, queries, keys]."""
        distance = key.position[:, None, :] - query.position[:, :, None]
        return self.table(self.buckets(distance)).permute(0, 3, 1, 2).masked_fill(~seen[:, None], HIDDEN)


class MemoryAttention(CrossAttention):
    """Attention of tokens to a memory, whose keys and values the cache holds; products are not scaled."""

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor, cache: LayerCache | None) -> Tensor:
        """x [batch, length, width]; mask [batch, 1, length or 1, memory length], True where it is seen."""
        if cache is not None and cache.key is not None and cache.value is not None:
            k, v = cache.key, cache.value
        else:
            k, v = self.heads(self.k(memory)), self.heads(self.v(memory))
            if cache is not None:
                k, v = cache.append(k, v)
        out = attend(self.heads(self.q(x)).to(k.dtype), k, v, mask, False, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2).to(x.dtype))


class TextBlock(nn.Module):
    """Self-attention, in a decoder a look at the memory, and feed-forward, a norm before each."""

    def __init__(self, cfg: Seq2SeqConfig, looks: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(cfg.width, cfg.eps)
        sizes = cfg.width, cfg.heads, cfg.heads, cfg.head_dim
        self.attention = Attention(*sizes, qkv_bias=False, out_bias=False, scores=Scores(scale=1.0))
        self.norm_cross = RMSNorm(cfg.width, cfg.eps) if looks else None
        self.cross = MemoryAttention(cfg.width, cfg.heads, cfg.head_dim, bias=False) if looks else None
        self.norm2 = RMSNorm(cfg.width, cfg.eps)
        branch = GatedFeedForward if cfg.gated else FeedForward
        self.feedforward = branch(cfg.width, cfg.mlp, cfg.activation, bias=False)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        looked: LayerCache | None = None,
    ) -> Tensor:
        x = x + self.attention(self.norm1(x), bias, cache=cache)
        if self.cross is not None and self.norm_cross is not None:
            assert memory is not None and mask is not None
            x = x + self.cross(self.norm_cross(x), memory, mask, looked)
        return x + self.feedforward(self.norm2(x))


class Seq2Seq(nn.Module):
    """One table of words, an encoder of text that sees itself whole, a decoder that looks at it, a head."""

    def __init__(self, cfg: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.encoder_bias = DistanceBias(cfg, ahead=True)
        self.encoder_blocks = nn.ModuleList(TextBlock(cfg, looks=False) for _ in range(cfg.encoder_depth))
        self.encoder_norm = RMSNorm(cfg.width, cfg.eps)
        self.bias = DistanceBias(cfg, ahead=False)
        self.blocks = nn.ModuleList(TextBlock(cfg, looks=True) for _ in range(cfg.decoder_depth))
        self.norm = RMSNorm(cfg.width, cfg.eps)
        self.head = None if cfg.tied else nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        self.reset()

    def reset(self) -> None:
        """Random start: every map keeps the size of what it reads; queries are small, as products are not scaled."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                std = 1.0 if name == "embedding.weight" else parameter.shape[1] ** -0.5
                if name.endswith(".q.weight"):
                    std *= self.config.head_dim**-0.5
                nn.init.normal_(parameter, std=std)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [batch, length] to vectors [batch, length, width]."""
        out: Tensor = self.embedding(ids)
        return out

    def new_cache(self, capacity: int = 0) -> MemoryCache:
        """An empty cache."""
        return MemoryCache(len(self.blocks), capacity)

    def encode(self, x: Tensor, layout: Layout) -> Memory:
        """Vectors [batch, length, width] as a memory; every token of a document sees all of it."""
        x = working_precision(x)
        whole = replace(layout, block=torch.zeros_like(layout.block), causal=False)
        bias = self.encoder_bias(whole, whole, visible(whole, whole)).to(x.dtype)
        for block in self.encoder_blocks:
            x = block(x, bias)
        return Memory(self.encoder_norm(x), layout)

    def forward(self, x: Tensor, layout: Layout, memory: Memory, cache: MemoryCache | None = None) -> Tensor:
        """Vectors [batch, length, width] of text to be written to normed hidden states of the same shape."""
        x = working_precision(x)
        keys = cache.read(layout) if cache else layout
        bias = self.bias(layout, keys, visible(layout, keys)).to(x.dtype)
        theirs = memory.layout.document[:, None, :]
        mask = ((layout.document[:, :, None] == theirs) & (theirs >= 0))[:, None]
        for i, block in enumerate(self.blocks):
            kept = (cache.layers[i], cache.crossed[i]) if cache else (None, None)
            x = block(x, bias, memory.values, mask, *kept)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary in float32, [..., vocab_size]."""
        if self.head is not None:
            return self.head(hidden.to(self.dtype)).float()
        table = self.embedding.weight
        return F.linear((hidden * self.config.width**-0.5).to(table.dtype), table).float()
