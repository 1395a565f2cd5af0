"""Where samples come from: pure functions of (seed, epoch, index), so that a run can stop anywhere and go on."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..core.config import config
from ..core.geometry import Box, Frame, Point
from ..core.sequence import Conversation, Image, Message, Part, Region, Text
from ..worlds.scene_plain import PLAIN_KINDS, plain_questions
from ..worlds.scene_questions import Question, questions
from ..worlds.scenes import Scene, SceneConfig, scene


@dataclass(frozen=True)
class Sample:
    """What one step of training sees of one picture.

    conversation: what is read and learned, may be empty; image, caption, dense: for objectives on the encoder.
    chosen, rejected: a better and a worse answer to the conversation, which then ends with the user.
    """

    conversation: Conversation = ()
    image: Image | None = None
    caption: str = ""
    dense: Mapping[str, np.ndarray] = field(default_factory=dict)
    name: str = ""
    chosen: Message | None = None
    rejected: Message | None = None


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
    index 0 grow to 12 at index `grown`. asks: kinds of plain questions. distinct: solid objects that all differ, at
    least 2 and at most 8.
    """

    kind: Literal["pictures", "captions", "questions", "plain", "text"]
    turns: int = 12
    start: int = 0  # the first seed; ranges of different sources must not meet
    first: int = 12
    grown: int = 0
    patch: int = 16
    asks: tuple[str, ...] = PLAIN_KINDS
    distinct: bool = False

    def __call__(self, seed: int, epoch: int, index: int) -> Sample:
        number = self.start + index + epoch * 1_000_000_007 + seed * 10_000_000_019
        share = min(1.0, index / self.grown) if self.grown else 1.0
        most = round(self.first + (12 - self.first) * share)
        if self.distinct:
            most = max(2, min(most, 8))
            scenes = SceneConfig(min_objects=2, max_objects=most, distinct=True, textures=("solid",))
        else:
            scenes = SceneConfig(max_objects=most)
        picture = scene(number, scenes)
        rng = random.Random(number)
        frame = Frame(*picture.size)
        name = f"scene {number}"
        if self.kind == "text":
            asked = dialogue(questions(picture, rng, self.turns), frame)
            return Sample(conversation=(described(picture, frame), *asked), name=name)
        image = Image(picture.picture(), name)
        if self.kind == "pictures":
            return Sample(image=image, caption=picture.caption(rng), dense=picture.grid(self.patch), name=name)
        if self.kind == "captions":
            said = Message("assistant", (Text(picture.caption(rng)),))
            return Sample(conversation=(Message("user", (image, Text("Describe the picture."))), said), name=name)
        plain = self.kind == "plain"
        asked = plain_questions(picture, rng, self.turns, self.asks) if plain else questions(picture, rng, self.turns)
        return Sample(conversation=dialogue(asked, frame, image), name=name)
