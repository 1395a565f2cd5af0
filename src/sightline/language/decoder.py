"""One decoder whose settings are LLaMA/Vicuna, Qwen2 and Gemma; its blocks are given, so it never imports fusion.

- LLaMA (arXiv:2302.13971): RMSNorm before each branch, half-split rotary positions, SwiGLU, no biases.
- Qwen2 (arXiv:2407.10671): the same with biases on queries, keys and values.
- Gemma (arXiv:2403.08295): norm weights stored minus one, tanh-GELU gate, embeddings times sqrt(width), tied head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import config
from ..core.errors import ConfigError
from ..core.layout import Layout, Medium, visible
from ..core.memory import Memory
from ..layers.attention import Attention, KeyValueStore, chosen
from ..layers.feedforward import GatedFeedForward
from ..layers.linear import working_precision
from ..layers.native import MOST_ROWS
from ..layers.norms import RMSNorm
from ..layers.rotary import rotary_table
from .cache import Cache, LayerCache
from .stepper import Stepper


@config
class DecoderConfig:
    """Sizes and settings of a decoder."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: width / heads
    activation: str = "silu"
    eps: float = 1e-6
    norm_offset: bool = False  # norm weights are stored as their difference from one
    rope_theta: float = 10_000.0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # a norm over each head of queries and keys (arXiv:2302.05442)
    tied: bool = False  # the head is the embedding table
    scale_embedding: bool = False  # embeddings times sqrt(width)
    max_length: int = 2048  # tokens of context the model was trained for
    extra_vocab: int = 0  # ids after vocab_size whose rows are parameters of their own, to be learned alone (IDEFICS)

    def __post_init__(self) -> None:
        kv_heads = self.kv_heads or self.heads
        if min(self.vocab_size, self.width, self.heads, kv_heads, self.mlp, self.extra_vocab + 1) < 1:
            raise ConfigError("a decoder's sizes are at least 1, extra_vocab at least 0")
        if self.heads % kv_heads:
            raise ConfigError(f"{self.heads} heads cannot share {kv_heads} heads of keys alike")
        if self.rotary_dim % 2:
            raise ConfigError(f"heads of {self.rotary_dim} numbers cannot be turned in pairs, expected an even number")

    @property
    def rotary_dim(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def total_vocab(self) -> int:
        """How many ids there are in all."""
        return self.vocab_size + self.extra_vocab


@dataclass(frozen=True)
class Context:
    """What every block needs, computed once per step.

    mask: [batch, 1, queries, keys], True where seen; None where `causal` or nothing is hidden.
    rotary: cosines and sines [batch, 1, queries, head_dim].
    memory: what cross-attention blocks look at, with the values that are new in this step.
    looks: [batch, 1, queries, keys of the memory], True where one is looked at; for a blind token all of them.
    blind: [batch, queries, 1], True for a token that looks at nothing of the memory.
    rows: in the last block, the tokens [n] that are asked for, counted through the batch.
    """

    layout: Layout
    mask: Tensor | None
    causal: bool
    rotary: tuple[Tensor, Tensor] | None
    memory: Memory | None = None
    looks: Tensor | None = None
    blind: Tensor | None = None
    rows: Tensor | None = None

    @cached_property
    def split(self) -> "Split":
        """The step's tokens by what they carry, for blocks that have weights for each; made when first asked for."""
        return split_by(self.layout.medium.flatten())


@dataclass(frozen=True)
class Split:
    """Tokens [n] that carry text and those that carry something else, and how both together come back into order."""

    words: Tensor
    others: Tensor
    order: Tensor

    def apply(self, x: Tensor, to_words: Callable[[Tensor], Tensor], to_others: Callable[[Tensor], Tensor]) -> Tensor:
        """x [n, width] through one map or the other, each of them once; a map that no token needs is not touched."""
        if not len(self.others):
            return to_words(x)
        if not len(self.words):
            return to_others(x)
        return torch.cat((to_words(x[self.words]), to_others(x[self.others])))[self.order]


def split_by(medium: Tensor) -> Split:
    """Tokens with these media [n], apart."""
    text = medium == Medium.TEXT
    words, others = text.nonzero()[:, 0], (~text).nonzero()[:, 0]
    return Split(words, others, torch.cat((words, others)).argsort())


class Block(Protocol):
    """What the decoder asks of a block."""

    def __call__(self, x: Tensor, context: Context, cache: KeyValueStore | None) -> Tensor:
        """x [batch, length, width] to the same shape, or with `context.rows` to those tokens [n, width]."""
        ...


class SelfBlock(nn.Module):
    """Self-attention and gated feed-forward, a norm before each."""

    plain = True  # it does nothing that `Stepper` does not know

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(cfg.width, cfg.eps, cfg.norm_offset)
        self.attention = Attention(
            cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.qkv_bias, cfg.out_bias, cfg.qk_norm
        )
        self.norm2 = RMSNorm(cfg.width, cfg.eps, cfg.norm_offset)
        self.feedforward = GatedFeedForward(cfg.width, cfg.mlp, cfg.activation)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        c = context
        seen = self.attention(self.norm1(x), c.mask, c.causal, c.rotary, cache, c.rows)
        x = chosen(x, c.rows) + seen
        return x + self.feedforward(self.norm2(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, cfg: DecoderConfig, blocks: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        self.config = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.blocks = nn.ModuleList(plain_blocks(cfg) if blocks is None else blocks)
        self.norm = RMSNorm(cfg.width, cfg.eps, cfg.norm_offset)
        self.head = None if cfg.tied else nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        self.extra_embedding = nn.Embedding(cfg.extra_vocab, cfg.width) if cfg.extra_vocab else None
        split = cfg.extra_vocab and not cfg.tied
        self.extra_head = nn.Linear(cfg.width, cfg.extra_vocab, bias=False) if split else None
        self.stepper: Stepper | None = None  # how single tokens are written, once prepared for inference
        self.kept: torch.dtype | None = None  # precision of keys and values in a cache; None: their own
        self.reset()

    def reset(self) -> None:
        """Random start: every map keeps the size of what it reads, branches add up to the size of the stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                table = name.removeprefix("extra_") in ("embedding.weight", "head.weight")
                std = 0.02 if table and not self.config.scale_embedding else parameter.shape[1] ** -0.5
                if name.endswith(("o.weight", "down.weight")):
                    std *= (2 * len(self.blocks)) ** -0.5
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [batch, length] to vectors [batch, length, width]."""
        if self.extra_embedding is None:
            x = self.embedding(ids)
        else:
            extra = ids - self.config.vocab_size
            rows = self.embedding(ids.clamp(max=self.config.vocab_size - 1))
            x = torch.where((extra >= 0)[..., None], self.extra_embedding(extra.clamp(min=0)), rows)
        if self.config.scale_embedding:  # the factor is rounded to the weights' precision, as Gemma's code does
            x = x * torch.tensor(self.config.width**0.5, dtype=x.dtype)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary in float32, [..., total_vocab]."""
        scores = self._scores(hidden)
        if self.extra_embedding is None:
            return scores
        x = hidden.to(self.dtype)
        extra = F.linear(x, self.extra_embedding.weight) if self.extra_head is None else self.extra_head(x)
        return torch.cat((scores, extra.float()), dim=-1)

    def _scores(self, hidden: Tensor) -> Tensor:
        if self.stepper is not None and hidden.shape[:-1].numel() <= MOST_ROWS:
            return self.stepper.head(hidden.float())
        if self.head is not None:
            return self.head(hidden.to(self.dtype)).float()
        return F.linear(hidden, self.embedding.weight.to(hidden.dtype)).float()

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def new_cache(self, capacity: int = 0) -> Cache:
        """An empty cache."""
        return Cache(len(self.blocks), capacity, self.kept)

    def context(self, layout: Layout, keys: Layout, memory: Memory | None, dtype: torch.dtype) -> Context:
        """Masks and rotary tables of one step."""
        cos, sin = rotary_table(layout.position, self.config.rotary_dim, self.config.rope_theta, dtype)
        rotary = cos[:, None], sin[:, None]
        looks = blind = None
        if memory is not None:
            looks = memory.looks(layout)
            blind = ~looks.any(dim=2, keepdim=True)
            looks = (looks | blind)[:, None]  # a softmax over nothing is not a number
        if keys.causal and (layout.length == keys.length or layout.length == 1):
            return Context(layout, None, layout.length > 1, rotary, memory, looks, blind)
        return Context(layout, visible(layout, keys)[:, None], False, rotary, memory, looks, blind)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        memory: Memory | None = None,
        cache: Cache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Vectors [batch, length, width] to normed hidden states of the same shape.

        rows: the tokens [n] that are asked for, counted through the batch; then [n, width], and what the last block
        does to a token once it has been attended to is done to these only.
        """
        x = working_precision(x)
        keys = cache.read(layout) if cache else layout
        memory = cache.remember(memory, layout) if cache else memory
        context = self.context(layout, keys, memory, x.dtype)
        if self.stepper is not None and cache is not None and self.stepper.takes(x, cache):
            assert context.rotary is not None
            return chosen(self.stepper.step(x, context.rotary, context.mask, cache), rows)
        for i, block in enumerate(self.blocks):
            if rows is not None and i == len(self.blocks) - 1:
                context = replace(context, rows=rows)
            x = block(x, context, cache.layers[i] if cache else None)
        return self.norm(x)


def plain_blocks(cfg: DecoderConfig) -> list[nn.Module]:
    """The blocks of a decoder that nothing is fused into."""
    return [SelfBlock(cfg) for _ in range(cfg.depth)]
