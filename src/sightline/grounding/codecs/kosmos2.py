"""Kosmos-2's convention: `<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object>`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...core.geometry import Transform
from ...core.sequence import Image, Part, Piece, Text, Video
from .base import Codec, Grounded, Place, by_label, corners, grounded, only_boxes, placed, plain

_DELIMITER = "</delimiter_of_multi_objects/>"


@dataclass(frozen=True)
class Kosmos2Patches(Codec):
    """Kosmos-2's convention (arXiv:2306.14824): a phrase, then the first and last cell of each of its boxes.

    The model's picture is a grid of `side` x `side` cells, numbered row by row. A box is read from middle to middle of
    its two cells; where they share a row or a column that would be a line, and their outer edges are taken.
    """

    side: int = 32

    def find(self, phrase: str, *pictures: Image | Video) -> tuple[Part, ...]:
        """The phrase, after which the model goes on with its places."""
        return (*pictures, Piece("<phrase>", control=True), Text(f" {phrase}"), Piece("</phrase>", control=True))

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        only_boxes(places)
        pieces: list[Piece] = []
        for label, group in by_label(places):
            if label:
                pieces += [Piece("<phrase>", control=True), Piece(f" {label}"), Piece("</phrase>", control=True)]
            names = ["<object>"]
            for i, place in enumerate(group):
                names += [_DELIMITER] if i else []
                names += [f"<patch_index_{k:04d}>" for k in self._cells(corners(place, transform))]
            pieces += [Piece(name, control=True) for name in (*names, "</object>")]
        return pieces

    def _cells(self, shares: Sequence[float]) -> tuple[int, int]:
        last = self.side - 1
        x1, y1 = (min(max(math.floor(share * self.side), 0), last) for share in shares[:2])
        x2, y2 = (min(max(math.ceil(share * self.side - 1), 0), last) for share in shares[2:])
        return y1 * self.side + x1, max(y1, y2) * self.side + max(x1, x2)  # an empty box has a cell too

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        places: list[Place] = []
        for i, piece in enumerate(pieces):
            if piece == Piece("<object>", control=True):
                places += [placed(shares, transform, _phrase(pieces, i)) for shares in self._object(pieces, i + 1)]
        return grounded(plain(pieces), places)

    def _object(self, pieces: Sequence[Piece], i: int) -> list[tuple[float, ...]]:
        """Shares of the boxes from piece i on, up to `</object>`; none where anything else comes between."""
        found: list[tuple[float, ...]] = []
        while True:
            cells = [self._cell(piece) for piece in pieces[i : i + 2]]
            after = pieces[i + 2] if i + 2 < len(pieces) else Piece("")
            if None in cells or not after.control or after.text not in (_DELIMITER, "</object>"):
                return []
            found.append(self._shares(*(cell for cell in cells if cell is not None)))
            if after.text == "</object>":
                return found
            i += 3

    def _cell(self, piece: Piece) -> int | None:
        number = re.fullmatch(r"<patch_index_(\d{4,9})>", piece.text) if piece.control else None
        return int(number[1]) if number and int(number[1]) < self.side**2 else None

    def _shares(self, first: int, last: int) -> tuple[float, ...]:
        (y1, x1), (y2, x2) = divmod(first, self.side), divmod(last, self.side)
        inset = 0.5 if x1 != x2 and y1 != y2 else 0.0
        ends = (x1 + inset, y1 + inset, x2 + 1 - inset, y2 + 1 - inset)
        return tuple(end / self.side for end in ends)


def _phrase(pieces: Sequence[Piece], i: int) -> str:
    """The phrase that ends right before piece i, or nothing."""
    if i < 3:
        return ""
    opening, words, closing = pieces[i - 3 : i]
    tags = opening == Piece("<phrase>", control=True) and closing == Piece("</phrase>", control=True)
    return words.text.strip() if tags and not words.control else ""
