"""Preferences as samples: from rankings, from somebody's scores, and from worlds, where one answer is exactly true."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import torch

from ..core.config import config
from ..core.errors import CapacityError, ConfigError, InputError
from ..core.sequence import Conversation, Image, Message, Text, ask
from ..data.batch import IGNORE, Batch, Example, collate
from ..data.processor import Processor, Seen
from ..worlds.scene_plain import plain_questions
from ..worlds.scene_questions import questions
from ..worlds.scenes import COLORS, SHAPES, Scene, SceneConfig, reading_order, scene
from .answers import alternatives, asked_about
from .rewards import truth_of
from .sources import Gives, Sample, facts_of, in_words

# ------------------------------------------------------------------------------------------- from somebody's judgement


def ranked(prompt: Conversation, answers: Sequence[Message], ratings: Sequence[float], name: str = "") -> list[Sample]:
    """Every pair of answers that are rated differently (arXiv:2312.10665), better rated ones chosen."""
    if len(answers) != len(ratings):
        raise InputError(f"{len(ratings)} ratings for {len(answers)} answers, expected one for each")
    found: list[Sample] = []
    for (one, first), (other, second) in combinations(zip(answers, ratings, strict=True), 2):
        if first != second:
            chosen, rejected = (one, other) if first > second else (other, one)
            found.append(Sample(prompt, name=f"{name} {len(found)}".strip(), chosen=chosen, rejected=rejected))
    return found


def scored(
    prompt: Conversation, answers: Sequence[Message], score: Callable[[Conversation], float], name: str = ""
) -> list[Sample]:
    """The same with ratings from a judge that is given the whole conversation: a model, say (AI feedback).

    Answers that say the same are rated once.
    """
    different = list(dict.fromkeys(answers))
    return ranked(prompt, different, [score((*prompt, answer)) for answer in different], name)


@dataclass(frozen=True)
class Listed:
    """A source of samples that are there already, each epoch of indices in an order of its own."""

    samples: Sequence[Sample]
    gives: Gives = "pairs"
    length: int | None = None  # the order of an epoch is its own

    def __call__(self, seed: int, epoch: int, index: int) -> Sample:
        turn, place = divmod(index, len(self.samples))
        order = list(range(len(self.samples)))
        random.Random(f"{seed} {epoch + turn}").shuffle(order)
        return self.samples[order[place]]


# ---------------------------------------------------------------------------------------------------------- from worlds

Wrong = tuple[str, str, str]  # a question, its true answer, and a plausible one that the picture contradicts


def _count(picture: Scene, rng: random.Random) -> Wrong | None:
    asked = plain_questions(picture, rng, 1, ("count",))[0]
    true = int(asked.answer)
    return asked.text, asked.answer, str(rng.choice([n for n in (true - 1, true + 1) if n >= 0]))


def _color(picture: Scene, rng: random.Random) -> Wrong | None:
    for asked in plain_questions(picture, rng, 1, ("color",)):
        there = {each.color for each in picture.objects} - {asked.answer}  # what is in the picture deceives best
        return asked.text, asked.answer, rng.choice(sorted(there or set(COLORS) - {asked.answer}))
    return None


def _existence(picture: Scene, rng: random.Random) -> Wrong | None:
    for asked in questions(picture, rng, 1, ("existence",)):
        return asked.text, asked.answer, "no" if asked.answer == "yes" else "yes"
    return None


def _caption(picture: Scene, rng: random.Random) -> Wrong:
    """All objects, or one more or one of another colour: the rest of the words is the same."""
    things = reading_order(picture.objects)
    known = {(each.color, each.shape) for each in things}
    thing, where = rng.choice(things), rng.randrange(len(things))
    if rng.random() < 0.5:
        color, shape = rng.choice([(c, s) for c in COLORS for s in SHAPES if (c, s) not in known])
        wrong = [*things[:where], replace(thing, color=color, shape=shape), *things[where:]]
    else:
        colors = [color for color in COLORS if (color, thing.shape) not in known]
        wrong = [replace(each, color=rng.choice(colors)) if each is thing else each for each in things]
    return "Describe the picture.", in_words(things), in_words(wrong)


HALLUCINATIONS: dict[str, Callable[[Scene, random.Random], Wrong | None]] = {
    "count": _count,
    "color": _color,
    "existence": _existence,
    "caption": _caption,
}


@config
class PairsSource:
    """Pairs of the scenes world: what is exactly true against a plausible hallucination.

    asks: a wrong count, a wrong colour, an absent object said to be there (or the other way round), a caption with an
    object that is not there or of a wrong colour. All objects in words are the facts of each.
    """

    kind: Literal["pairs"] = "pairs"
    start: int = 0  # the first seed; ranges of different sources must not meet
    first: int = 12  # the most objects
    asks: tuple[str, ...] = tuple(HALLUCINATIONS)

    def __post_init__(self) -> None:
        if not self.asks or set(self.asks) - set(HALLUCINATIONS):
            asked, known = ", ".join(self.asks) or "empty", ", ".join(HALLUCINATIONS)
            raise ConfigError(f"asks is {asked}, expected some of {known}")

    @property
    def gives(self) -> Gives:
        """What objectives learn from it."""
        return "pairs"

    @property
    def length(self) -> int | None:
        """How many samples there are; None: without end."""
        return None

    def __call__(self, seed: int, epoch: int, index: int) -> Sample:
        number = self.start + index + epoch * 1_000_000_007 + seed * 10_000_000_019
        picture = scene(number, SceneConfig(max_objects=self.first))
        rng = random.Random(f"pairs {number}")
        found = HALLUCINATIONS[rng.choice(self.asks)](picture, rng) or _count(picture, rng)
        assert found is not None
        question, true, false = found
        name = f"scene {number}"
        prompt = ask(question, Image(picture.picture(), name))
        return Sample(prompt, name=name, chosen=_answer(true), rejected=_answer(false), facts=facts_of(picture))


def _answer(text: str) -> Message:
    return Message("assistant", (Text(text),))


# ----------------------------------------------------------------------------------------------------------- as batches


def preferred(
    samples: Sequence[Sample], processor: Processor, form: str, known: dict[str, Seen] | None = None, asks: str = ""
) -> Batch:
    """Samples with a chosen and a rejected answer as a batch, in one of three forms.

    "pairs": both answers, in turn. "judged": whichever there are, and one to the next sample's prompt, marked in
    extra["judged"] by 1, -1 and 0. "prompts": none; extra has the "prompts" as examples, their "samples" and "truths".
    known: pictures that were prepared before, by their content. asks: what is asked about each answer, as a reward
    model's settings have it.
    """
    known = {} if known is None else known
    extra: dict[str, object] = {"names": [sample.name for sample in samples]}
    examples: list[Example] = []
    marks: list[int] = []
    for i, sample in enumerate(samples):
        answers = {mark: said for mark, said in ((1, sample.chosen), (-1, sample.rejected)) if said is not None}
        if not answers or (form == "pairs" and len(answers) < 2) or (form == "prompts" and sample.chosen is None):
            raise InputError(f"{sample.name}: lacks an answer that its objective learns from, which reads {form}")
        if form == "prompts":
            prompt = processor(sample.conversation, known)
            examples.append(replace(prompt, labels=torch.full_like(prompt.labels, IGNORE)))
            continue
        after = asked_about(asks, sample.facts, sample.name)
        for other in (*samples[i + 1 :], *samples[: i + 1]):
            if form == "judged" and (strange := other.chosen or other.rejected):
                answers[0] = strange
            try:
                examples += alternatives(sample.conversation, list(answers.values()), processor, known, after)
                break
            except CapacityError:  # the other's answer may be too long for this prompt
                if form == "pairs" or other is sample:
                    raise
        marks += answers
    if form == "judged":
        extra["judged"] = torch.tensor(marks)
    if form == "prompts":
        truths = [truth_of(sample.chosen) for sample in samples if sample.chosen]
        extra |= {"prompts": examples, "samples": list(samples), "truths": truths}
    batch = collate(examples, processor.patch, processor.tokenizer.filler)
    return replace(batch, extra=batch.extra | extra)
