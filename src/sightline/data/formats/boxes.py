"""Boxes in pixels of pictures: COCO's objects, RefCOCO's phrases."""

from typing import Any

from ...core.errors import DataError
from ...core.geometry import Box, Frame, Transform, orient
from ...core.sequence import Image, Message, Region
from ..media import turned
from .base import Files, Reader, Record, asked, by_id, checked, load, number, objects, only, take, text

EDGE = 1.0  # pixels that a box may stand out of its picture by, as rounding makes them
SIDES = ("width", "height")


class Boxed(Reader):
    """A reader whose rows say how large their pictures are, and where things are in them."""

    def seen(self, about: dict[str, Any]) -> tuple[Image, Transform]:
        """The picture of a row, and how its boxes get from the pixels that they are counted in to those of it upright.

        Some count in the pixels as they are stored, others in those of the picture turned as its EXIF says: the size
        in the row tells which, and where it does not the sample is refused.
        """
        file = take(about, "file_name", str)
        picture, turn = self.picture(file), turned(self.inside(file))
        upright = Frame(*picture.picture.size)
        stored = orient(upright, turn).target  # either turns into the other's size

        def said(frame: Frame) -> bool:
            return all(about.get(side, getattr(frame, side)) == getattr(frame, side) for side in SIDES)

        if not said(upright) and not said(stored):
            told = "x".join(repr(about.get(side, getattr(upright, side))) for side in SIDES)
            raise DataError(f"boxes in a picture of {told:.40}, found {upright.width:g}x{upright.height:g} pixels")
        if turn == 1 or not said(stored):
            return picture, Transform(upright)
        if said(upright):
            raise DataError(f"a picture that is stored turned (EXIF {turn}), and nothing tells whether its boxes are")
        return picture, Transform(stored, (orient(stored, turn),))


def box_of(xywh: Any, way: Transform, label: str) -> Box:
    """A box [left, top, width, height] in the pixels that a way begins with, in those that it leads to."""
    frame = way.source
    numbers = [number(each, "a side of a box") for each in checked(xywh, list, "a box")]
    if len(numbers) != 4 or numbers[2] <= 0 or numbers[3] <= 0:
        raise DataError(f"box {numbers}, expected left, top, width, height with some area")
    x, y, w, h = numbers
    if min(x, y) < -EDGE or x + w > frame.width + EDGE or y + h > frame.height + EDGE:
        raise DataError(f"box {numbers} outside a picture of {frame.width:g}x{frame.height:g} pixels")
    moved = way.apply(Box(x, y, x + w, y + h, frame, label).clipped())
    assert isinstance(moved, Box)
    return moved


class Coco(Boxed):
    """COCO's detection files: all objects of a picture as one answer, each box labelled with its category.

    Crowds are left out, which have one box around many; so are pictures in which nothing else is.
    """

    prompt = "Where is every object?"

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        content = load(files.path, "images", "annotations", "categories")
        single = [each for each in objects(content["annotations"]) if not each.get("iscrowd")]
        self.boxes = by_id(single, "image_id")
        self.categories, self.images = by_id(content["categories"]), by_id(content["images"])
        self.rows = [each for each in objects(content["images"]) if str(each.get("id")) in self.boxes]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.files.path}:{self.rows[index].get('id')}"

    def read(self, index: int) -> Record:
        key = self.rows[index].get("id")
        picture, way = self.seen(only(self.images, key, "image"))
        found = []
        for each in self.boxes[str(key)]:
            category = only(self.categories, each.get("category_id"), "category")
            label = text(category.get("name"), "the name of a category")
            found.append(Region(box_of(each.get("bbox"), way, label)))
        return Record((Message("user", (picture, self.question())), Message("assistant", tuple(found))))


class RefCoco(Boxed):
    """RefCOCO, RefCOCO+ and RefCOCOg: where is what a phrase says? One box for each phrase.

    Either REFER's refs as a JSON list, with COCO's `instances.json` as annotations, or one file in COCO's form whose
    images carry a `caption`, as MDETR (arXiv:2104.12763) gives them out. Pickles are not opened.
    """

    prompt = "Where is {}?"

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        refs = load(files.path)
        content = load(files.annotations if isinstance(refs, list) else files.path, "images", "annotations")
        self.images, self.boxes = by_id(content["images"]), by_id(content["annotations"])
        self.captioned = not isinstance(refs, list)
        if self.captioned:
            self.rows = [(str(box.get("id")), box.get("id"), None) for box in objects(content["annotations"])]
        else:
            self.rows = [
                (f"ref {ref.get('ref_id')}", ref.get("ann_id"), said) for ref in objects(refs) for said in _phrases(ref)
            ]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.files.path}:{self.rows[index][0]}"

    def read(self, index: int) -> Record:
        _, key, said = self.rows[index]
        box = only(self.boxes, key, "annotation")
        about = only(self.images, box.get("image_id"), "image")
        phrase = text(about.get("caption") if self.captioned else said, "the phrase")
        picture, way = self.seen(about)
        return Record(asked((picture, self.question(phrase)), Region(box_of(box.get("bbox"), way, phrase))))


def _phrases(ref: dict[str, Any]) -> list[Any]:
    """What people said of one box; nothing, once, where that is not to be read."""
    said = ref.get("sentences")
    if not isinstance(said, list) or not said:
        return [None]
    return [each.get("raw") or each.get("sent") if isinstance(each, dict) else each for each in said]
