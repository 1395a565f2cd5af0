"""Kosmos-2's cells: phrases, several boxes, the three ways a pair of cells is read, and what is no place."""

import re

import pytest

from sightline.core.geometry import Box, Frame, Transform
from sightline.core.sequence import Piece
from sightline.grounding.codecs import Grounded, Kosmos2Patches

CODEC = Kosmos2Patches()
FRAME = Frame(320, 320)  # a cell is 10 pixels
WAY = Transform(FRAME)


def read(text: str) -> Grounded:
    found = re.split(r"(<[/\w]+>)", text)
    return CODEC.decode([Piece(word, control=i % 2 == 1) for i, word in enumerate(found) if word], WAY)


def test_the_published_example() -> None:
    found = read(
        "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object> "
        "warming himself by<phrase> a fire</phrase><object><patch_index_0005><patch_index_0911></object>."
    )
    assert found.text == "An image of a snowman warming himself by a fire."
    assert [each.label for each in found.boxes] == ["a snowman", "a fire"]
    assert found.boxes[0].xyxy == (125, 15, 315, 265)  # 0.390625, 0.046875, 0.984375, 0.828125


def test_boxes_of_one_phrase_share_an_object() -> None:
    boxes = [Box(0, 0, 20, 20, FRAME, "cat"), Box(100, 0, 320, 320, FRAME, "cat"), Box(0, 0, 10, 10, FRAME)]
    assert CODEC.encode(boxes, WAY) == (
        "<phrase> cat</phrase><object><patch_index_0000><patch_index_0033></delimiter_of_multi_objects/>"
        "<patch_index_0010><patch_index_1023></object><object><patch_index_0000><patch_index_0000></object>"
    )
    assert [each.label for each in CODEC.decode(CODEC.write(boxes, WAY), WAY).boxes] == ["cat", "cat", ""]


@pytest.mark.parametrize(
    "first, last, xyxy",
    [
        (0, 0, (0, 0, 10, 10)),  # one cell: its edges
        (32, 35, (0, 10, 40, 20)),  # one row
        (1, 65, (10, 0, 20, 30)),  # one column
        (0, 33, (5, 5, 15, 15)),  # else the middles
        (33, 0, (5, 5, 15, 15)),  # in any order
        (1023, 1023, (310, 310, 320, 320)),
    ],
)
def test_a_pair_of_cells_is_read_by_where_they_lie(first: int, last: int, xyxy: tuple[float, ...]) -> None:
    found = read(f"<object><patch_index_{first:04d}><patch_index_{last:04d}></object>")
    assert found.boxes[0].xyxy == pytest.approx(xyxy) and found.text == ""


@pytest.mark.parametrize(
    "xyxy, cells",
    [
        ((0, 0, 320, 320), (0, 1023)),
        ((10, 10, 20, 20), (33, 33)),  # a far edge on a line belongs to the cell before it
        ((10, 10, 20.5, 20), (33, 34)),
        ((320, 320, 320, 320), (1023, 1023)),  # beyond the last cell
        ((10, 10, 10, 10), (33, 33)),  # nothing, on a line
        ((0, 0, 0, 0), (0, 0)),
    ],
)
def test_edges_on_lines_are_written_in_the_cell_they_end(xyxy: tuple[float, ...], cells: tuple[int, int]) -> None:
    first, last = cells
    assert CODEC.encode([Box(*xyxy, FRAME)], WAY) == (
        f"<object><patch_index_{first:04d}><patch_index_{last:04d}></object>"
    )


@pytest.mark.parametrize(
    "text",
    [
        "cat<object><patch_index_0001></object>",
        "cat<object><patch_index_0001><patch_index_0002>",
        "cat<object><patch_index_0001><patch_index_1024></object>",
        "cat<object><patch_index_0001><patch_index_0002></delimiter_of_multi_objects/></object>",
        "cat<object><patch_index_0001><patch_index_0002></phrase>",
        "<phrase>cat</phrase><object></object>",
        "cat<patch_index_0001><patch_index_0002></object>",
        "cat<object>",
    ],
)
def test_malformed_objects_are_no_place(text: str) -> None:
    assert read(text) == Grounded("cat")


def test_a_phrase_names_only_the_object_right_after_it() -> None:
    found = read("<phrase>cat</phrase> and<object><patch_index_0001><patch_index_0002></object>")
    assert found.text == "cat and" and found.boxes[0].label == ""
