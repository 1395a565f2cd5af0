"""This project's own convention: `red circle<box><loc012><loc034><loc056><loc078>`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...core.geometry import Box, Transform
from ...core.sequence import Piece
from .base import Codec, Grounded, Place, corners, grounded, placed


@dataclass(frozen=True)
class LocationTokens(Codec):
    """This project's own convention: a label, then `<box>` and left, top, right, bottom, or `<point>` and x, y.

    Each number is one control token of `bins` equal cells of the model's picture; a cell is read as its middle.
    """

    bins: int = 128
    asks: ClassVar[str] = "Locate every {}."

    @property
    def names(self) -> tuple[str, ...]:
        """Every control token of the convention."""
        return ("<box>", "<point>", *(self.name(k) for k in range(self.bins)))

    def name(self, k: int) -> str:
        return f"<loc{k:03d}>"

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        pieces: list[Piece] = []
        for place in places:
            cells = (min(self.bins - 1, max(0, int(share * self.bins))) for share in corners(place, transform))
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
                places.append(placed(shares, transform, label))
                i += count
            elif not piece.control:
                label = piece.text.strip(" ,;.")
                words.append(piece.text.strip())
            i += 1
        return grounded(", ".join(word for word in words if word) if places else " ".join(words), places)

    def _cell(self, piece: Piece) -> int | None:
        found = re.fullmatch(r"<loc(\d{3,9})>", piece.text) if piece.control else None
        cell = int(found[1]) if found else self.bins
        return cell if cell < self.bins and self.name(cell) == piece.text else None
