"""Qwen2-VL's tags, Qwen2.5-VL's lists in JSON."""

import re

import pytest

from sightline.core.geometry import Box, Frame, Point, Transform, resize
from sightline.core.sequence import Piece
from sightline.grounding.codecs import Grounded, Qwen2VLBoxes, Qwen25VLJson

TAGS, LISTS = Qwen2VLBoxes(), Qwen25VLJson()
FRAME = Frame(200, 100)
WAY = Transform(FRAME, (resize(FRAME, 280, 112),))  # what the model sees


def pieces(text: str) -> list[Piece]:
    found = re.split(r"(<\|(?:object_ref|box|quad)_(?:start|end)\|>)", text)
    return [Piece(word, control=i % 2 == 1) for i, word in enumerate(found) if word]


def test_tags_there_and_back() -> None:
    box = Box(20, 10, 100, 50, FRAME, "the cat")
    text = TAGS.encode([box], WAY)
    name = "<|object_ref_start|>the cat<|object_ref_end|>"
    assert text == f"{name}<|box_start|>(100,100),(500,500)<|box_end|>"
    found = TAGS.decode(pieces(f"There is {text}."), WAY)
    assert found.text == "There is the cat." and found.boxes[0].label == "the cat"
    assert found.boxes[0].xyxy == pytest.approx(box.xyxy)
    assert all(piece.control == piece.text.startswith("<|") for piece in TAGS.write([box], WAY))


@pytest.mark.parametrize("text", ["<|box_start|>(1,2),(3)<|box_end|>", "(1,2),(3,4)", "<box>(1,2),(3,4)</box>"])
def test_other_tags_and_malformed_numbers_stay_text(text: str) -> None:
    assert TAGS.decode([Piece("see"), *pieces(text)], WAY).boxes == ()


def test_lists_there_and_back() -> None:
    places = [Box(20, 10, 100, 50, FRAME, 'a "cat"'), Point(50, 75, FRAME, "dog"), Point(0, 0, FRAME)]
    text = LISTS.encode(places, WAY)
    assert text == (
        '```json\n[\n\t{"bbox_2d": [28, 11, 140, 56], "label": "a \\"cat\\""},\n'
        '\t{"point_2d": [70, 84], "label": "dog"},\n\t{"point_2d": [0, 0]}\n]\n```'
    )
    found = LISTS.decode([Piece("Here: "), Piece(text), Piece(" those.")], WAY)
    assert found.text == 'Here: a "cat", dog those.'
    assert found.boxes[0].xyxy == pytest.approx((20, 11 / 1.12, 100, 50))
    assert [(p.x, pytest.approx(p.y), p.label) for p in found.points] == [(50, 75, "dog"), (0, 0, "")]


def test_numbers_beyond_the_picture_end_at_its_edge() -> None:
    found = LISTS.decode([Piece('[{"bbox_2d": [140, 56, 999, 999]}]')], WAY)
    assert found.boxes[0].xyxy == pytest.approx((100, 50, 200, 100))


@pytest.mark.parametrize(
    "text",
    [
        '[{"bbox_2d": [1, 2, 3]}]',
        '[{"bbox_2d": [1, 2, 3, "4"]}]',
        '[{"bbox_2d": [1, 2, 3, true]}]',
        '[{"bbox_2d": [1, 2, 3, 4], "label": 5}]',
        '[{"bbox": [1, 2, 3, 4]}]',
        '[{"bbox_2d": [1, 2, 3, 4]}, {"name": "cat"}]',
        '[{"bbox_2d": [1, 2, 3, 4}]',
        '{"bbox_2d": [1, 2, 3, 4]}',
        "[1, 2, 3, 4]",
    ],
)
def test_other_json_stays_text(text: str) -> None:
    assert LISTS.decode([Piece(text)], WAY) == Grounded(text)
