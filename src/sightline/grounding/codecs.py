"""Regions to a family's own text and back; what comes back is in pixels of the original picture.

| codec | text | frame of its numbers |
|---|---|---|
| `LocationTokens` | `red circle<box><loc012><loc034><loc056><loc078>`, `<point>...` | 128 bins of the model's picture |
| `Decimals` | `[0.123,0.456,0.789,0.999]`, joined by `;`, points `[x,y]` | share of the padded square |
| `PaliGemmaLocations` | `<loc0102><loc0204><loc0306><loc0408> cat ; ...` | 1024 bins, top first |
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.errors import InputError
from ..core.geometry import Box, Point, Transform
from ..core.sequence import Piece

Place = Box | Point


@dataclass(frozen=True)
class Grounded:
    """An answer's readable text and the places it names, in pixels of the original picture."""

    text: str
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()


class Codec(Protocol):
    """How one family writes places."""

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        """Places of the original picture in the family's form; a label is ordinary text, whatever it says."""
        ...

    def encode(self, places: Sequence[Place], transform: Transform) -> str:
        """The same as one text, control tokens by their names."""
        return "".join(piece.text for piece in self.write(places, transform))

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        """Places in decoded output; what is malformed stays text."""
        ...


def _corners(place: Place, transform: Transform) -> tuple[float, ...]:
    """Two or four numbers, each a share of the model's frame."""
    moved = transform.apply(place)
    width, height = transform.target.width, transform.target.height
    if isinstance(moved, Point):
        return moved.x / width, moved.y / height
    return moved.x1 / width, moved.y1 / height, moved.x2 / width, moved.y2 / height


def _place(shares: Sequence[float], transform: Transform, label: str) -> Place:
    """The original's place for shares of the model's frame, clipped to the picture; corners may come in any order."""
    frame = transform.target
    if len(shares) == 2:
        point = transform.invert(Point(shares[0] * frame.width, shares[1] * frame.height, frame, label))
        x, y = min(max(point.x, 0.0), point.frame.width), min(max(point.y, 0.0), point.frame.height)
        return Point(x, y, point.frame, label)
    xs, ys = sorted((shares[0], shares[2])), sorted((shares[1], shares[3]))
    model = Box(xs[0] * frame.width, ys[0] * frame.height, xs[1] * frame.width, ys[1] * frame.height, frame, label)
    return transform.invert(model).clipped()


def _grounded(text: str, places: Iterable[Place]) -> Grounded:
    found = list(places)
    boxes = tuple(place for place in found if isinstance(place, Box))
    return Grounded(text, boxes, tuple(place for place in found if isinstance(place, Point)))


@dataclass(frozen=True)
class LocationTokens(Codec):
    """This project's own convention: a label, then `<box>` and left, top, right, bottom, or `<point>` and x, y.

    Each number is one control token of `bins` equal cells of the model's picture; a cell is read as its middle.
    """

    bins: int = 128

    @property
    def names(self) -> tuple[str, ...]:
        """Every control token of the convention."""
        return ("<box>", "<point>", *(self.name(k) for k in range(self.bins)))

    def name(self, k: int) -> str:
        return f"<loc{k:03d}>"

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        pieces: list[Piece] = []
        for place in places:
            cells = (min(self.bins - 1, max(0, int(share * self.bins))) for share in _corners(place, transform))
            names = ("<box>" if isinstance(place, Box) else "<point>", *map(self.name, cells))
            pieces += [Piece(place.label)] if place.label else []
            pieces += [Piece(name, control=True) for name in names]
        return pieces

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        words: list[str] = []
        places: list[Place] = []
        label, i = "", 0
        while i < len(pieces):
            piece = pieces[i]
            count = {"<box>": 4, "<point>": 2}.get(piece.text, 0) if piece.control else 0
            cells = [self._cell(each) for each in pieces[i + 1 : i + 1 + count]]
            if count and len(cells) == count and None not in cells:
                shares = [(cell + 0.5) / self.bins for cell in cells if cell is not None]
                places.append(_place(shares, transform, label))
                i += count
            elif not piece.control:
                label = piece.text.strip(" ,;.")
                words.append(piece.text.strip())
            i += 1
        return _grounded(", ".join(word for word in words if word) if places else " ".join(words), places)

    def _cell(self, piece: Piece) -> int | None:
        found = re.fullmatch(r"<loc(\d{3,9})>", piece.text) if piece.control else None
        cell = int(found[1]) if found else self.bins
        return cell if cell < self.bins and self.name(cell) == piece.text else None


# each number can be read in one way only: with two, a list cut off before its bracket took time 2^numbers
_NUMBER = r"\s*(?:\.\d+|[01](?:\.\d*)?)\s*"
_GROUP = rf"{_NUMBER}(?:,{_NUMBER}){{3}}|{_NUMBER},{_NUMBER}"
_BRACKET = re.compile(rf"\[((?:{_GROUP})(?:;(?:{_GROUP}))*)\]")


@dataclass(frozen=True)
class Decimals(Codec):
    """LLaVA's and Shikra's convention (arXiv:2306.15195): three decimals in brackets, boxes joined by semicolons."""

    digits: int = 3

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        groups = (
            ",".join(f"{min(max(share, 0.0), 1.0):.{self.digits}f}" for share in _corners(place, transform))
            for place in places
        )
        return [Piece(f"[{';'.join(groups)}]")] if places else []

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        text = "".join(piece.text for piece in pieces if not piece.control).strip()
        places: list[Place] = []
        start = 0
        for found in _BRACKET.finditer(text):
            label = _last_clause(text[start : found.start()])
            for group in found[1].split(";"):
                places.append(_place([float(number) for number in group.split(",")], transform, label))
            start = found.end()
        return _grounded(text, places)


def _last_clause(text: str) -> str:
    """The words just before a bracket, back to the last punctuation."""
    return re.split(r"[.,;:!?\n]", text.rstrip(" :"))[-1].strip()


_LOCATED = re.compile(r"((?:<loc\d{4}>){4})((?:<seg\d{3}>)*)\s*([^;<]*)")


@dataclass(frozen=True)
class PaliGemmaLocations(Codec):
    """PaliGemma's convention (arXiv:2407.07726, big_vision): top, left, bottom, right as tokens, then the label.

    A share v is written as round(v * 1023); segment tokens that may follow a box are read over.
    """

    bins: int = 1024

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        pieces: list[Piece] = []
        for i, place in enumerate(places):
            pieces += [Piece(name, control=True) for name in self._names(place, transform)]
            words = f" {place.label}".rstrip() + (" ; " if i + 1 < len(places) else "")
            pieces += [Piece(words)] if words else []
        return pieces

    def _names(self, place: Place, transform: Transform) -> list[str]:
        if isinstance(place, Point):
            raise InputError("this model family writes boxes, a point has no form in it")
        x1, y1, x2, y2 = (min(max(round(v * (self.bins - 1)), 0), self.bins - 1) for v in _corners(place, transform))
        return [f"<loc{k:04d}>" for k in (y1, x1, y2, x2)]

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        kept = [piece for piece in pieces if not piece.control or re.fullmatch(r"<(loc\d{4}|seg\d{3})>", piece.text)]
        text = "".join(piece.text for piece in kept)
        places = []
        for found in _LOCATED.finditer(text):
            cells = (min(int(k), self.bins - 1) for k in re.findall(r"<loc(\d{4})>", found[1]))
            y1, x1, y2, x2 = (cell / (self.bins - 1) for cell in cells)
            places.append(_place((x1, y1, x2, y2), transform, found[3].strip()))
        plain = re.sub(r"<(loc\d{4}|seg\d{3})>", "", text).strip()
        if places:  # without the spaces and semicolons that stood around tokens
            plain = " ; ".join(" ".join(clause.split()) for clause in plain.split(";") if clause.strip())
        return _grounded(plain, places)


CODECS: dict[str, Codec] = {
    "location-tokens": LocationTokens(),
    "decimals": Decimals(),
    "paligemma": PaliGemmaLocations(),
}
