"""An encoder and a decoder of text that looks at it.

- T5 (arXiv:1910.10683): RMSNorm before each branch, no biases, products of queries and keys as they are, and in the
  place of positions a bias by distance that all blocks of a side share; ReLU, the head is the table.
- FlanT5 (arXiv:2210.11416): a tanh-GELU gate, a head of its own.
- UL2 (arXiv:2205.05131), and PaLI-X, which begins from a larger one: the same with a SiLU gate.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import config
from ..core.errors import ConfigError
from ..core.layout import Layout, visible
from ..core.memory import Memory
from ..layers.attention import Attention, chosen
from ..layers.cross_attention import MemoryAttention
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
    kind: Literal["seq2seq"] = "seq2seq"
    activation: str = "gelu_tanh"
    gated: bool = True  # gate, up, down instead of up, down
    eps: float = 1e-6
    buckets: int = 32  # distances that are told apart
    farthest: int = 128  # from here on all are one
    tied: bool = False  # the head is the embedding table, and reads hidden states times 1 / sqrt(width)
    start_id: int = 0  # what is written begins with it
    max_length: int = 512  # tokens that either side was trained for

    def __post_init__(self) -> None:
        if min(self.vocab_size, self.width, self.heads, self.head_dim, self.mlp, self.max_length) < 1:
            raise ConfigError("the sizes of an encoder and a decoder are at least 1")
        if self.buckets % 4 or not 0 < self.buckets // 2 < self.farthest:
            raise ConfigError(f"{self.buckets} buckets of distances up to {self.farthest}, expected 4, 8, 12, ...")
        if not 0 <= self.start_id < self.vocab_size:
            raise ConfigError(f"start_id is {self.start_id}, expected an id from 0 to {self.vocab_size - 1}")

    @property
    def total_vocab(self) -> int:
        """How many ids there are in all."""
        return self.vocab_size

    @property
    def depth(self) -> int:
        """Blocks of the side that writes."""
        return self.decoder_depth

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads

    @property
    def head_size(self) -> int:
        """Numbers of one head."""
        return self.head_dim


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


class TextBlock(nn.Module):
    """Self-attention, in a decoder a look at the memory, and feed-forward, a norm before each."""

    def __init__(self, cfg: Seq2SeqConfig, looks: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(cfg.width, cfg.eps)
        sizes = cfg.width, cfg.heads, cfg.heads, cfg.head_dim
        self.attention = Attention(*sizes, qkv_bias=False, out_bias=False, scores=Scores(scale=1.0))
        self.norm_cross = RMSNorm(cfg.width, cfg.eps) if looks else None
        self.cross = MemoryAttention(cfg.width, cfg.heads, cfg.head_dim, bias=False, scale=1.0) if looks else None
        self.norm2 = RMSNorm(cfg.width, cfg.eps)
        branch = GatedFeedForward if cfg.gated else FeedForward
        self.feedforward = branch(cfg.width, cfg.mlp, cfg.activation, bias=False)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        memory: Tensor | None = None,
        looks: Tensor | None = None,
        caches: tuple[LayerCache | None, LayerCache | None] = (None, None),
        rows: Tensor | None = None,
    ) -> Tensor:
        """x [batch, length, width] to the same shape; memory and looks as in `MemoryAttention`.

        caches: of tokens and of the memory. rows: the tokens [n] that are asked for, counted through the batch; then
        [n, width].
        """
        x = x + self.attention(self.norm1(x), bias, cache=caches[0])
        if self.cross is not None and self.norm_cross is not None:
            x = x + self.cross(self.norm_cross(x), memory, looks, caches[1])
        x = chosen(x, rows)
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

    def new_cache(self, capacity: int = 0) -> Cache:
        """An empty cache; of each block's two the second is for the memory."""
        return Cache(2 * len(self.blocks), capacity)

    def encode(self, x: Tensor, layout: Layout) -> Memory:
        """Vectors [batch, length, width] as a memory; every token of a document sees all of it."""
        x = working_precision(x)
        whole = replace(layout, block=torch.zeros_like(layout.block), causal=False)
        bias = self.encoder_bias(whole, whole, visible(whole, whole)).to(x.dtype)
        for block in self.encoder_blocks:
            x = block(x, bias)
        return Memory(layout.document, torch.zeros_like(layout.item), self.encoder_norm(x), latest=False)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        memory: Memory | None = None,
        cache: Cache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Vectors [batch, length, width] of what is written to normed hidden states of the same shape.

        memory: what was read; with a cache it comes once, with the first tokens. rows: the tokens [n] that are asked
        for, counted through the batch; then [n, width].
        """
        x = working_precision(x)
        keys = cache.read(layout) if cache else layout
        memory = cache.remember(memory, layout) if cache else memory
        if memory is None:
            raise ValueError("an encoder-decoder writes about what it has read, and it has read nothing")
        bias = self.bias(layout, keys, visible(layout, keys)).to(x.dtype)
        looks = memory.looks(layout)
        looks = (looks | ~looks.any(dim=2, keepdim=True))[:, None]  # a softmax over nothing is not a number
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            caches = (cache.layers[2 * i], cache.layers[2 * i + 1]) if cache else (None, None)
            x = block(x, bias, memory.values, looks, caches, rows if i == last else None)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary in float32, [..., vocab_size]."""
        if self.head is not None:
            return self.head(hidden.to(self.dtype)).float()
        table = self.embedding.weight
        return F.linear((hidden * self.config.width**-0.5).to(table.dtype), table).float()
