"""What can be asked about pictures, here or elsewhere: the verbs that all of them share, and what they answer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..core.errors import InputError, SightlineError
from ..core.geometry import Box, Point
from ..core.sequence import Conversation, Image, Message, Text, Video, ask
from ..data.media import open_media
from .sampling import Sampling, sampling_of

Picture = str | Path | bytes | PIL.Image.Image | np.ndarray | Image | Video


@dataclass(frozen=True)
class Answer:
    """What a model said, with the places it named in pixels of the upright original picture.

    confidence: from 0 to 1, the mean probability of the answer's tokens, None where it is not known; a box has the mean
    of its own. usage: prompt_tokens, completion_tokens and, where it is known, image_tokens (among the prompt's).
    timing: seconds to the first token and in all. error: why there is no answer, in a batch where others have one.
    """

    text: str = ""
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    confidence: float | None = 0.0
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
            **_sure(self),
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
        usage = self.usage
        read = f"{usage['prompt_tokens']} tokens read"
        if "image_tokens" in usage:
            text = usage["prompt_tokens"] - usage["image_tokens"]
            read = f"{usage['image_tokens']} image and {text} text tokens read"
        sure = "" if self.confidence is None else f"confidence {self.confidence:.0%}, "
        return f"{sure}{read}, {usage['completion_tokens']} written, {self.timing['total']:.2f} s"


def _pixels(*values: float) -> list[float]:
    return [round(value, 2) for value in values]


def _sure(found: Answer | Box | Point) -> dict[str, float | None]:
    return {"confidence": None if found.confidence is None else round(found.confidence, 4)}


class Stream:
    """Pieces of an answer's text as they come; `answer` is there once they have all been taken."""

    def __init__(self, pieces: Iterator[str | Answer]) -> None:
        self._pieces = pieces
        self.answer = Answer()

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, str):
                yield piece
            else:
                self.answer = piece


class Talker(ABC):
    """Something that answers conversations about pictures; safe to ask again and again, every call stands alone."""

    name: str

    @property
    def label(self) -> str:
        """What its answers are signed with."""
        return self.name

    @abstractmethod
    def answer(
        self, talks: Sequence[Conversation], sampling: Sampling | Sequence[Sampling] = Sampling()
    ) -> list[Answer]:
        """One answer per conversation, in order.

        A conversation that cannot be answered gets an `Answer` with its `error`, the others are not touched.
        """

    @abstractmethod
    def stream_chat(self, talk: Conversation, **sampling: Any) -> Stream:
        """As `chat`, piece by piece."""

    def ask(self, image: Picture | Sequence[Picture] | None, question: str, **sampling: Any) -> Answer:
        """Answer one question about a picture, several, or none: without one the language model answers alone.

        Pictures are paths, encoded bytes, Pillow pictures or arrays [height, width, 3] of uint8; a film, such as an
        animated GIF or a folder of frames, is some of its frames. `sampling` are the fields of `Sampling`. Raises
        InputError and CapacityError for what cannot be read.
        """
        return self.chat(conversation(image, question), **sampling)

    def stream(self, image: Picture | Sequence[Picture] | None, question: str, **sampling: Any) -> Stream:
        """As `ask`, piece by piece: iterate over the text, then read `.answer`."""
        return self.stream_chat(conversation(image, question), **sampling)

    def chat(self, talk: Conversation, **sampling: Any) -> Answer:
        """Answer the last message of a conversation, which must be the user's."""
        answer = self.answer([talk], sampling_of(sampling))[0]
        if answer.error is not None:
            raise answer.error
        return answer

    def said(self, answer: Answer, image: int = 0) -> Message:
        """An answer as a message, for the next turn of a conversation; its places are those of one of the images."""
        return Message("assistant", (Text(answer.text),))


def conversation(image: Picture | Sequence[Picture] | None, question: str) -> Conversation:
    """The conversation of one question about some pictures."""
    if not isinstance(question, str):
        raise InputError(f"the question is of the type {type(question).__name__}, expected words")
    if not question.strip():
        raise InputError("the question is empty, expected some words")
    return ask(question, *pictures(image))


def pictures(image: Picture | Sequence[Picture] | None) -> tuple[Image | Video, ...]:
    """Whatever pictures and films come as, decoded and upright."""
    if image is None:
        return ()
    given = image if isinstance(image, (list, tuple)) else (image,)
    return tuple(each if isinstance(each, Video) else open_media(each) for each in given)
