"""Boxes in pixels of pictures: COCO's objects, RefCOCO's phrases."""

from collections import defaultdict
from typing import Any

from ...core.errors import DataError
from ...core.geometry import Box, Frame
from ...core.sequence import Image, Message, Region
from .base import Files, Reader, Record, asked, checked, load, number, objects, take, text

EDGE = 1.0  # pixels that a box may stand out of its picture by, as rounding makes them


def box_of(xywh: Any, picture: Image, about: dict[str, Any], label: str) -> Box:
    """A box [left, top, width, height] in pixels of a picture whose row says how large it is."""
    frame = Frame(*picture.picture.size)
    said = tuple(about.get(side, getattr(frame, side)) for side in ("width", "height"))
    if said != (frame.width, frame.height):
        raise DataError(f"boxes in a picture of {said[0]}x{said[1]}, found {frame.width:g}x{frame.height:g} pixels")
    numbers = [number(each, "a side of a box") for each in checked(xywh, list, "a box")]
    if len(numbers) != 4 or numbers[2] <= 0 or numbers[3] <= 0:
        raise DataError(f"box {numbers}, expected left, top, width, height with some area")
    x, y, w, h = numbers
    if min(x, y) < -EDGE or x + w > frame.width + EDGE or y + h > frame.height + EDGE:
        raise DataError(f"box {numbers} outside a picture of {frame.width:g}x{frame.height:g} pixels")
    return Box(x, y, x + w, y + h, frame, label).clipped()


class Coco(Reader):
    """COCO's detection files: all objects of a picture as one answer, each box labelled with its category.

    Crowds are left out, which have one box around many; so are pictures in which nothing else is.
    """

    prompt = "Where is every object?"

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        content = load(files.path, "images", "annotations", "categories")
        self.boxes: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for each in objects(content["annotations"]):
            if not each.get("iscrowd"):
                self.boxes[str(each.get("image_id"))].append(each)
        self.categories = {str(each.get("id")): each.get("name") for each in objects(content["categories"])}
        self.rows = [each for each in objects(content["images"]) if str(each.get("id")) in self.boxes]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.files.path}:{self.rows[index].get('id')}"

    def read(self, index: int) -> Record:
        row = self.rows[index]
        picture = self.picture(take(row, "file_name", str))
        found = []
        for each in self.boxes[str(row.get("id"))]:
            label = text(self.categories.get(str(each.get("category_id"))), "the name of a category")
            found.append(Region(box_of(each.get("bbox"), picture, row, label)))
        return Record((Message("user", (picture, self.question())), Message("assistant", tuple(found))))


class RefCoco(Reader):
    """RefCOCO, RefCOCO+ and RefCOCOg: where is what a phrase says? One box for each phrase.

    Either REFER's refs as a JSON list, with COCO's `instances.json` as annotations, or one file in COCO's form whose
    images carry a `caption`, as MDETR (arXiv:2104.12763) gives them out. Pickles are not opened.
    """

    prompt = "Where is {}?"

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        refs = load(files.path)
        content = load(files.annotations if isinstance(refs, list) else files.path, "images", "annotations")
        self.images = {str(each.get("id")): each for each in objects(content["images"])}
        boxes = {str(each.get("id")): each for each in objects(content["annotations"])}
        if isinstance(refs, list):
            found = [(ref, boxes.get(str(ref.get("ann_id")), {})) for ref in objects(refs)]
            self.rows = [(f"ref {ref.get('ref_id')}", box, said) for ref, box in found for said in _phrases(ref)]
        else:
            self.rows = [(key, box, self._image(box).get("caption")) for key, box in boxes.items()]

    def _image(self, box: dict[str, Any]) -> dict[str, Any]:
        return self.images.get(str(box.get("image_id")), {})

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.files.path}:{self.rows[index][0]}"

    def read(self, index: int) -> Record:
        _, box, said = self.rows[index]
        phrase, about = text(said, "the phrase"), self._image(box)
        picture = self.picture(take(about, "file_name", str))
        return Record(asked((picture, self.question(phrase)), Region(box_of(box.get("bbox"), picture, about, phrase))))


def _phrases(ref: dict[str, Any]) -> list[Any]:
    """What people said of one box; nothing, once, where that is not to be read."""
    said = ref.get("sentences")
    if not isinstance(said, list) or not said:
        return [None]
    return [each.get("raw") or each.get("sent") if isinstance(each, dict) else each for each in said]
