"""What people hold: a loaded model that is asked about pictures and answers in words, boxes and points."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.geometry import Box, Frame, Point, Transform
from ..core.sequence import Conversation, Message, Region
from ..data.processor import Processor
from ..grounding.codecs import LocationTokens
from ..layers.packed import Precision
from ..model import VLM
from ..zoo import own
from ..zoo.names import locate
from ..zoo.processors import load_processor
from ..zoo.published import Published, load_published
from .engine import Engine, Reply
from .remote import is_remote
from .sampling import Sampling, sampling_of
from .talker import Answer, Picture, Stream, Talker, pictures


class Assistant(Talker):
    """A loaded model with its processor and engine."""

    def __init__(self, published: Published, processor: Processor | None, name: str = "") -> None:
        self.published, self.processor = published, processor
        folder = published.folder
        if folder.name == "model":  # every run's is called so, and answers say whose they are
            folder = folder.absolute().parent
        self.name = name or folder.name
        self._engine: Engine | None = None

    @property
    def label(self) -> str:
        """Its name, and the precision that it is run in where that is not fp32."""
        precision = self.published.precision
        return self.name if precision == "fp32" else f"{self.name} in {precision}"

    @property
    def engine(self) -> Engine:
        """What answers; InputError for a checkpoint that cannot hold a conversation about pictures."""
        runner = self.published.runner
        if self._engine is None or self._engine.model is not runner:
            if self.processor is None or not isinstance(self.published.model, VLM):
                raise InputError(f"{self.name} is a {self.published.family} without a tokenizer, it reads no questions")
            assert isinstance(runner, VLM)
            self._engine = Engine(runner, self.processor)
        return self._engine

    def logits(self, **inputs: Any) -> Tensor:
        """Scores [batch, length, vocabulary] in float32 for the keyword inputs that the published model takes."""
        return self.published.logits(**inputs)

    def generate_ids(self, **inputs: Any) -> Tensor:
        """Greedy continuation of the published model's keyword inputs, `max_new_tokens` of them at most."""
        return self.published.generate_ids(**inputs)

    def stream_chat(self, talk: Conversation, **sampling: Any) -> Stream:
        """As `chat`, piece by piece."""
        pieces, processor = self.engine.stream(talk, sampling_of(sampling)), self.engine.processor
        return Stream(piece if isinstance(piece, str) else _answer(piece, processor) for piece in pieces)

    def said(self, answer: Answer, image: int = 0) -> Message:
        """An answer as a message, for the next turn of a conversation; its places are those of one of the images."""
        places: list[Box | Point] = [*answer.boxes, *answer.points]
        if isinstance(self.engine.processor.codec, LocationTokens) and places:
            labelled = [replace(place, label=f" {place.label}") for place in places]
            return Message("assistant", tuple(Region(place, image) for place in labelled))
        return super().said(answer, image)

    def detect(self, image: Picture, phrase: str, **sampling: Any) -> Answer:
        """Find everything that a phrase names, asked as the model was taught.

        The answer's places are labelled with what was found, or with the phrase where it tells only where.
        """
        if not isinstance(phrase, str):
            raise InputError(f"the phrase is of the type {type(phrase).__name__}, expected words")
        codec, name = self.engine.processor.codec, phrase.strip()
        if codec is None:
            raise InputError(f"{self.name} names no places, it cannot find things")
        if not name:
            raise InputError("the phrase is empty, expected the name of something to find")
        answer = self.chat((Message("user", codec.find(name, *pictures(image))),), **sampling)
        boxes = tuple(replace(box, label=box.label or name) for box in answer.boxes)
        return replace(answer, boxes=boxes, points=tuple(replace(p, label=p.label or name) for p in answer.points))

    def answer(
        self, talks: Sequence[Conversation], sampling: Sampling | Sequence[Sampling] = Sampling()
    ) -> list[Answer]:
        """One answer per conversation, in order; questions about the same pictures share what is seen of them.

        A conversation that cannot be answered gets an `Answer` with its `error`, the others are not touched.
        """
        engine = self.engine
        return [_answer(reply, engine.processor) for reply in engine.answer(talks, sampling)]


def load(name: str | Path | None = None, precision: Precision = "fp32") -> Assistant:
    """A model by the name that `sightline models` lists, or from a folder; without either the default model.

    precision: "fp32", "bf16", or "int8" (bf16 that writes tokens with int8 weights).
    Raises ConfigError for an unknown name (telling the nearest) and CheckpointError for a folder that cannot be read.
    """
    if is_remote(name):
        raise ConfigError(f"{name} is behind an API, expected sightline.reach({str(name)!r})")
    folder = locate(name)
    if own.is_own(folder):
        return Assistant(*own.load(folder, precision))
    published = load_published(folder, precision)
    return Assistant(published, load_processor(published))


def _answer(reply: Reply, processor: Processor) -> Answer:
    """A reply as people see it, every place with its confidence."""
    boxes, points = reply.grounded.boxes, reply.grounded.points
    if boxes or points:
        found = place_confidences(reply, processor)
        boxes = tuple(replace(box, confidence=sure) for box, sure in zip(boxes, found[Box], strict=True))
        points = tuple(replace(point, confidence=sure) for point, sure in zip(points, found[Point], strict=True))
    return Answer(reply.grounded.text, boxes, points, reply.confidence, reply.usage, reply.timing, reply.error)


def place_confidences(reply: Reply, processor: Processor) -> dict[type, list[float]]:
    """Mean probability of the tokens that wrote each box and each point, in order.

    A place is written by the tokens since the place before it, whatever the model's convention: reading the answer
    token by token tells where each one is complete.
    """
    nowhere = Transform(Frame(1, 1))  # only how many places there are is asked
    found: dict[type, list[float]] = {Box: [], Point: []}
    start = 0
    for stop in range(1, len(reply.ids) + 1):
        grounded = processor.read(reply.ids[:stop], (nowhere,))
        new = {Box: len(grounded.boxes) - len(found[Box]), Point: len(grounded.points) - len(found[Point])}
        sure = math.fsum(reply.probabilities[start:stop]) / (stop - start)
        for kind, count in new.items():
            found[kind] += [sure] * count
        start = stop if any(new.values()) else start
    return found
