"""What people hold: a loaded model that is asked about pictures and answers in words, boxes and points."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from torch import Tensor

from ..core.errors import InputError, SightlineError
from ..core.geometry import Box, Frame, Point, Transform
from ..core.sequence import Conversation, Image, Message, Region, Text, ask
from ..data.media import open_image
from ..data.processor import Processor
from ..grounding.codecs import Decimals, LocationTokens, PaliGemmaLocations
from ..layers.packed import Precision
from ..model import VLM
from ..zoo import own
from ..zoo.names import locate
from ..zoo.processors import load_processor
from ..zoo.published import Published, load_published
from .engine import Engine, Reply
from .sampling import Sampling

# how the models of each convention are asked to find all of something
DETECT: dict[type, str] = {
    LocationTokens: "Locate every {}.",
    PaliGemmaLocations: "detect {}",
    Decimals: "Please provide the bounding box coordinate of the region this sentence describes: {}.",
}

Picture = str | Path | bytes | PIL.Image.Image | np.ndarray | Image


@dataclass(frozen=True)
class Answer:
    """What a model said, with the places it named in pixels of the upright original picture.

    confidence: from 0 to 1, the mean probability of the answer's tokens; a box has the mean of its own.
    usage: image_tokens (among the prompt's), prompt_tokens, completion_tokens. timing: seconds to the first token
    and in all. error: why there is no answer, in a batch where others have one.
    """

    text: str = ""
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    confidence: float = 0.0
    usage: dict[str, int] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    error: SightlineError | None = None

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON knows it; places rounded to a hundredth of a pixel."""
        return {
            "text": self.text,
            "boxes": [{"label": box.label, "xyxy": _pixels(*box.xyxy), **_sure(box)} for box in self.boxes],
            "points": [
                {"label": point.label, "xy": _pixels(point.x, point.y), **_sure(point)} for point in self.points
            ],
            "confidence": round(self.confidence, 4),
            "usage": dict(self.usage),
            "timing": dict(self.timing),
        }

    def place_lines(self) -> list[str]:
        """A line per place for people: what it is, where, how sure."""
        places = [(box, box.xyxy) for box in self.boxes] + [(point, (point.x, point.y)) for point in self.points]
        return [
            f"  {place.label or 'here'}  [{', '.join(f'{value:.0f}' for value in where)}]  {place.confidence or 0:.0%}"
            for place, where in places
        ]

    def cost_line(self) -> str:
        """How sure the answer is and what it took, for people."""
        usage, seconds = self.usage, self.timing["total"]
        text = usage["prompt_tokens"] - usage["image_tokens"]
        read = f"{usage['image_tokens']} image and {text} text tokens read"
        return f"confidence {self.confidence:.0%}, {read}, {usage['completion_tokens']} written, {seconds:.2f} s"


class Stream:
    """Pieces of an answer's text as they come; `answer` is there once they have all been taken."""

    def __init__(self, pieces: Iterator[str | Reply], processor: Processor) -> None:
        self._pieces, self._processor = pieces, processor
        self.answer = Answer()

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, str):
                yield piece
            else:
                self.answer = _answer(piece, self._processor)


class Assistant:
    """A loaded model with its processor and engine; safe to ask again and again, every call stands alone."""

    def __init__(self, published: Published, processor: Processor | None, name: str = "") -> None:
        self.published, self.processor = published, processor
        self.name = name or published.folder.name
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

    def ask(self, image: Picture | Sequence[Picture] | None, question: str, **sampling: Any) -> Answer:
        """Answer one question about a picture, several, or none.

        Pictures are paths, encoded bytes, Pillow pictures or arrays [height, width, 3] of uint8. `sampling` are the
        fields of `Sampling`. Raises InputError and CapacityError for what cannot be read.
        """
        return self.chat(conversation(image, question), **sampling)

    def stream(self, image: Picture | Sequence[Picture] | None, question: str, **sampling: Any) -> Stream:
        """As `ask`, piece by piece: iterate over the text, then read `.answer`."""
        return self.stream_chat(conversation(image, question), **sampling)

    def stream_chat(self, talk: Conversation, **sampling: Any) -> Stream:
        """As `chat`, piece by piece."""
        return Stream(self.engine.stream(talk, Sampling(**sampling)), self.engine.processor)

    def chat(self, talk: Conversation, **sampling: Any) -> Answer:
        """Answer the last message of a conversation, which must be the user's."""
        answer = self.answer([talk], Sampling(**sampling))[0]
        if answer.error is not None:
            raise answer.error
        return answer

    def said(self, answer: Answer, image: int = 0) -> Message:
        """An answer as a message, for the next turn of a conversation; its places are those of one of the images."""
        places: list[Box | Point] = [*answer.boxes, *answer.points]
        if isinstance(self.engine.processor.codec, LocationTokens) and places:
            labelled = [replace(place, label=f" {place.label}") for place in places]
            return Message("assistant", tuple(Region(place, image) for place in labelled))
        return Message("assistant", (Text(answer.text),))

    def detect(self, image: Picture, phrase: str, **sampling: Any) -> Answer:
        """Find everything that a phrase names; the answer's boxes are labelled with what was found."""
        prompt = DETECT.get(type(self.engine.processor.codec))
        if prompt is None:
            raise InputError(f"{self.name} names no places, it cannot find things")
        if not phrase.strip():
            raise InputError("the phrase is empty, expected the name of something to find")
        return self.ask(image, prompt.format(phrase.strip()), **sampling)

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
    folder = locate(name)
    if own.is_own(folder):
        return Assistant(*own.load(folder, precision))
    published = load_published(folder, precision)
    return Assistant(published, load_processor(published))


def conversation(image: Picture | Sequence[Picture] | None, question: str) -> Conversation:
    """The conversation of one question about some pictures."""
    if not question.strip():
        raise InputError("the question is empty, expected some words")
    return ask(question, *pictures(image))


def pictures(image: Picture | Sequence[Picture] | None) -> tuple[Image, ...]:
    """Whatever pictures come as, decoded and upright."""
    if image is None:
        return ()
    if isinstance(image, (list, tuple)):
        return tuple(open_image(each) for each in image)
    return (open_image(image),)  # type: ignore[arg-type]  # a str is a sequence too, but of no pictures


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


def _pixels(*values: float) -> list[float]:
    return [round(value, 2) for value in values]


def _sure(place: Box | Point) -> dict[str, float | None]:
    return {"confidence": None if place.confidence is None else round(place.confidence, 4)}
