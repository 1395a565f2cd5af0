"""The Q-Former: queries in a BERT-like encoder look at the features in every second layer, and become the tokens.

- BLIP-2 (arXiv:2301.12597): the queries alone.
- InstructBLIP (arXiv:2305.06500): the instruction's words pass through the same self-attention with a feed-forward of
  their own, so that the queries know what is asked; only queries look at the features, and only they become tokens.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.config import config
from ..core.errors import ConfigError, InputError
from ..core.patches import Grid, Patches
from ..layers.attention import Attention
from ..layers.cross_attention import CrossAttention
from ..layers.feedforward import FeedForward
from .bridge import Bridge, TokenFusion, by_grid, learned


@config
class QFormerConfig:
    """Sizes and settings of a Q-Former."""

    inputs: int  # width of the features
    width: int  # width of the decoder
    kind: Literal["qformer"] = "qformer"
    queries: int = 32
    hidden: int = 768  # width of the queries
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    activation: str = "gelu"
    eps: float = 1e-12
    cross_every: int = 2  # the first of so many layers looks at the features
    vocab_size: int = 0  # words of an instruction; 0: it reads none
    max_length: int = 512  # tokens of an instruction

    def __post_init__(self) -> None:
        if min(self.queries, self.depth, self.heads, self.cross_every) < 1:
            raise ConfigError("a Q-Former's queries, depth, heads and cross_every are at least 1")
        if self.hidden % self.heads:
            raise ConfigError(f"a width of {self.hidden} cannot be shared by {self.heads} heads alike")

    @property
    def note(self) -> str:
        reads = ", reads the instruction" if self.vocab_size else ""
        return f"Q-Former of {self.queries} queries, {self.depth} layers, {self.heads} heads, {self.activation}{reads}"

    def build(self) -> "QFormer":
        """The Q-Former of these settings."""
        return QFormer(self)


class QFormerLayer(nn.Module):
    """Self-attention of queries and words, attention of queries to features, feed-forwards; a norm after each sum."""

    def __init__(self, cfg: QFormerConfig, crossing: bool) -> None:
        super().__init__()
        width, eps = cfg.hidden, cfg.eps
        self.attention = Attention(width, cfg.heads)
        self.norm = nn.LayerNorm(width, eps)
        self.cross = CrossAttention(width, cfg.heads, memory=cfg.inputs) if crossing else None
        self.cross_norm = nn.LayerNorm(width, eps) if crossing else None
        self.feedforward = FeedForward(width, cfg.mlp, cfg.activation)
        self.feedforward_norm = nn.LayerNorm(width, eps)
        self.words = FeedForward(width, cfg.mlp, cfg.activation) if cfg.vocab_size else None
        self.words_norm = nn.LayerNorm(width, eps) if cfg.vocab_size else None

    def forward(
        self, x: Tensor, queries: int, features: Tensor | None, mask: Tensor | None, text: "QFormerLayer | TextLayer"
    ) -> Tensor:
        """x [items, queries + words, width] to the same shape; features [items, n, inputs], None without queries.

        text: what has the feed-forward of words, if there are some.
        """
        x = self.norm(x + self.attention(x, mask))
        asked, words = x[:, :queries], x[:, queries:]
        if features is not None:
            if self.cross is not None and self.cross_norm is not None:
                asked = self.cross_norm(asked + self.cross(asked, features))
            asked = self.feedforward_norm(asked + self.feedforward(asked))
        if text.words is None or text.words_norm is None:
            return asked
        return torch.cat((asked, text.words_norm(words + text.words(words))), dim=1)


class TextLayer(nn.Module):
    """The feed-forward of words, with its norm, that a layer without one needs to read text."""

    def __init__(self, cfg: QFormerConfig) -> None:
        super().__init__()
        self.words = FeedForward(cfg.hidden, cfg.mlp, cfg.activation)
        self.words_norm = nn.LayerNorm(cfg.hidden, cfg.eps)


class QFormer(TokenFusion):
    """As many tokens an item as there are queries, whatever its grid."""

    def __init__(self, cfg: QFormerConfig) -> None:
        super().__init__()
        self.config = cfg
        self.queries = learned(cfg.queries, cfg.hidden)
        self.words = nn.Embedding(cfg.vocab_size, cfg.hidden) if cfg.vocab_size else None
        self.positions = nn.Embedding(cfg.max_length, cfg.hidden) if cfg.vocab_size else None
        self.norm = nn.LayerNorm(cfg.hidden, cfg.eps)
        self.layers = nn.ModuleList(QFormerLayer(cfg, i % cfg.cross_every == 0) for i in range(cfg.depth))
        self.out = nn.Linear(cfg.hidden, cfg.width)
        for table in (self.words, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def num_tokens(self, grid: Grid) -> int:
        """How many slots of the sequence an item with this grid takes."""
        return self.config.queries

    def forward(self, features: Patches, instruction: Tensor | None = None) -> Bridge:
        """Features [n, inputs] to tokens [items * queries, width].

        instruction: ids [items, length] of each item's text in this Q-Former's own vocabulary, -1 after the end of a
        shorter one; InputError where it reads one and gets none, or reads none and gets one.
        """
        if (instruction is not None) != (self.words is not None):
            raise InputError(
                "this Q-Former reads an instruction with each picture, none was given"
                if instruction is None
                else "this Q-Former reads no instruction, one was given"
            )
        if instruction is not None and instruction.shape[0] != len(features.grids):
            raise InputError(f"{len(instruction)} instructions for {len(features.grids)} pictures")
        if instruction is not None and instruction.shape[1] > self.config.max_length:
            raise InputError(
                f"an instruction of {instruction.shape[1]} tokens, this Q-Former reads {self.config.max_length}"
            )

        def compute(x: Tensor, grid: Grid, where: list[int]) -> Tensor:
            return self.ask(x, None if instruction is None else instruction[where])

        return Bridge(tokens=self.out(by_grid(features, compute)))

    def ask(self, features: Tensor, instruction: Tensor | None) -> Tensor:
        """Features [items, n, inputs] to queries [items, queries, hidden] after the last layer."""
        count = self.config.queries
        x, mask = self.queries.expand(len(features), -1, -1), None
        if instruction is not None and self.words is not None and self.positions is not None:
            words = self.words(instruction.clamp(min=0)) + self.positions.weight[: instruction.shape[1]]
            x = torch.cat((x, words), dim=1)
            mask = torch.cat((instruction.new_zeros(len(x), count), instruction), dim=1)[:, None, None] >= 0
        return self.through(x, features, mask, self.layers)[:, :count]

    def through(
        self, x: Tensor, features: Tensor | None, mask: Tensor | None, text: Iterable[QFormerLayer | TextLayer]
    ) -> Tensor:
        """Queries and then words [items, queries + words, hidden] after the last layer, by who sees whom.

        Without features all are words. text: for each layer what has the feed-forward of words.
        """
        count = 0 if features is None else self.config.queries
        x = self.norm(x) if features is None else self.norm(x).to(features.dtype)
        for layer, own in zip(self.layers, text, strict=True):
            x = layer(x, count, features, mask, own)
        return x
