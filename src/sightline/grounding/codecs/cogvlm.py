"""CogVLM's convention: `[[012,034,567,890]]`, several joined by `;`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...core.geometry import Transform
from ...core.sequence import Piece
from .base import Codec, Grounded, Place, bracketed, corners, grounded, only_boxes, original, plain, steps

_NUMBER = r"\s*\d{1,3}\s*"
_BOX = rf"{_NUMBER}(?:,{_NUMBER}){{3}}"
_BRACKET = re.compile(rf"\[\[({_BOX}(?:;{_BOX})*)\]\]")


@dataclass(frozen=True)
class CogVLMBoxes(Codec):
    """CogVLM's convention (arXiv:2311.03079): thousandths in three digits, boxes joined by semicolons."""

    asks: ClassVar[str] = "Where is {}? answer in [[x0,y0,x1,y1]] format."

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        only_boxes(places)
        way = original(transform)
        groups = (",".join(f"{steps(share, 1000, 999):03d}" for share in corners(place, way)) for place in places)
        return [Piece(f"[[{';'.join(groups)}]]")] if places else []

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        text = plain(pieces)
        return grounded(text, bracketed(text, _BRACKET, 1000, original(transform)))
