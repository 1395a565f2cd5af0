"""Batches of a stage: batch k is a pure function of (seed, stage, k), whoever makes it and wherever a run resumes."""

import random
from collections.abc import Generator, Mapping

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.batch import Batch, Example, collate
from ..data.processor import Processor
from .preferences import preferred
from .recipe import Source, Stage, check_sources
from .settings import FROM_PAIRS
from .signals import leave_to_parent
from .sources import Sample


class Batches(Dataset[Batch]):
    """The micro-batches of one stage, by their number."""

    def __init__(
        self, stage: Stage, number: int, seed: int, sources: Mapping[str, Source], processor: Processor
    ) -> None:
        self.form = check_sources(stage, sources)
        self.stage, self.number, self.seed = stage, number, seed
        self.sources, self.processor = sources, processor

    def __len__(self) -> int:
        return self.stage.steps * self.stage.accumulate

    def __getitem__(self, k: int) -> Batch:
        if k >= len(self):
            raise IndexError(k)
        samples = [self.sample(k * self.stage.batch + j) for j in range(self.stage.batch)]
        return assemble(samples, self.processor, self.form)

    def sample(self, index: int) -> Sample:
        """Sample `index` of the stage: a source drawn by its weight, asked for that index."""
        names, weights = list(self.stage.data), list(self.stage.data.values())
        chosen = names[0]
        if len(names) > 1:
            chosen = random.Random(f"{self.seed} {self.number} {index}").choices(names, weights)[0]
        return self.sources[chosen](self.seed, 0, index)


def assemble(samples: list[Sample], processor: Processor, form: str) -> Batch:
    """Samples as one batch of a form of `READS`; pictures without a conversation become patches without text."""
    if form in FROM_PAIRS:
        return preferred(samples, processor, form)
    examples = [processor.branches(s.conversation) if s.conversation else _picture(s, processor) for s in samples]
    batch = collate(examples, processor.patch, processor.tokenizer.control(processor.tokenizer.pad))
    extra = {"names": [sample.name for sample in samples]}
    if samples[0].dense:
        extra["dense"] = {k: torch.from_numpy(np.stack([s.dense[k] for s in samples])) for k in samples[0].dense}
    if samples[0].caption:
        extra["captions"] = _captions([s.caption for s in samples], processor)
    return Batch(batch.ids, batch.layout, batch.slots, batch.patches, batch.labels, extra)


def _picture(sample: Sample, processor: Processor) -> Example:
    assert sample.image is not None
    pixels, transform = processor.pixels(sample.image.picture)
    none = torch.zeros(0, dtype=torch.int64)
    return Example(none, none, none, none, none, none, none, none, (pixels,), (transform,))


def _captions(texts: list[str], processor: Processor) -> torch.Tensor:
    """Caption ids [batch, longest], padded on the right."""
    rows = [processor.tokenizer.encode(" " + text) for text in texts]
    out = torch.full((len(rows), max(map(len, rows))), processor.tokenizer.control(processor.tokenizer.pad))
    for row, ids in enumerate(rows):
        out[row, : len(ids)] = torch.tensor(ids)
    return out


def batches(data: Batches, start: int, workers: int) -> Generator[Batch, None, None]:
    """Micro-batches from number `start` on, made ahead of time by `workers` processes, in order.

    Close it when it is left early: the processes end with it, whoever still holds the error that ended it.
    """
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(start, len(data)),  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread if workers else None,
    )
    source = iter(loader)
    try:
        yield from source
    finally:
        if workers:  # what fails in one of them holds on to the loader, and they, deaf to signals, would be waited for
            source._shutdown_workers()  # type: ignore[attr-defined]


def _one_thread(worker: int) -> None:
    """A worker that shares the machine with a training step must not start threads of its own."""
    torch.set_num_threads(1)
    leave_to_parent()
