"""What a step is to every block of a decoder: who sees whom, where tokens stand, what each of them carries.

A block is called with x [batch, length, width], the context and the cache of its layer, and gives the same shape; with
`Context.rows`, only those tokens [n, width].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..core.layout import Layout, Medium, Run
from ..core.memory import Memory
from ..layers.scores import Places


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


@dataclass(frozen=True)
class Context:
    """What every block needs, computed once per step.

    mask: [batch, 1, queries, keys], True where seen; None where `causal` or nothing is hidden.
    rotary: cosines and sines [batch, 1, queries, rotary_dim]; None where positions are none or in the input.
    memory: what cross-attention blocks look at, with the values that are new in this step.
    looks: [batch, 1, queries, keys of the memory], True where one is looked at; for a blind token all of them.
    blind: [batch, queries, 1], True for a token that looks at nothing of the memory.
    rows: in the last block, the tokens [n] that are asked for, counted through the batch.
    places: the layouts of queries and keys, where positions have a say in attention's scores.
    runs: the documents of packed rows, where attention to each by itself is less work.
    """

    layout: Layout
    mask: Tensor | None
    causal: bool
    rotary: tuple[Tensor, Tensor] | None
    memory: Memory | None = None
    looks: Tensor | None = None
    blind: Tensor | None = None
    rows: Tensor | None = None
    places: Places | None = None
    runs: tuple[Run, ...] | None = None

    @cached_property
    def split(self) -> Split:
        """The step's tokens by what they carry, for blocks that have weights for each; made when first asked for."""
        return split_by(self.layout.medium.flatten())
