"""InternVL's convention: `<ref>the cat</ref><box>[[x1, y1, x2, y2], [x1, y1, x2, y2]]</box>`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import steps
from .ref_box import RefBox

_NUMBER = r"\s*(?:1000(?:\.0*)?|\d{1,3}(?:\.\d*)?)\s*"
_BOX = rf"\[{_NUMBER}(?:,{_NUMBER}){{3}}\]"
_BOXES = re.compile(rf"\s*\[\s*{_BOX}(?:\s*,\s*{_BOX})*\s*\]\s*")


@dataclass(frozen=True)
class InternVLBoxes(RefBox):
    """InternVL's convention (arXiv:2404.16821): thousandths of the picture, all boxes of a name in one list.

    As in the family's evaluation, numbers that add up to less than 4 are shares; but whole ones never are, or a box of
    one thousandth would come back as the whole picture.
    """

    asks: ClassVar[str] = "Please provide the bounding box coordinate of the region this sentence describes: {}"

    def _spell(self, boxes: Sequence[Sequence[float]]) -> list[str]:
        lists = (", ".join(str(steps(share, 1000, 1000)) for share in box) for box in boxes)
        return [f"[{', '.join(f'[{numbers}]' for numbers in lists)}]"]

    def _read(self, text: str, tag: str) -> list[Sequence[float]]:
        if tag != "</box>" or not _BOXES.fullmatch(text):
            return []
        numbers = re.findall(r"[\d.]+", text)
        return [_shares(numbers[i : i + 4]) for i in range(0, len(numbers), 4)]


def _shares(numbers: list[str]) -> list[float]:
    values = [float(number) for number in numbers]
    if sum(values) < 4 and any("." in number for number in numbers):
        return values
    return [value / 1000 for value in values]
