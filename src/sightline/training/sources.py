"""Where samples come from: pure functions of (seed, epoch, index), so that a run can stop anywhere and go on."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from ..core.config import config, nearest
from ..core.errors import ConfigError, DataError
from ..core.geometry import Box, Frame, Point
from ..core.sequence import Conversation, Image, Message, Part, Region, Text, images_of
from ..data.formats import FORMATS, PREFERENCES, Files, Reader, captions_of, open_files
from ..data.mix import permuted
from ..worlds.scene_phrases import describe
from ..worlds.scene_plain import PLAIN_KINDS, plain_questions
from ..worlds.scene_questions import Question, questions
from ..worlds.scenes import Object, Scene, SceneConfig, reading_order, scene

MOST = 12  # objects of a scene


@dataclass(frozen=True)
class Sample:
    """What one step of training sees of one picture.

    conversation: what is read and learned, may be empty; image, caption, dense: for objectives on the encoder.
    chosen, rejected: a better and a worse answer to the conversation, which then ends with the user.
    branches: the turns are separate questions, which are learned side by side; else each follows those before it.
    facts: what is known of the picture, which a reward model may be told.
    """

    conversation: Conversation = ()
    chosen: Message | None = None
    rejected: Message | None = None
    image: Image | None = None
    caption: str = ""
    dense: Mapping[str, np.ndarray] = field(default_factory=dict)
    name: str = ""
    branches: bool = False
    facts: tuple[str, ...] = ()

    @property
    def prompt(self) -> "Sample":
        """The sample with what it asks for last as its conversation, and the answer to that as the chosen one.

        Of questions that are learned side by side the first is taken. DataError where nothing is answered.
        """
        if self.chosen is not None:
            return self
        talk, last = self.conversation, len(self.conversation)
        if self.branches:
            last = next((i + 1 for i, message in enumerate(talk) if message.role == "assistant"), 0)
        if not last or talk[last - 1].role != "assistant":
            raise DataError("no answer to a question, with which what a model answers is compared")
        return replace(self, conversation=talk[: last - 1], chosen=talk[last - 1], branches=False)


Gives = Literal["conversations", "pictures", "pairs"]  # what objectives learn from


def places(question: Question, frame: Frame) -> tuple[Part, ...]:
    """A question's answer as parts: words, or regions labelled with what they are."""
    boxes = [Region(Box(*map(float, box), frame, label=f" {label}")) for label, box in question.boxes]
    points = [Region(Point(float(x), float(y), frame, label=f" {label}")) for label, (x, y) in question.points]
    return (*boxes, *points) or (Text(question.answer),)


def dialogue(asked: list[Question], frame: Frame, *first: Part) -> Conversation:
    """Questions and answers in turn; `first` comes before the first question."""
    messages: list[Message] = []
    for i, question in enumerate(asked):
        messages.append(Message("user", (*(first if i == 0 else ()), Text(question.text))))
        messages.append(Message("assistant", places(question, frame)))
    return tuple(messages)


def in_words(things: Sequence[Object]) -> str:
    """Objects as a phrase that tells their colours and shapes."""
    return describe(things, ("color", "shape"))


def facts_of(picture: Scene) -> tuple[str, ...]:
    """What is true of a scene."""
    return (in_words(reading_order(picture.objects)),)


def described(picture: Scene, frame: Frame) -> Message:
    """A scene in words and places instead of pixels: what a language model learns to reason over."""
    parts: list[Part] = []
    for each in picture.objects:
        label = f" {each.size} {each.texture} {each.color} {each.shape}"
        parts.append(Region(Box(*map(float, each.box), frame, label=label)))
    return Message("system", tuple(parts))


@config
class ScenesSource:
    """Samples of the scenes world.

    kind: "pictures" (image, caption and dense truth), "captions", "questions", "plain" (questions of one wording
    each), or "text" (the scene described in words, with questions). From `start`, scenes of up to `first` objects at
    index 0 grow to 12 at index `grown`; without it they are of up to 12 from the start. asks: kinds of plain
    questions. distinct: solid objects that all differ, at least 2 and at most 8. multi_turn: questions follow each
    other in one conversation; else they are asked side by side, none knowing of the others.
    """

    kind: Literal["pictures", "captions", "questions", "plain", "text"]
    turns: PositiveInt = 12
    start: int = 0  # the first seed; ranges of different sources must not meet
    first: int = MOST
    grown: NonNegativeInt = 0
    patch: PositiveInt = 16
    asks: tuple[str, ...] = PLAIN_KINDS
    distinct: bool = False
    multi_turn: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.first <= MOST:
            raise ConfigError(f"first is {self.first} objects, expected 1 to {MOST}")
        if self.first < MOST and not self.grown:
            raise ConfigError(f"first is {self.first}, but scenes of {MOST} objects come at once; set grown as well")

    @property
    def gives(self) -> Gives:
        return "pictures" if self.kind == "pictures" else "conversations"

    @property
    def length(self) -> int | None:
        """Scenes have no end."""
        return None

    def world(self, index: int) -> SceneConfig:
        """What the scene at an index may contain."""
        share = min(1.0, index / self.grown) if self.grown else 1.0
        most = round(self.first + (MOST - self.first) * share)
        if self.distinct:
            return SceneConfig(min_objects=2, max_objects=max(2, min(most, 8)), distinct=True, textures=("solid",))
        return SceneConfig(max_objects=most)

    def asking(self, picture: Scene, rng: random.Random, count: int) -> list[Question]:
        """At most so many questions of the kinds that this source asks."""
        return (
            plain_questions(picture, rng, count, self.asks) if self.kind == "plain" else questions(picture, rng, count)
        )

    def __call__(self, seed: int, epoch: int, index: int) -> Sample:
        number = self.start + index + epoch * 1_000_000_007 + seed * 10_000_000_019
        for again in range(100):  # a scene may hold nothing that is asked, such as no colour that is there once
            if (sample := self.drawn(number + again * 1_000_000_000_039, index)) is not None:
                return sample
        raise ConfigError(f"no scene of this source holds anything that it asks: {', '.join(self.asks)}")

    def drawn(self, number: int, index: int) -> Sample | None:
        """The sample of the scene with this number; None where there is nothing in it to ask."""
        picture = scene(number, self.world(index))
        rng = random.Random(number)
        frame = Frame(*picture.size)
        name = f"scene {number}"
        if self.kind == "text":
            asked = dialogue(questions(picture, rng, self.turns), frame)
            return Sample(conversation=(described(picture, frame), *asked), name=name, branches=True)
        image = Image(picture.picture(), name)
        if self.kind == "pictures":
            return Sample(image=image, caption=picture.caption(rng), dense=picture.grid(self.patch), name=name)
        if self.kind == "captions":
            said = Message("assistant", (Text(picture.caption(rng)),))
            talk = (Message("user", (image, Text("Describe the picture."))), said)
            return Sample(conversation=talk, name=name, branches=True, facts=facts_of(picture))
        asked = self.asking(picture, rng, self.turns)
        if not asked:
            return None
        talk = dialogue(asked, frame, image)
        return Sample(talk, name=name, branches=not self.multi_turn, facts=facts_of(picture))


@config
class FilesSource:
    """Samples of a data set on the disk.

    kind: what they become: "conversations", "image-text" (a picture and its caption, which is the last answer), or
    "preferences". format: one of `data.formats`; path, images, annotations, prompt, frames: as in its `Files`. Paths
    are relative to where the program runs; an empty one stands in a recipe that others complete. facts: a file of
    captions by picture (`data.formats.captions`), for reward models that are told them. text: tokens of text in a usual
    sample, a guess for plans while there is no file to look at.
    """

    kind: Literal["conversations", "image-text", "preferences"]
    format: str
    path: str = ""
    images: str = ""
    annotations: str = ""
    prompt: str = ""
    facts: str = ""
    frames: PositiveInt = 8
    text: PositiveInt = 256

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"unknown format {self.format!r}{nearest(self.format, FORMATS)}")
        if (self.kind == "preferences") != (self.format in PREFERENCES):
            pairs = ", ".join(PREFERENCES)
            raise ConfigError(f"format {self.format!r} does not give {self.kind}; preferences come from {pairs}")

    @property
    def gives(self) -> Gives:
        gives: dict[str, Gives] = {"image-text": "pictures", "preferences": "pairs"}
        return gives.get(self.kind, "conversations")

    @property
    def reader(self) -> Reader:
        """The data set, opened once; a run opens it anew when it begins."""
        return opened(self)

    @property
    def length(self) -> int | None:
        """How many samples an epoch has."""
        return len(self.reader)

    def row(self, seed: int, epoch: int, index: int) -> int:
        """Which row of the data set comes at a place of an epoch."""
        return permuted(index, len(self.reader), f"{seed} {epoch}")

    def __call__(self, seed: int, epoch: int, index: int) -> Sample:
        row = self.row(seed, epoch, index)
        found, name = self.reader[row], self.reader.name(row)
        if self.kind != "image-text":
            known = captions_of(Path(self.facts), images_of(found.conversation)) if self.facts else ()
            return Sample(found.conversation, name=name, chosen=found.chosen, rejected=found.rejected, facts=known)
        pictures, caption = images_of(found.conversation), found.conversation[-1].text
        if len(pictures) != 1 or not caption:
            raise DataError(f"{name}: {len(pictures)} pictures with {caption[:20]!r}, expected one and its caption")
        return Sample(image=pictures[0], caption=caption, name=name)


@lru_cache
def opened(source: FilesSource) -> Reader:
    """The data set of a source."""
    images, annotations = (Path(path) if path else None for path in (source.images, source.annotations))
    return open_files(source.format, Files(Path(source.path), images, annotations, source.prompt, source.frames))
