"""The loss of a stage on samples of other sources than those it learns from: the same ones at every look."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from ..core.errors import ConfigError
from ..data.batch import Batch
from ..data.processor import Processor
from .loader import Batches, assemble
from .objectives import Term
from .recipe import Source, Stage
from .settings import COMPARES


class Validation:
    """The first `eval_samples` of a stage's `eval_data`, each row of a file once; of an endless source later ones.

    Those are beyond what the stage would learn from, were the source in its `data` as well. ConfigError where the
    objective compares the samples of a batch and there are not enough for one.
    """

    def __init__(
        self, stage: Stage, number: int, seed: int, sources: Mapping[str, Source], processor: Processor
    ) -> None:
        self.data = Batches(stage.validated, number, seed, sources, processor)
        total = stage.steps * stage.accumulate * stage.batch
        self.places: list[tuple[str, int, int]] = []  # source, place in it, and number among all of the stage
        for index in range(stage.eval_samples):
            name, place = self.data.mixture(index)
            if (length := self.data.lengths[name]) is None or place < length:
                self.places.append((name, place, total + index))
        self.together = stage.batch if COMPARES & set(stage.terms) else 0  # which are only learned from so many at once
        if (count := len(self.places)) < max(self.together, 1):
            expected = f"expected {max(self.together, 1)} at least"
            raise ConfigError(f"stage {stage.name!r}: eval_data has {count} samples, {expected}")
        if self.together:
            del self.places[count - count % self.together :]

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples, so many at a time; those of a batch that are compared stay together."""
        size = self.together or size
        for low in range(0, len(self.places), size):
            made = [replace(self.data.made_from(*at), source=at[0]) for at in self.places[low : low + size]]
            # packed or not, the loss is the same
            yield assemble(made, self.data.processor, self.data.form, asks=self.data.asks)


@torch.no_grad()
def mean_terms(batches: Iterable[Batch], terms: Callable[[Batch], Mapping[str, Term]]) -> dict[str, float]:
    """Every term of the loss over some batches, divided once by how much there was of it in all of them."""
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in batches:
        for name, (total, count) in terms(batch).items():
            totals[name] = totals.get(name, 0.0) + float(total)
            counts[name] = counts.get(name, 0) + count
    return {name: total / max(counts[name], 1) for name, total in totals.items()}


@contextmanager
def evaluating(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context nothing is left out by chance; afterwards every module is as it was."""
    before = [(module, module.training) for part in parts for module in part.modules()]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
