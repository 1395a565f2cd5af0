"""Places drawn onto a picture: where they are, labelled, inside the picture, the original untouched."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from sightline.core.errors import InputError
from sightline.core.geometry import Box, Frame, Point
from sightline.data.draw import check_drawing, draw_places

FRAME = Frame(200, 160)


def changed(*places: Box | Point) -> np.ndarray:
    """Where a white picture differs after drawing: bool [height, width]."""
    picture = PIL.Image.new("RGB", (200, 160), "white")
    boxes = [place for place in places if isinstance(place, Box)]
    points = [place for place in places if isinstance(place, Point)]
    drawn = draw_places(picture, boxes, points)
    assert picture.getcolors() == [(200 * 160, (255, 255, 255))]
    return np.any(np.asarray(drawn) != 255, axis=2)


def test_a_box_is_outlined_and_its_inside_left_alone() -> None:
    mask = changed(Box(50, 60, 120, 130, FRAME))
    ys, xs = np.nonzero(mask)
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == (50, 60, 120, 130)
    assert not mask[70:120, 60:110].any()


def test_a_point_is_marked_around_its_place() -> None:
    ys, xs = np.nonzero(changed(Point(100, 40, FRAME)))
    assert abs(xs.mean() - 100) < 1
    assert abs(ys.mean() - 40) < 1


@pytest.mark.parametrize("corner", [(0, 0), (190, 150), (0, 150), (190, 0)])
def test_labels_stay_inside(corner: tuple[int, int]) -> None:
    x, y = corner
    with_label = changed(Box(x, y, x + 9, y + 9, FRAME, label="circle"))
    assert with_label.sum() > changed(Box(x, y, x + 9, y + 9, FRAME)).sum() + 100


@pytest.mark.parametrize(("size", "labelled"), [((200, 160), True), ((48, 30), False), ((3, 400), False)])
def test_a_label_that_would_cover_a_tiny_picture_is_left_out(size: tuple[int, int], labelled: bool) -> None:
    picture, frame = PIL.Image.new("RGB", size, "white"), Frame(*size)
    box = Box(0, size[1] / 2, size[0], size[1], frame)
    plain, named = (draw_places(picture, [replace(box, label=label)]) for label in ("", "red circle"))
    assert (plain.tobytes() != named.tobytes()) == labelled


def test_two_places_have_two_colours() -> None:
    picture = PIL.Image.new("RGB", (200, 160), "white")
    drawn = draw_places(picture, [Box(10, 10, 50, 50, FRAME), Box(90, 90, 150, 150, FRAME)])
    colors = drawn.getcolors()
    assert colors is not None
    assert len(colors) == 3


def test_no_places_no_change() -> None:
    assert not changed().any()


def test_names_that_cannot_be_written_are_told_beforehand(tmp_path: Path) -> None:
    check_drawing(tmp_path / "a.JPG", (20_000, 2))
    check_drawing(tmp_path / "a.webp", (16_383, 2))
    with pytest.raises(InputError, match="at most 16383 pixels a side, the picture 3x16384"):
        check_drawing(tmp_path / "a.webp", (3, 16_384))
    for name in ("a", "a.gif", "a.pdf"):  # a GIF has 256 colours
        with pytest.raises(InputError, match=r"cannot be of the kind .*, expected \.png, \.jpg, \.jpeg, \.webp"):
            check_drawing(tmp_path / name, (9, 9))
    with pytest.raises(InputError, match="its folder does not exist"):
        check_drawing(tmp_path / "none" / "a.png", (9, 9))
