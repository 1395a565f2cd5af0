"""Ferret's convention: `a cat [x1, y1, x2, y2]`; a place asked about is followed by `<region_fea>`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...core.geometry import Transform
from ...core.sequence import Piece
from .base import Codec, Grounded, Place, bracketed, corners, grounded, original, plain

REGION = "<region_fea>"  # where the region sampler's features go

_NUMBER = r"\s*(?:1000|\d{1,3})\s*"
_BRACKET = re.compile(rf"\[({_NUMBER}(?:,{_NUMBER}){{3}}|{_NUMBER},{_NUMBER})\]")


@dataclass(frozen=True)
class FerretNumbers(Codec):
    """Ferret's convention (arXiv:2310.07704): thousandths, rounded down, after the name of each place.

    It is asked as its evaluation does (apple/ml-ferret, ferret/eval/model_refcoco.py).
    """

    asks: ClassVar[str] = "What is the location of {} in the image?"

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        text = ", ".join(f"{place.label} {self._numbers(place, transform)}".lstrip() for place in places)
        return [Piece(text)] if places else []

    def refer(self, place: Place, transform: Transform) -> list[Piece]:
        """A place in a question: its numbers, then the token that holds the features of its region."""
        return [Piece(f"{self._numbers(place, transform)} "), Piece(REGION, control=True)]

    def _numbers(self, place: Place, transform: Transform) -> str:
        shares = corners(place, original(transform))
        return f"[{', '.join(str(min(max(int(share * 1000), 0), 1000)) for share in shares)}]"

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        text = plain(pieces)
        return grounded(text, bracketed(text, _BRACKET, 1000, original(transform)))
