"""Qwen-VL and InternVL: names and boxes between control tokens, numbers spelled each family's own way."""

import re

import pytest

from sightline.core.geometry import Box, Frame, Transform
from sightline.core.sequence import Piece
from sightline.grounding.codecs import Codec, Grounded, InternVLBoxes, QwenVLBoxes

QWEN, INTERNVL = QwenVLBoxes(), InternVLBoxes()
FRAME = Frame(999, 1998)
WAY = Transform(FRAME)


def read(codec: Codec, text: str, frame: Frame = FRAME) -> Grounded:
    found = re.split(r"(</?(?:ref|box|quad)>)", text)
    return codec.decode([Piece(word, control=i % 2 == 1) for i, word in enumerate(found) if word], Transform(frame))


def test_what_each_writes() -> None:
    boxes = [Box(0, 0, 499, 999, FRAME, "cat"), Box(10, 20, 999, 1998, FRAME, "cat"), Box(0, 0, 1, 1, FRAME)]
    assert QWEN.encode(boxes, WAY) == (
        "<ref>cat</ref><box>(0,0),(499,500)</box><box>(10,10),(999,999)</box><box>(0,0),(1,0)</box>"
    )
    assert INTERNVL.encode(boxes, WAY) == (
        "<ref>cat</ref><box>[[0, 0, 499, 500], [10, 10, 1000, 1000]]</box><box>[[0, 0, 1, 1]]</box>"
    )


def test_qwen_s_numbers_end_at_999_in_evaluation_and_at_1000_in_drawing() -> None:
    text = "<box>(0,0),(999,500)</box>"
    assert read(QWEN, text).boxes[0].xyxy == pytest.approx((0, 0, 999, 1000))
    assert read(QwenVLBoxes(top=1000), text).boxes[0].xyxy == pytest.approx((0, 0, 998.001, 999))
    assert QwenVLBoxes(top=1000).encode([Box(0, 0, 999, 1998, FRAME)], WAY) == "<box>(0,0),(999,999)</box>"


def test_a_quadrangle_is_read_as_the_box_around_it() -> None:
    found = read(QWEN, "<ref>STOP</ref><quad>(100,50),(200,10),(210,60),(90,80)</quad>", Frame(999, 999))
    assert found.boxes[0].xyxy == pytest.approx((90, 10, 210, 80)) and found.boxes[0].label == found.text == "STOP"


def test_an_answer_may_go_on_in_the_box_that_the_prompt_opened() -> None:
    found = read(QWEN, "(1,2),(3,4)</box> there", Frame(999, 999))
    assert found.boxes[0].xyxy == pytest.approx((1, 2, 3, 4)) and found.text == "there"


@pytest.mark.parametrize("codec, boxes", [(QWEN, "<box>(1,2),(3,4)</box>"), (INTERNVL, "<box>[[1, 2, 3, 4]]</box>")])
def test_a_name_is_that_of_its_boxes_and_stays_in_the_sentence(codec: Codec, boxes: str) -> None:
    found = read(codec, f"There <ref>the cat</ref>{boxes}{boxes} sits, {boxes} too")
    assert found.text == "There the cat sits,  too"
    assert [each.label for each in found.boxes] == ["the cat", "the cat", ""]


def test_internvl_s_small_numbers_are_shares() -> None:
    found = read(INTERNVL, "<box>[[0.1, 0.2, 0.5, 1.0],[ 0,0, 500 , 1000 ],[0, 0, 1, 1]]</box>", Frame(100, 100))
    wanted = [(10, 20, 50, 100), (0, 0, 50, 100), (0, 0, 0.1, 0.1)]
    assert [each.xyxy for each in found.boxes] == [pytest.approx(xyxy) for xyxy in wanted]


@pytest.mark.parametrize(
    "codec, inside",
    [
        (QWEN, "(1,2),(3)"),
        (QWEN, "(1,2),(3,4"),
        (QWEN, "(1,2)"),
        (QWEN, "(1,2),(3,4),(5,6)"),
        (QWEN, "(1,2),(3,1001)"),
        (QWEN, "(-1,2),(3,4)"),
        (QWEN, "[[1, 2, 3, 4]]"),
        (INTERNVL, "[[1, 2, 3]]"),
        (INTERNVL, "[1, 2, 3, 4]"),
        (INTERNVL, "[[1, 2, 3, 4], ]"),
        (INTERNVL, "[[1, 2, 3, 1001]]"),
        (INTERNVL, "[[1, 2, 3, 4]"),
        (INTERNVL, "(1,2),(3,4)"),
        (QWEN, "none"),
    ],
)
def test_malformed_numbers_stay_text(codec: Codec, inside: str) -> None:
    assert read(codec, f"cat <box>{inside}</box>") == Grounded(f"cat {inside}")


def test_numbers_without_their_tags_are_text() -> None:
    for codec, text in ((QWEN, "at (1,2),(3,4) it is"), (INTERNVL, "at [[1, 2, 3, 4]] it is")):
        assert read(codec, text) == Grounded(text)
        assert codec.decode([Piece("<box>"), Piece(text[3:-6]), Piece("</box>")], WAY).boxes == ()
    assert read(QWEN, "at <box>(1,2),(3,4)</quad>") == Grounded("at (1,2),(3,4)")
