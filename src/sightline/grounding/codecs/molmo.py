"""Molmo's convention: `<point x="12.3" y="45.6" alt="cat">cat</point>`, several as x1, y1, x2, y2 in `<points>`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...core.errors import InputError
from ...core.geometry import Box, Transform
from ...core.sequence import Piece
from .base import Codec, Grounded, Place, by_label, corners, grounded, original, placed, plain

_TAG = re.compile(r"<(points?)\s([^<>]*)>|</(points?)>")  # one tag at a time: a search for the closing one may be long
_NAME = re.compile(r'(?:^|\s)alt="([^"]*)"\s*$')
_PAIR = re.compile(r'\s*x(\d{0,4})="\s*(\d{1,3}(?:\.\d*)?)\s*"\s+y(\d{0,4})="\s*(\d{1,3}(?:\.\d*)?)\s*"(?:\s|$)')


@dataclass(frozen=True)
class MolmoPoints(Codec):
    """Molmo's convention (arXiv:2409.17146): points in percent of the picture to one decimal, sorted by x, then y.

    The tags are ordinary text. A tag with a number beyond 100 is malformed, as the family's own reader has it.
    """

    asks: ClassVar[str] = "Point to {}\nPlease say 'This isn't in the image.' if it is not in the image."

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        if any(isinstance(place, Box) for place in places):
            raise InputError("this model family writes points, a box has no form in it")
        return [Piece(" ".join(self._tag(*group, original(transform)) for group in by_label(places)))] if places else []

    def _tag(self, label: str, places: list[Place], way: Transform) -> str:
        shares = ([min(max(share, 0.0), 1.0) * 100 for share in corners(place, way)] for place in places)
        points = sorted((round(x, 1), round(y, 1)) for x, y in shares)
        name = re.sub(r'["<>]', "", label)  # these would end the attribute, or begin a tag
        if len(points) == 1:
            return f'<point x="{points[0][0]:.1f}" y="{points[0][1]:.1f}" alt="{name}">{name}</point>'
        numbers = " ".join(f'x{i}="{x:.1f}" y{i}="{y:.1f}"' for i, (x, y) in enumerate(points, 1))
        return f'<points {numbers} alt="{name}">{name}</points>'

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        text = plain(pieces)
        words: list[str] = []
        places: list[Place] = []
        start, opened = 0, ""
        for found in _TAG.finditer(text):
            points, label = _points(found[2]) if found[2] is not None else ([], "")
            if points or (opened and found[3] == opened):  # a malformed tag stays text, and so does its end
                places += [placed(shares, original(transform), label) for shares in points]
                words.append(text[start : found.start()])
                start, opened = found.end(), found[1] if points else ""
        return grounded("".join((*words, text[start:])).strip(), places)


def _points(attributes: str) -> tuple[list[tuple[float, float]], str]:
    """The points of a tag as shares and their name; no points where anything else stands among its attributes."""
    named = _NAME.search(attributes)
    numbers = attributes[: named.start()] if named else attributes
    points: list[tuple[float, float]] = []
    end = 0
    while found := _PAIR.match(numbers, end):
        x, y = float(found[2]) / 100, float(found[4]) / 100
        if found[1] != found[3] or max(x, y) > 1:
            return [], ""
        points.append((x, y))
        end = found.end()
    return ([], "") if numbers[end:].strip() else (points, named[1].strip() if named else "")
