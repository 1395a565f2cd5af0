"""Qwen-VL's convention: `<ref>the cat</ref><box>(x1,y1),(x2,y2)</box>`, quadrangles in `<quad>`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .base import steps
from .ref_box import RefBox

_POINT = r"\(\s*(1000|\d{1,3})\s*,\s*(1000|\d{1,3})\s*\)"
_FORMS = {
    "</box>": re.compile(rf"\s*{_POINT}\s*,\s*{_POINT}\s*"),
    "</quad>": re.compile(rf"\s*{_POINT}\s*,\s*{_POINT}\s*,\s*{_POINT}\s*,\s*{_POINT}\s*"),
}


@dataclass(frozen=True)
class QwenVLBoxes(RefBox):
    """Qwen-VL's convention (arXiv:2308.12966): whole numbers in [0, 1000), a `<box>` for each place of a name.

    top: the number that is the far edge. The family's evaluation divides by 999, its drawing code by 1000. A quadrangle
    is read as the box around it.
    """

    top: int = 999

    def _spell(self, boxes: Sequence[Sequence[float]]) -> list[str]:
        numbers = ([steps(share, self.top, 999) for share in box] for box in boxes)
        return [f"({x1},{y1}),({x2},{y2})" for x1, y1, x2, y2 in numbers]

    def _read(self, text: str, tag: str) -> list[Sequence[float]]:
        found = _FORMS[tag].fullmatch(text) if tag in _FORMS else None
        if found is None:
            return []
        shares = [int(number) / self.top for number in found.groups()]
        return [(min(shares[::2]), min(shares[1::2]), max(shares[::2]), max(shares[1::2]))]
