"""What is known of pictures, in words: captions by picture, in a file of their own."""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ...core.errors import DataError
from ...core.sequence import Image
from .base import checked, load, take, text


def captions_of(path: Path, images: Sequence[Image]) -> tuple[str, ...]:
    """The captions of some pictures in a file; DataError for a picture without any."""
    known, found = captions(path), list[str]()
    for image in images:
        name = Path(image.source)
        key = next((key for key in (image.source, name.name, name.stem) if key in known), None)
        if key is None:
            raise DataError(f"{path} has no caption of {image.source:.60}")
        found += known[key]
    return tuple(found)


@lru_cache(maxsize=4)
def captions(path: Path) -> dict[str, list[str]]:
    """Captions by path, file name or stem: those of COCO, or an object of one caption or several of each picture.

    DataError for a file that is neither.
    """
    content = checked(load(path), dict, f"{path}")
    if "annotations" not in content:
        several = {key: said if isinstance(said, list) else [said] for key, said in content.items()}
        return {key: [text(each, f"{path}: a caption") for each in said] for key, said in several.items()}
    names = {take(each, "id", int): take(each, "file_name", str) for each in take(content, "images", list)}
    found = defaultdict[str, list[str]](list)
    for each in take(content, "annotations", list):
        found[names.get(take(each, "image_id", int), "")].append(text(each.get("caption"), f"{path}: a caption"))
    return dict(found)
