"""Ferret and CogVLM: thousandths of the original in brackets, whatever the picture's way into the model."""

import PIL.Image
import pytest

from sightline.core.geometry import Box, Frame, Point, Transform
from sightline.core.sequence import Piece
from sightline.data.images import PadSquare
from sightline.grounding.codecs import Codec, CogVLMBoxes, FerretNumbers, Grounded

FERRET, COGVLM = FerretNumbers(), CogVLMBoxes()
FRAME = Frame(200, 100)
WAY = Transform(FRAME)


def read(codec: Codec, text: str) -> Grounded:
    return codec.decode([Piece(text)], WAY)


def test_what_each_writes() -> None:
    places = [Box(0, 1.99, 33.3, 100, FRAME, "a cat"), Box(2, 3, 4, 5, FRAME, "dog")]
    assert FERRET.encode(places, WAY) == "a cat [0, 19, 166, 1000], dog [10, 30, 20, 50]"
    assert FERRET.encode([Point(100, 50, FRAME)], WAY) == "[500, 500]"
    assert COGVLM.encode(places, WAY) == "[[000,020,166,999;010,030,020,050]]"


def test_numbers_are_of_the_original_picture() -> None:
    padded = PadSquare(64)(PIL.Image.new("RGB", (200, 100)))[1]
    for codec in (FERRET, COGVLM):
        places = [Box(20, 30, 40, 50, FRAME)]
        assert codec.encode(places, padded) == codec.encode(places, WAY)
        assert codec.decode(codec.write(places, padded), padded).boxes[0].xyxy == pytest.approx((20, 30, 40, 50))


def test_a_place_that_ferret_is_asked_about_has_its_region_s_features() -> None:
    assert FERRET.refer(Point(100, 50, FRAME), WAY) == [Piece("[500, 500] "), Piece("<region_fea>", control=True)]
    found = FERRET.decode([Piece("the thing "), *FERRET.refer(Box(0, 0, 100, 50, FRAME), WAY), Piece("?")], WAY)
    assert found.text == "the thing [0, 0, 500, 500] ?" and found.boxes[0].xyxy == (0, 0, 100, 50)


def test_places_are_named_by_the_words_before_them() -> None:
    found = read(FERRET, "There is a cat [0, 0, 500, 500]. Next to it, a ball [250, 250].")
    assert found.boxes[0].label == "There is a cat" and found.points[0].label == "a ball"
    assert (found.points[0].x, found.points[0].y) == (50, 25)
    found = read(COGVLM, "Two dogs [[000,000,500,500;100,200,300,400]] and a cat[[001,002,003,004]]")
    assert [each.label for each in found.boxes] == ["Two dogs", "Two dogs", "and a cat"]
    assert found.text.endswith("a cat[[001,002,003,004]]")


@pytest.mark.parametrize(
    "codec, text",
    [
        (FERRET, "cat [1, 2, 3]"),
        (FERRET, "cat [1, 2, 3, 1001]"),
        (FERRET, "cat [1, 2, 3, 4"),
        (FERRET, "cat [0.1, 0.2]"),
        (FERRET, "cat [-1, 2]"),
        (COGVLM, "cat [001,002,003,004]"),
        (COGVLM, "cat [[001,002,003]]"),
        (COGVLM, "cat [[001,002,003,004;]]"),
        (COGVLM, "cat [[001,002,003,1000]]"),
        (COGVLM, "cat [[001,002,003,004]"),
        (COGVLM, "cat [[a,b,c,d]]"),
    ],
)
def test_malformed_brackets_stay_text(codec: Codec, text: str) -> None:
    assert read(codec, text) == Grounded(text)
