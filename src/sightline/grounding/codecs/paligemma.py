"""PaliGemma's convention: `<loc0102><loc0204><loc0306><loc0408> cat ; ...`, with sixteen `<segNNN>` where masks are."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...core.geometry import Box, Transform
from ...core.sequence import Piece
from .base import Codec, Grounded, Place, corners, only_boxes, placed, steps

_TOKEN = re.compile(r"<(loc\d{4}|seg\d{3})>")
_LOCATED = re.compile(r"((?:<loc\d{4}>){4})((?:<seg\d{3}>)*)\s*([^;<]*)")
_MASK = 16  # codes of one mask, a grid of 4 x 4
_CODEBOOK = 128


@dataclass(frozen=True)
class PaliGemmaLocations(Codec):
    """PaliGemma's convention (arXiv:2407.07726, big_vision): top, left, bottom, right as tokens, then the label.

    A share v is written as round(v * 1023). Sixteen segment tokens after a box are its mask, as codes of a codebook of
    128 whose picture covers the box; fewer, more or others are read over.
    """

    bins: int = 1024
    asks: ClassVar[str] = "detect {}"

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        only_boxes(places)
        pieces: list[Piece] = []
        for i, place in enumerate(places):
            x1, y1, x2, y2 = (steps(v, self.bins - 1, self.bins - 1) for v in corners(place, transform))
            pieces += [Piece(f"<loc{k:04d}>", control=True) for k in (y1, x1, y2, x2)]
            words = f" {place.label}".rstrip() + (" ; " if i + 1 < len(places) else "")
            pieces += [Piece(words)] if words else []
        return pieces

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        text = "".join(piece.text for piece in pieces if not piece.control or _TOKEN.fullmatch(piece.text))
        boxes: list[Box] = []
        codes: list[tuple[int, ...]] = []
        for found in _LOCATED.finditer(text):
            cells = (min(int(k), self.bins - 1) for k in re.findall(r"<loc(\d{4})>", found[1]))
            y1, x1, y2, x2 = (cell / (self.bins - 1) for cell in cells)
            box = placed((x1, y1, x2, y2), transform, found[3].strip())
            assert isinstance(box, Box)  # four numbers
            boxes.append(box)
            mask = tuple(int(k) for k in re.findall(r"<seg(\d{3})>", found[2]))
            codes.append(mask if len(mask) == _MASK and max(mask) < _CODEBOOK else ())
        words = _TOKEN.sub("", text).strip()
        if boxes:  # without the spaces and semicolons that stood around tokens
            words = " ; ".join(" ".join(clause.split()) for clause in words.split(";") if clause.strip())
        return Grounded(words, tuple(boxes), codes=tuple(codes) if any(codes) else ())
