"""Places drawn onto their picture."""

from collections.abc import Sequence
from pathlib import Path

import PIL.Image
from PIL import ImageDraw, ImageFont

from ..core.errors import InputError
from ..core.geometry import Box, Point

# eight colours that are told apart on most pictures, also by people who do not see red and green alike (Okabe and Ito)
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")

KINDS = (".png", ".jpg", ".jpeg", ".webp")  # that keep the colours of a picture
WEBP = 16_383  # pixels of a side at most
MOST = 0.15  # of a picture that a label may cover


def check_drawing(path: Path, size: tuple[int, int]) -> None:
    """InputError for a file that no drawing of this size can be written as, told before any work is done."""
    if path.suffix.lower() not in KINDS:
        raise InputError(f"{path}: a drawing cannot be of the kind {path.suffix!r}, expected {', '.join(KINDS)}")
    if path.suffix.lower() == ".webp" and max(size) > WEBP:
        raise InputError(f"{path}: a .webp has at most {WEBP} pixels a side, the picture {size[0]}x{size[1]}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist")


def draw_places(picture: PIL.Image.Image, boxes: Sequence[Box] = (), points: Sequence[Point] = ()) -> PIL.Image.Image:
    """A copy of a picture with its places outlined and labelled, lines and letters in proportion to its size.

    Places are in pixels of the picture; each gets the next of eight colours. A label that would cover much of a tiny
    picture is left out.
    """
    canvas = picture.convert("RGB")
    pen = ImageDraw.Draw(canvas)
    side = min(canvas.size)
    line = max(2, round(side / 160))
    font = ImageFont.load_default(max(10, side / 28))
    for i, place in enumerate((*boxes, *points)):
        color = COLORS[i % len(COLORS)]
        if isinstance(place, Box):
            pen.rectangle(place.xyxy, outline=color, width=line)
            corner = place.x1, place.y1
        else:
            reach = 3 * line
            pen.ellipse((place.x - reach, place.y - reach, place.x + reach, place.y + reach), color, "white", line)
            corner = place.x + reach, place.y - reach
        if place.label:
            _tag(pen, place.label, corner, canvas.size, color, font)
    return canvas


def _tag(
    pen: ImageDraw.ImageDraw,
    label: str,
    corner: tuple[float, float],
    size: tuple[int, int],
    color: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """White words on a filled strip that ends where the place begins, moved inside the picture."""
    left, top, right, bottom = pen.textbbox((0, 0), label, font=font)
    width, height = right - left + 6, bottom - top + 4
    if width > size[0] or width * height > MOST * size[0] * size[1]:
        return
    x = min(max(corner[0], 0), max(size[0] - width, 0))
    y = corner[1] - height if corner[1] >= height else corner[1]
    pen.rectangle((x, y, x + width, y + height), fill=color)
    pen.text((x + 3 - left, y + 2 - top), label, fill="white", font=font)
