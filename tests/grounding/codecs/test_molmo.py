"""Molmo's points: percent in tags of plain text, one or several, named by `alt`."""

import pytest

from sightline.core.geometry import Frame, Point, Transform
from sightline.core.sequence import Piece
from sightline.grounding.codecs import Grounded, MolmoPoints

CODEC = MolmoPoints()
FRAME = Frame(200, 100)
WAY = Transform(FRAME)


def read(text: str) -> Grounded:
    return CODEC.decode([Piece(text)], WAY)


def xy(found: Grounded) -> list[tuple[float, float]]:
    return [(pytest.approx(each.x), pytest.approx(each.y)) for each in found.points]


def test_one_point_and_several_sorted() -> None:
    assert CODEC.encode([Point(24.68, 45.64, FRAME, "cat")], WAY) == '<point x="12.3" y="45.6" alt="cat">cat</point>'
    cats = [Point(x, y, FRAME, "cats") for x, y in ((100, 50), (20, 90), (20, 10))]
    assert CODEC.encode([*cats, Point(0, 0, FRAME, "dog")], WAY) == (
        '<points x1="10.0" y1="10.0" x2="10.0" y2="90.0" x3="50.0" y3="50.0" alt="cats">cats</points> '
        '<point x="0.0" y="0.0" alt="dog">dog</point>'
    )


def test_a_label_cannot_end_its_own_attribute() -> None:
    label = 'a "red" <point x="1" y="2">'
    found = CODEC.decode(CODEC.write([Point(20, 10, FRAME, label)], WAY), WAY)
    assert [each.label for each in found.points] == [found.text] == ["a red point x=1 y=2"]


def test_tags_are_read_within_a_sentence() -> None:
    found = read('Counting the <points x1="10" y1="20.5" x2=" 30.0" y2="100" alt="two cats">cats</points> shows 2.')
    assert found.text == "Counting the cats shows 2."
    assert xy(found) == [(20, 20.5), (60, 100)] and [each.label for each in found.points] == ["two cats"] * 2
    assert read('<point x="1" y="2">here</point>') == Grounded("here", points=(Point(2, 2, FRAME),))
    assert read('<point x="1" y="2" alt="cut off">cut').points[0].label == "cut off"


@pytest.mark.parametrize(
    "tag",
    [
        '<point x="101.0" y="2" alt="cat">',  # beyond 100 percent
        '<point x="1" alt="cat">',
        '<points x1="1" y2="2" alt="cat">',
        '<points x1="1" y1="2" x2="3" alt="cat">',
        '<point x="-1" y="2" alt="cat">',
        '<point x="a" y="2" alt="cat">',
        '<point x=1 y=2 alt="cat">',
        '<point alt="cat">',
        '<point x="1" y="2" z="3" alt="cat">',
        '<pointed x="1" y="2">',
        '<point x="1" y="2"',
    ],
)
def test_malformed_tags_stay_text_with_their_ends(tag: str) -> None:
    assert read(f"see {tag}cat</point>") == Grounded(f"see {tag}cat</point>")


def test_a_whole_tag_after_a_malformed_one_is_found() -> None:
    found = read('<point x="1">cat</point> <point x="1" y="2" alt="dog">dog</point> </point>')
    assert found.text == '<point x="1">cat</point> dog </point>' and found.points[0].label == "dog"
