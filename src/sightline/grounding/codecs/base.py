"""What every convention shares: the codec's interface, and places as shares of a frame there and back."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Protocol

from ...core.errors import InputError
from ...core.geometry import Box, Point, Transform
from ...core.sequence import Image, Part, Piece, Text, Video

Place = Box | Point


@dataclass(frozen=True)
class Grounded:
    """An answer's readable text and the places it names, in pixels of the original picture.

    codes: the mask of each box as indices into a codebook, where the family writes masks; none for a box without one.
    """

    text: str
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    codes: tuple[tuple[int, ...], ...] = ()


class Codec(Protocol):
    """How one family writes places, and how it is asked for them.

    asks: the question where everything is that a phrase names, the phrase in the place of `{}`; empty where there is
    no question that it was taught.
    """

    asks: ClassVar[str] = ""

    def find(self, phrase: str, *pictures: Image | Video) -> tuple[Part, ...]:
        """The parts of that question about some pictures; InputError where there is none."""
        if not self.asks:
            raise InputError("this model family was taught no question for places, ask it in your own words")
        return (*pictures, Text(self.asks.format(phrase)))

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        """Places of the original picture in the family's form; a label is ordinary text, whatever it says."""
        ...

    def encode(self, places: Sequence[Place], transform: Transform) -> str:
        """The same as one text, control tokens by their names."""
        return "".join(piece.text for piece in self.write(places, transform))

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        """Places in decoded output; what is malformed stays text."""
        ...


def corners(place: Place, transform: Transform) -> tuple[float, ...]:
    """Two or four numbers, each a share of the model's frame."""
    moved = transform.apply(place)
    width, height = transform.target.width, transform.target.height
    if isinstance(moved, Point):
        return moved.x / width, moved.y / height
    return moved.x1 / width, moved.y1 / height, moved.x2 / width, moved.y2 / height


def placed(shares: Sequence[float], transform: Transform, label: str) -> Place:
    """The original's place for shares of the model's frame, clipped to the picture; corners may come in any order."""
    frame = transform.target
    if len(shares) == 2:
        point = transform.invert(Point(shares[0] * frame.width, shares[1] * frame.height, frame, label))
        x, y = min(max(point.x, 0.0), point.frame.width), min(max(point.y, 0.0), point.frame.height)
        return Point(x, y, point.frame, label)
    xs, ys = sorted((shares[0], shares[2])), sorted((shares[1], shares[3]))
    model = Box(xs[0] * frame.width, ys[0] * frame.height, xs[1] * frame.width, ys[1] * frame.height, frame, label)
    return transform.invert(model).clipped()


def original(transform: Transform) -> Transform:
    """The way of families whose numbers are shares of the original, however the model's picture was cut or padded."""
    return Transform(transform.source)


def steps(share: float, top: int, last: int) -> int:
    """A share as the nearest of the whole numbers 0 to `last`, of which `top` would be the far edge."""
    return min(max(round(share * top), 0), last)


def only_boxes(places: Iterable[Place]) -> None:
    """InputError for a point, where a family has no form for one."""
    if any(isinstance(place, Point) for place in places):
        raise InputError("this model family writes boxes, a point has no form in it")


def by_label(places: Sequence[Place]) -> Iterator[tuple[str, list[Place]]]:
    """Neighbours of one label together."""
    for label, group in groupby(places, key=lambda place: place.label.strip()):
        yield label, list(group)


def grounded(text: str, places: Iterable[Place]) -> Grounded:
    """A text and its places, boxes and points apart."""
    found = list(places)
    boxes = tuple(place for place in found if isinstance(place, Box))
    return Grounded(text, boxes, tuple(place for place in found if isinstance(place, Point)))


def plain(pieces: Iterable[Piece]) -> str:
    """The text of an answer without its control tokens."""
    return "".join(piece.text for piece in pieces if not piece.control).strip()


def bracketed(text: str, pattern: re.Pattern[str], top: float, transform: Transform) -> list[Place]:
    """Places in brackets: numbers of which `top` is the far edge, groups joined by semicolons.

    pattern: one group, all that stands in the bracket. The words before a bracket name its places.
    """
    places: list[Place] = []
    start = 0
    for found in pattern.finditer(text):
        label = _last_clause(text[start : found.start()])
        for group in found[1].split(";"):
            places.append(placed([float(number) / top for number in group.split(",")], transform, label))
        start = found.end()
    return places


def _last_clause(text: str) -> str:
    """The words just before a bracket, back to the last punctuation."""
    return re.split(r"[.,;:!?\n]", text.rstrip(" :"))[-1].strip()
