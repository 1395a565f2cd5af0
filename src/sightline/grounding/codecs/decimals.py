"""LLaVA's and Shikra's convention: `[0.123,0.456,0.789,0.999]`, several joined by `;`, points `[x,y]`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...core.geometry import Transform
from ...core.sequence import Image, Part, Piece, Text, Video
from .base import Codec, Grounded, Place, bracketed, corners, grounded, plain

# each number can be read in one way only: with two, a list cut off before its bracket took time 2^numbers
_NUMBER = r"\s*(?:\.\d+|[01](?:\.\d*)?)\s*"
_GROUP = rf"{_NUMBER}(?:,{_NUMBER}){{3}}|{_NUMBER},{_NUMBER}"
_BRACKET = re.compile(rf"\[((?:{_GROUP})(?:;(?:{_GROUP}))*)\]")


@dataclass(frozen=True)
class Decimals(Codec):
    """LLaVA's and Shikra's convention (arXiv:2306.15195): three decimals in brackets, boxes joined by semicolons.

    The numbers are shares of the model's picture, which both families pad to a square (Shikra in white).
    """

    digits: int = 3
    asks: ClassVar[str] = "Please provide the bounding box coordinate of the region this sentence describes: {}."

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        groups = (
            ",".join(f"{min(max(share, 0.0), 1.0):.{self.digits}f}" for share in corners(place, transform))
            for place in places
        )
        return [Piece(f"[{';'.join(groups)}]")] if places else []

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        text = plain(pieces)
        return grounded(text, bracketed(text, _BRACKET, 1.0, transform))


@dataclass(frozen=True)
class ShikraDecimals(Decimals):
    """The same of Shikra, whose question names the picture where it stands (arXiv:2306.15195, table 9)."""

    def find(self, phrase: str, *pictures: Image | Video) -> tuple[Part, ...]:
        return Text("In the given "), *pictures, Text(f", could you find and tell me the coordinates of {phrase}?")
