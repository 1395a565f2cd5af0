"""Batches of a stage: batch k is a pure function of (seed, stage, k), whoever makes it and wherever a run resumes."""

import random
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..core.errors import CapacityError, ConfigError, DataError, InputError, SightlineError
from ..data.batch import Batch, Example, collate, pack, row_length, sizes_of
from ..data.mix import Mixture, permuted
from ..data.processor import Processor
from .preferences import preferred
from .recipe import Source, Stage, check_sources
from .settings import FROM_PAIRS
from .signals import leave_to_parent
from .sources import FilesSource, Sample, opened

HELD = 32  # samples that a stage with a guard holds out
TRIES = 16  # samples that are looked at in place of one that cannot be used


@dataclass(frozen=True)
class Made:
    """A sample with what the model reads of it, and what is wrong with those that were passed over for it."""

    sample: Sample
    example: Example
    passed: tuple[str, ...] = ()


class Batches(Dataset[Batch]):
    """The micro-batches of one stage, by their number.

    A sample that cannot be used is replaced by another of its source, which one is a pure function as well. With
    `group`, so many batches share out their samples by length, so that each holds some of about the same.
    """

    def __init__(
        self, stage: Stage, number: int, seed: int, sources: Mapping[str, Source], processor: Processor
    ) -> None:
        self.form = check_sources(stage, sources)
        self.stage, self.number, self.seed = stage, number, seed
        self.sources, self.processor = sources, processor
        self.mixture = Mixture(stage.data)
        opened.cache_clear()  # files may have changed since another run
        self.lengths = {name: length_of(name, sources[name]) for name in stage.data}
        self.kept: dict[str, int] = {}  # rows of each file at the end of its first order, which are never learned from
        if stage.guard_every:
            self.kept = {name: min(HELD, length // 10) for name, length in self.lengths.items() if length}
            self.lengths = {name: length and length - self.kept.get(name, 0) for name, length in self.lengths.items()}

    def __len__(self) -> int:
        return self.stage.steps * self.stage.accumulate

    def __getitem__(self, k: int) -> Batch:
        if k >= len(self):
            raise IndexError(k)
        group = self.stage.group
        return self.__getitems__(range(k - k % group, min(k - k % group + group, len(self))))[k % group]

    def __getitems__(self, numbers: Sequence[int]) -> list[Batch]:
        """The batches of a whole group, whose samples are made once (torch's loader calls this by its name)."""
        size = self.stage.batch
        made = [self.made(k * size + j) for k in numbers for j in range(size)]
        if len(numbers) > 1:
            made.sort(key=lambda each: each.example.length)
        parts = [made[i : i + size] for i in range(0, len(made), size)]
        # else every group would end with its longest
        random.Random(f"{self.seed} {self.number} {numbers[0]}").shuffle(parts)
        return [assemble(part, self.processor, self.form, self.stage.packing) for part in parts]

    def sample(self, index: int) -> Sample:
        """Sample `index` of the stage."""
        return self.made(index).sample

    def made(self, index: int) -> Made:
        """Sample `index`: the mixture says of which source; an endless one is asked for the index itself."""
        name, place = self.mixture(index)
        source, length = self.sources[name], self.lengths[name]
        if length is None:
            sample = source(self.seed, 0, index)
            return Made(sample, example_of(sample, self.processor))
        epoch, place = divmod(place, length)
        passed: list[str] = []
        for attempt in range(TRIES):
            where = permuted(place, length, f"{self.seed} {epoch} {attempt}") if attempt else place
            told = ""
            try:
                sample = self._row(name, epoch, where)
                told = f"{sample.name}: "
                return Made(sample, example_of(sample, self.processor), tuple(passed))
            except (DataError, InputError, CapacityError) as error:
                passed.append(f"{told}{error}")
        raise DataError(f"source {name!r}: {TRIES} samples in a row cannot be used; the last is {passed[-1]}")

    def _row(self, name: str, epoch: int, place: int) -> Sample:
        """A sample of a file; where some are held out, every epoch is another order of the others."""
        source, length = self.sources[name], self.lengths[name]
        if not self.kept.get(name):
            return source(self.seed, epoch, place)
        assert length is not None
        return source(self.seed, 0, permuted(place, length, f"{self.seed} {epoch} held") if epoch else place)

    def held(self) -> list[Sample]:
        """Samples that the stage never learns from, in the shares of its mixture: of files few, else later ones."""
        found, taken, total = [], Counter[str](), len(self) * self.stage.batch
        for index in range(total, total + HELD):
            name, _ = self.mixture(index)
            length, place = self.lengths[name], taken[name]
            if length is not None and place >= self.kept[name]:
                continue
            taken[name] += 1
            with suppress(DataError, InputError):
                found.append(self.sources[name](self.seed, 0, index if length is None else length + place))
        return found


def length_of(name: str, source: Source) -> int | None:
    """How many samples a source has, None without end; ConfigError where it names no file yet."""
    if isinstance(source, FilesSource) and not source.path:
        raise ConfigError(f"source {name!r} names no file; set sources.{name}.path=FILE")
    return source.length


def example_of(sample: Sample, processor: Processor) -> Example:
    """What the model reads of a sample, of a pair its prompt."""
    if not sample.conversation:
        return _picture(sample, processor)
    return processor.branches(sample.conversation) if sample.branches else processor(sample.conversation)


def assemble(made: Sequence[Made], processor: Processor, form: str, packing: int = 0) -> Batch:
    """Samples as one batch of a form of `READS`; pictures without a conversation become patches without text.

    packing: the most tokens of a row that several conversations share; 0: each has a row of its own.
    """
    examples, samples = [each.example for each in made], [each.sample for each in made]
    passed = [line for each in made for line in each.passed]
    pad = processor.tokenizer.control(processor.tokenizer.pad)
    if form in FROM_PAIRS:
        batch = preferred(samples, processor, form)
        return replace(batch, extra=batch.extra | {"passed": passed})
    if packing:
        sizes = sizes_of(examples)
        batch = pack(examples, processor.patch, pad, row_length(sizes, max(packing, *map(max, sizes))))
    else:
        batch = collate(examples, processor.patch, pad)
    extra = {"names": [sample.name for sample in samples], "passed": passed}
    if samples[0].dense:
        extra["dense"] = {k: torch.from_numpy(np.stack([s.dense[k] for s in samples])) for k in samples[0].dense}
    if samples[0].caption:
        extra["captions"] = _captions([s.caption for s in samples], processor)
    return replace(batch, extra=extra)


def _picture(sample: Sample, processor: Processor) -> Example:
    assert sample.image is not None
    seen = processor.pixels.seen(sample.image.picture)
    none = torch.zeros(0, dtype=torch.int64)
    return Example(none, none, none, none, none, none, none, none, seen.pixels, (seen.way,))


def _captions(texts: list[str], processor: Processor) -> torch.Tensor:
    """Caption ids [batch, longest], padded on the right."""
    rows = [processor.tokenizer.encode(" " + text) for text in texts]
    out = torch.full((len(rows), max(map(len, rows))), processor.tokenizer.control(processor.tokenizer.pad))
    for row, ids in enumerate(rows):
        out[row, : len(ids)] = torch.tensor(ids)
    return out


def batches(data: Batches, start: int, workers: int, group: int = 1) -> Generator[Batch, None, None]:
    """Micro-batches from number `start` on, made ahead of time by `workers` processes, in order.

    group: how many are made together. Close it when it is left early: the processes end with it, whoever still holds
    the error that ended it.
    """
    firsts = range(start - start % group, len(data), group)
    loader = DataLoader(
        data,
        batch_sampler=(range(first, min(first + group, len(data))) for first in firsts),  # type: ignore[arg-type]
        collate_fn=list,
        num_workers=workers,
        prefetch_factor=max(1, 4 // group) if workers else None,
        worker_init_fn=_one_thread if workers else None,
    )
    source = iter(loader)
    skipped = start % group  # of the first group, which a run that goes on has learned before
    try:
        for found in source:
            yield from found[skipped:]
            skipped = 0
    except SightlineError as error:  # a worker's comes with the way it took, of which people need the end
        raise type(error)(str(error).splitlines()[-1].rpartition(f"{type(error).__name__}: ")[2]) from None
    finally:
        if workers:  # what fails in one of them holds on to the loader, and they, deaf to signals, would be waited for
            source._shutdown_workers()  # type: ignore[attr-defined]


def _one_thread(worker: int) -> None:
    """A worker that shares the machine with a training step must not start threads of its own."""
    torch.set_num_threads(1)
    leave_to_parent()
