"""Batches of a stage: batch k is a pure function of (seed, stage, k), whoever makes it and wherever a run resumes.

Several processes share out the batches of every step, or parts of them: what a step learns is the same for any number.
"""

import math
import random
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from ..core.errors import CapacityError, ConfigError, DataError, InputError, SightlineError
from ..core.sequence import images_of
from ..data.batch import Batch, Example, collate, pack, row_length, sizes_of
from ..data.mix import Mixture, permuted
from ..data.processor import Processor, Seen
from .preferences import preferred
from .recipe import Source, Stage, check_sources, learning_rates
from .settings import COMPARES, FROM_PAIRS, GATHERED
from .sources import FilesSource, Sample, ScenesSource, opened
from .workers import NOWHERE, ahead, at, short_of_memory

HELD = 32  # samples that a stage with a guard holds out
ROWS = 1000  # that are looked at for a picture
TRIES = 16  # samples that are looked at in place of one that cannot be used


@dataclass(frozen=True)
class Made:
    """A sample with what the model reads of it, and what is wrong with those that were passed over for it.

    seen: the pictures that were prepared for it, by their content. source: the name of where it is from.
    """

    sample: Sample
    example: Example
    passed: tuple[str, ...] = ()
    seen: dict[str, Seen] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Share:
    """What of each step one of `size` processes learns from: micro-batches of its own, or parts of some.

    pieces: how many parts it cuts its own into, which are computed one after the other.
    """

    rank: int = 0
    size: int = 1
    pieces: int = 1

    def check(self, stage: Stage) -> None:
        """ConfigError for a stage whose steps cannot be shared by so many without changing what it learns."""
        samples = stage.batch * stage.accumulate
        if samples % self.size:
            raise ConfigError(
                f"stage {stage.name!r}: {self.size} processes cannot share {samples} samples of a step alike; "
                f"choose batch and accumulate whose product they divide"
            )
        for name in (COMPARES - GATHERED) & set(stage.terms) if stage.accumulate % self.size else ():
            raise ConfigError(
                f"stage {stage.name!r}: {name!r} compares the samples of a micro-batch, which {self.size} processes "
                f"would cut; set accumulate to a multiple of {self.size}"
            )

    def lanes(self, stage: Stage) -> int:
        """How many micro-batches are learned from at once, each by as many processes, which have parts of it."""
        return math.gcd(stage.accumulate, self.size)

    def cuts(self, stage: Stage, k: int) -> list[tuple[int, int]]:
        """The parts of micro-batch k that are this process's, from a sample to before another."""
        lanes = self.lanes(stage)
        if k % stage.accumulate % lanes != self.rank % lanes:
            return []
        parts, begin = self.size // lanes * self.pieces, self.rank // lanes * self.pieces
        edges = [stage.batch * part // parts for part in range(begin, begin + self.pieces + 1)]
        return [(low, high) for low, high in pairwise(edges) if low < high]

    def per_step(self, stage: Stage) -> int:
        """How many batches a step of this process has."""
        return sum(len(self.cuts(stage, k)) for k in range(stage.accumulate))

    def largest(self, stage: Stage) -> int:
        """The most samples that it computes at a time."""
        return max(high - low for k in range(stage.accumulate) for low, high in self.cuts(stage, k))


class Batches:
    """The micro-batches of one stage, by their number.

    A sample that cannot be used is replaced by another of its source, which one is a pure function as well. With
    `group`, so many batches share out their samples by length, so that each holds some of about the same; then every
    process makes the samples of whole groups. extra of a batch: "first", the place of its first sample in the step.
    given_up: samples that are not tried again, by `place`, and why.
    """

    def __init__(
        self,
        stage: Stage,
        number: int,
        seed: int,
        sources: Mapping[str, Source],
        processor: Processor,
        share: Share = Share(),
    ) -> None:
        self.form = check_sources(stage, sources)
        self.asks = stage.settings("reward").asks if "reward" in stage.terms else ""
        share.check(stage)
        self.stage, self.number, self.seed, self.share = stage, number, seed, share
        self.sources, self.processor = sources, processor
        self.mixture = Mixture(stage.data)
        opened.cache_clear()  # files may have changed since another run
        self.lengths = {name: length_of(name, sources[name]) for name in stage.data}
        self.given_up: dict[int, str] = {}
        self.kept: dict[str, int] = {}  # rows of each file at the end of its first order, which are never learned from
        if stage.guard_every:
            self.kept = {name: min(HELD, length // 10) for name, length in self.lengths.items() if length}
            self.lengths = {name: length and length - self.kept.get(name, 0) for name, length in self.lengths.items()}

    def __len__(self) -> int:
        return self.stage.steps * self.stage.accumulate

    def shared(self, share: Share) -> "Batches":
        """The same batches, of which a process has another share."""
        found = Batches(self.stage, self.number, self.seed, self.sources, self.processor, share)
        found.given_up = self.given_up
        return found

    def __getitem__(self, k: int) -> Batch:
        """All of micro-batch k, whoever learns from it."""
        if k >= len(self):
            raise IndexError(k)
        (batch,) = self.parts(k, self.sorted(self.group(k)), Share())
        return batch

    def together(self, numbers: Sequence[int]) -> list[Batch]:
        """This process's batches of a whole group."""
        known = self.sorted(numbers)
        return [batch for k in numbers for batch in self.parts(k, known, self.share)]

    def group(self, k: int) -> range:
        """The numbers of the batches that are made together with k."""
        first = k - k % self.stage.group
        return range(first, min(first + self.stage.group, len(self)))

    def parts(self, k: int, known: Mapping[int, list[Made]], share: Share) -> list[Batch]:
        """A share's parts of micro-batch k, whose samples may be known."""
        size, found = self.stage.batch, []
        for low, high in share.cuts(self.stage, k):
            part = known[k][low:high] if k in known else [self.made(k * size + j) for j in range(low, high)]
            batch = assemble(part, self.processor, self.form, self.stage.packing, self.asks)
            found.append(replace(batch, extra=batch.extra | {"first": k % self.stage.accumulate * size + low}))
        return found

    def sorted(self, numbers: Sequence[int]) -> dict[int, list[Made]]:
        """The samples of several batches, those of about the same length in one; none of a batch that is alone."""
        if len(numbers) == 1:
            return {}
        size = self.stage.batch
        made = [self.made(k * size + j) for k in numbers for j in range(size)]
        made.sort(key=lambda each: each.example.length)
        parts = [made[i : i + size] for i in range(0, len(made), size)]
        # else every group would end with its longest
        random.Random(f"{self.seed} {self.number} {numbers[0]}").shuffle(parts)
        return dict(zip(numbers, parts, strict=True))

    def sample(self, index: int) -> Sample:
        """Sample `index` of the stage."""
        return self.made(index).sample

    def made(self, index: int) -> Made:
        """Sample `index`: the mixture says of which source."""
        name, place = self.mixture(index)
        return replace(self.made_from(name, place, index), source=name)

    def made_from(self, name: str, place: int, index: int) -> Made:
        """The sample at a place of a source; an endless one is asked for the index itself."""
        source, length = self.sources[name], self.lengths[name]
        if length is None:
            self._begin(index, 0, name, (0, index))
            found = self.checked(self.read(source(self.seed, 0, index)))
            at(NOWHERE)
            return found
        epoch, place = divmod(place, length)
        passed: list[str] = []
        for attempt in range(TRIES):
            row = self._row(
                name, epoch, permuted(place, length, f"{self.seed} {epoch} {attempt}") if attempt else place
            )
            told = ""
            try:
                self._begin(index, attempt, name, row)
                sample = source(self.seed, *row)
                told = f"{sample.name}: "
                return self.checked(self.read(sample), tuple(passed))
            except Exception as error:
                if not unusable(error):
                    raise
                if isinstance(error, SightlineError):
                    passed.append(f"{told}{error}")
                else:
                    passed.append(f"{told or f'{self._name(name, row)}: '}{type(error).__name__}: {error}")
            finally:
                at(NOWHERE)
        raise DataError(f"source {name!r}: {TRIES} samples in a row cannot be used; the last is {passed[-1]}")

    def checked(self, sample: Sample, passed: tuple[str, ...] = ()) -> Made:
        """A sample with what the model reads of it; an error of its own where its answers cannot be read."""
        made = made_of(sample, self.processor, passed)
        if self.form in ("pairs", "judged"):
            preferred([sample], self.processor, self.form, made.seen, self.asks)
        return made

    def read(self, sample: Sample) -> Sample:
        """What the stage reads of a sample: of one that a model is to answer itself, what it asks for."""
        return sample.prompt if self.form == "prompts" else sample

    def _begin(self, index: int, attempt: int, name: str, row: tuple[int, int]) -> None:
        """Say which sample is being made; DataError for one over which processes ended."""
        place = index * TRIES + attempt
        if place in self.given_up:
            raise DataError(f"{self._name(name, row)}: {self.given_up[place]}")
        at(place)

    def _name(self, name: str, row: tuple[int, int]) -> str:
        """What a sample of a file is called before it is read; of another source its place in the epoch."""
        source, (epoch, place) = self.sources[name], row
        if isinstance(source, FilesSource):
            return source.reader.name(source.row(self.seed, epoch, place))
        return f"sample {place} of source {name!r}"

    def _row(self, name: str, epoch: int, place: int) -> tuple[int, int]:
        """Epoch and place of a sample of a file; where some are held out, every epoch is an order of the others."""
        length = self.lengths[name]
        if not self.kept.get(name):
            return epoch, place
        assert length is not None
        return 0, permuted(place, length, f"{self.seed} {epoch} held") if epoch else place

    def held(self) -> list[Sample]:
        """Samples that the stage never learns from, in the shares of its mixture: of files few, else later ones."""
        found, taken, total = [], Counter[str](), len(self) * self.stage.batch
        for index in range(total, total + HELD):
            name, _ = self.mixture(index)
            length, place = self.lengths[name], taken[name]
            if length is not None and place >= self.kept[name]:
                continue
            taken[name] += 1
            try:
                sample = self.sources[name](self.seed, 0, index if length is None else length + place)
                self.checked(self.read(sample))
                found.append(sample)
            except Exception as error:
                if not unusable(error):
                    raise
        return found


def unusable(error: Exception) -> bool:
    """Whether an error, be it one that no reader foresaw, is of a sample in whose place another can come."""
    if isinstance(error, SightlineError):
        return isinstance(error, DataError | InputError | CapacityError)
    return not short_of_memory(error)


def check_seen(stage: Stage, sources: Mapping[str, Source], model: nn.Module) -> None:
    """ConfigError for a stage that learns what only pictures reach, and of whose samples none has a picture."""
    sees = [pattern for pattern, how in stage.learn.items() if of_pictures(learning_rates(model, {pattern: how}))]
    if sees and not any(pictured(sources[name]) for name in stage.data):
        those = ", ".join(map(repr, stage.data))
        raise ConfigError(f"stage {stage.name!r} learns {sees[0]!r}, but there are no pictures in its data {those}")


def of_pictures(names: Iterable[str]) -> bool:
    """Whether some parameters are all of what reads pictures, the decoder apart."""
    return all(name.startswith(("encoder.", "fusion.")) for name in names)


def pictured(source: Source) -> bool:
    """Whether a source has pictures; of files a thousand rows are looked at, where there are any yet."""
    if isinstance(source, ScenesSource):
        return source.kind != "text"
    if not isinstance(source, FilesSource) or not source.path or source.gives == "pictures":
        return True
    read = 0
    for row in range(min(len(source.reader), ROWS)):
        with suppress(Exception):  # whatever is wrong with a row is told where it would be learned from
            if images_of(source.reader[source.row(0, 0, row)].conversation):
                return True
            read += 1
    return not read


def length_of(name: str, source: Source) -> int | None:
    """How many samples a source has, None without end; ConfigError where it names no file yet."""
    if isinstance(source, FilesSource) and not source.path:
        raise ConfigError(f"source {name!r} names no file; set sources.{name}.path=FILE")
    return source.length


def made_of(sample: Sample, processor: Processor, passed: tuple[str, ...] = ()) -> Made:
    """A sample with what the model reads of it, of a pair its prompt."""
    known: dict[str, Seen] = {}
    if not sample.conversation:
        example = _picture(sample, processor)
    elif sample.branches:
        example = processor.branches(sample.conversation)
    else:
        example = processor(sample.conversation, known)
    return Made(sample, example, passed, known)


def assemble(made: Sequence[Made], processor: Processor, form: str, packing: int = 0, asks: str = "") -> Batch:
    """Samples as one batch of a form of `READS`; pictures without a conversation become patches without text.

    packing: the most tokens of a row that several conversations share; 0: each has a row of its own. A longer one is
    alone in its row; ConfigError where none is shorter. asks: what a reward model is asked about each answer.
    """
    examples, samples = [each.example for each in made], [each.sample for each in made]
    passed = [line for each in made for line in each.passed]
    pad = processor.tokenizer.filler
    if form in FROM_PAIRS:
        known = {key: seen for each in made for key, seen in each.seen.items()}
        batch = preferred(samples, processor, form, known, asks)
        return replace(batch, extra=batch.extra | {"passed": passed})
    if packing:
        sizes = sizes_of(examples)
        if packing < (least := min(map(max, sizes))):
            raise ConfigError(f"packing is {packing}, but the shortest conversation of a batch has {least} tokens")
        batch = pack(examples, processor.patch, pad, row_length(sizes, max(packing, *map(max, sizes))))
    else:
        batch = collate(examples, processor.patch, pad)
    extra = {"names": [sample.name for sample in samples], "passed": passed, "sources": [each.source for each in made]}
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
    out = torch.full((len(rows), max(map(len, rows))), processor.tokenizer.filler)
    for row, ids in enumerate(rows):
        out[row, : len(ids)] = torch.tensor(ids)
    return out


def batches(data: Batches, start: int, workers: int, group: int = 1) -> Generator[Batch, None, None]:
    """This process's batches from micro-batch `start` on, made ahead of time by `workers` processes, in order.

    group: how many are made together. Close it when it is left early: the processes end with it, whoever still holds
    the error that ended it.
    """
    firsts = range(start - start % group, len(data), group)

    def make(turn: int) -> list[Batch]:
        return data.together(range(firsts[turn], min(firsts[turn] + group, len(data))))

    begun = range(start - start % group, start)  # of the first group, which a run that goes on has learned before
    skipped = sum(len(data.share.cuts(data.stage, k)) for k in begun)
    if not workers:
        made = (make(turn) for turn in range(len(firsts)))
    else:
        made = ahead(make, len(firsts), workers, max(1, 4 // group), data.given_up.__setitem__)
    with closing(made):
        for found in made:
            yield from found[skipped:]
            skipped = 0
