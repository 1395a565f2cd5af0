"""An interleaved conversation as values: parts, messages, conversations. Equal by content, so they can key a cache."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import PIL.Image

from .geometry import Box, Mask, Point

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Text:
    """A piece of text as its author typed it; it can never become a control token."""

    text: str


@dataclass(frozen=True, eq=False)
class Image:
    """A decoded, upright RGB picture; two images are equal when size and pixels are."""

    picture: PIL.Image.Image
    source: str = ""  # where it came from, for messages only

    @cached_property
    def digest(self) -> str:
        """sha256 over mode, size and pixels, in hexadecimal."""
        head = f"{self.picture.mode} {self.picture.size}".encode()
        return hashlib.sha256(head + self.picture.tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True)
class Video:
    """Frames of a film with their times in seconds, in order."""

    frames: tuple[Image, ...]
    times: tuple[float, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 over the digests of its frames and their times, in hexadecimal."""
        said = " ".join((*(frame.digest for frame in self.frames), *map(repr, self.times)))
        return hashlib.sha256(said.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Audio:
    """Mono samples in [-1, 1] at `rate` Hz."""

    samples: Any  # float32 array [n]
    rate: int

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.rate}".encode() + self.samples.tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Audio) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True)
class Region:
    """A place in an image of the same conversation, referred to or answered with."""

    shape: Box | Point | Mask
    image: int = 0  # which image of the conversation, counted from 0


@dataclass(frozen=True)
class Piece:
    """A stretch of what a model reads or writes: ordinary text, or one control token by its name.

    As a part of a message it is a program's; what people type is a `Text`.
    """

    text: str
    control: bool = False


Part = Text | Image | Video | Audio | Region | Piece


@dataclass(frozen=True)
class Message:
    """What one role says in one turn."""

    role: Role
    parts: tuple[Part, ...] = field(default=())

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))


Conversation = tuple[Message, ...]


def ask(question: str, *images: Image | Video, answer: str | None = None) -> Conversation:
    """The conversation of one question about some images or films, with its answer when it is known."""
    user = Message("user", (*images, Text(question)))
    return (user,) if answer is None else (user, Message("assistant", (Text(answer),)))


def media_of(conversation: Conversation) -> tuple[Image | Video, ...]:
    """Every image and every film of a conversation, in order; a film counts once."""
    return tuple(part for message in conversation for part in message.parts if isinstance(part, (Image, Video)))


def images_of(conversation: Conversation) -> tuple[Image, ...]:
    """Every image of a conversation, in order; a video's frames count one by one."""
    found: list[Image] = []
    for message in conversation:
        for part in message.parts:
            if isinstance(part, Image):
                found.append(part)
            elif isinstance(part, Video):
                found.extend(part.frames)
    return tuple(found)


def sounds_of(conversation: Conversation) -> tuple[Audio, ...]:
    """Every sound of a conversation, in order."""
    return tuple(part for message in conversation for part in message.parts if isinstance(part, Audio))
