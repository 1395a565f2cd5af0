"""Qwen-VL's convention, `<ref>the cat</ref><box>(x1,y1),(x2,y2)</box>`, and what its successors made of it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...core.geometry import Transform
from ...core.sequence import Image, Part, Piece, Video
from .base import Codec, Grounded, Place, corners, grounded, placed, plain, steps
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
    is read as the box around it. Asked for a place, it goes on with the numbers of an opened box, as in that evaluation
    (QwenLM/Qwen-VL, eval_mm/evaluate_grounding.py).
    """

    top: int = 999
    asks: ClassVar[str] = "{}"

    def find(self, phrase: str, *pictures: Image | Video) -> tuple[Part, ...]:
        return (*super().find(phrase, *pictures), self._tag("<box>"))

    def _spell(self, boxes: Sequence[Sequence[float]]) -> list[str]:
        numbers = ([steps(share, self.top, 999) for share in box] for box in boxes)
        return [f"({x1},{y1}),({x2},{y2})" for x1, y1, x2, y2 in numbers]

    def _read(self, text: str, tag: str) -> list[Sequence[float]]:
        found = _FORMS[tag].fullmatch(text) if tag in _FORMS else None
        if found is None:
            return []
        shares = [int(number) / self.top for number in found.groups()]
        return [(min(shares[::2]), min(shares[1::2]), max(shares[::2]), max(shares[1::2]))]


@dataclass(frozen=True)
class QwenVLChatBoxes(QwenVLBoxes):
    """The same of Qwen-VL-Chat, which is asked in Chinese as on its page, to frame something where it is."""

    asks: ClassVar[str] = "框出图中{}的位置"

    def find(self, phrase: str, *pictures: Image | Video) -> tuple[Part, ...]:
        return Codec.find(self, phrase, *pictures)


@dataclass(frozen=True)
class Qwen2VLBoxes(QwenVLBoxes):
    """Qwen2-VL's convention (arXiv:2409.12191): Qwen-VL's with other tags, numbers in thousandths.

    Its makers publish no question; this is the one of the tool that it is mostly tuned with (modelscope/ms-swift).
    """

    tags = {  # noqa: RUF012 # the base names its kind
        f"<{end}{ours}>": f"<|{theirs}_{'end' if end else 'start'}|>"
        for ours, theirs in (("ref", "object_ref"), ("box", "box"), ("quad", "quad"))
        for end in ("", "/")
    }
    top: int = 1000
    asks: ClassVar[str] = "Find the {} in the image"

    def find(self, phrase: str, *pictures: Image | Video) -> tuple[Part, ...]:
        return RefBox.find(self, phrase, *pictures)


_LIST = re.compile(r"(?:```json\s*)?\[\s*(\{[^{}]*\}(?:\s*,\s*\{[^{}]*\})*)\s*\](?:\s*```)?")
_OBJECT = re.compile(r"\{[^{}]*\}")
_SIZES = {"bbox_2d": 4, "point_2d": 2}


class Qwen25VLJson(Codec):
    """Qwen2.5-VL's convention (arXiv:2502.13923): a list in JSON, whole pixels of the picture as the model sees it."""

    asks: ClassVar[str] = "Outline the position of each {} and output all the coordinates in JSON format."

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        frame, lines = transform.target, []
        for place in places:
            shares = corners(place, transform)
            sides = (frame.width, frame.height) * (len(shares) // 2)
            numbers = [round(share * side) for share, side in zip(shares, sides, strict=True)]
            name = "bbox_2d" if len(numbers) == 4 else "point_2d"
            said = {name: numbers} | ({"label": place.label.strip()} if place.label.strip() else {})
            lines.append(f"\t{json.dumps(said, ensure_ascii=False)}")
        return [Piece("```json\n[\n" + ",\n".join(lines) + "\n]\n```")] if lines else []

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        """Places in decoded output; in its text, a list gives way to the names of its places."""
        places: list[Place] = []

        def named(found: re.Match[str]) -> str:
            read = [_place(text, transform) for text in _OBJECT.findall(found[1])]
            known = [place for place in read if place is not None]
            if len(known) < len(read):
                return found[0]
            places.extend(known)
            return ", ".join(dict.fromkeys(place.label for place in known if place.label))

        text = _LIST.sub(named, plain(pieces))
        return grounded(text.strip(), places)


def _place(text: str, transform: Transform) -> Place | None:
    """The place that an object in JSON names; None where it is malformed or has none."""
    try:
        said = json.loads(text)
    except ValueError:
        return None
    name = next((name for name in _SIZES if name in said), "")
    numbers, label = said.get(name), said.get("label", "")
    right = isinstance(numbers, list) and all(type(number) in (int, float) for number in numbers)
    if not right or len(numbers) != _SIZES[name] or not isinstance(label, str):
        return None
    frame = transform.target
    sides = (frame.width, frame.height) * (len(numbers) // 2)
    return placed([number / side for number, side in zip(numbers, sides, strict=True)], transform, label)
