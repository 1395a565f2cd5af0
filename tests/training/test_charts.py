"""Plots that are whole XML, stand alone, and show what they are given."""

import re
from xml.etree import ElementTree

import pytest

from sightline.training.charts import MOST, curves, intervals, thinned, ticks


def test_curves_stand_alone_and_name_their_lines() -> None:
    drawn = curves("loss & more", {"a<b": [(0, 1.0), (10, 0.5), (20, float("nan"))], "c": [(0, 2.0), (20, 0.25)]})
    tree = ElementTree.fromstring(drawn)
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "") and "<script" not in drawn
    said = ["".join(each.itertext()) for each in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"loss & more", "a<b", "c", "step"} <= set(said)
    lines = [each.get("points", "").split() for each in tree.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line) for line in lines] == [2, 2]
    heights = [float(point.split(",")[1]) for line in lines for point in line]
    assert heights[2] < heights[0] < heights[1] < heights[3]  # higher values are higher up
    assert curves("nothing", {"a": []}) == ""


def test_intervals_lie_where_they_are() -> None:
    rows = {"one": [(0.5, 0.25, 0.75), None], "two": [(1.0, 1.0, 1.0), (0.0, 0.0, 0.5)]}
    drawn = intervals("shares", rows, ["a", "b"])
    ElementTree.fromstring(drawn)
    left, right = 140, 720 - 64
    assert f'cx="{(left + right) / 2:.1f}"' in drawn and f'cx="{right:.1f}"' in drawn and f'cx="{left:.1f}"' in drawn
    assert len(re.findall("<circle", drawn)) == 3


NAMES = ["loss", "object", "color", "shape", "size", "texture", "cover_color", "cover_shape", "box", "siglip", "words"]


@pytest.mark.parametrize(
    "drawn",
    [
        curves("loss", {name: [(0, -2e5), (123_456, 7.5e6)] for name in NAMES}),
        curves("a title of some length <b> & more of it", {"x" * 60: [(0, 1.0)], "y" * 60: [(3, 2.0)]}),
        intervals("a-recipe-of-a-long-name: right answers, mean of 10 seeds, 95% interval", {
            "cross-attention": [(1.0, 1.0, 1.0), (0.0, 0.0, 1.0)], "expert": [None, (0.5, 0.5, 0.5)]
        }, ["equal steps", "equal operations"]),
    ],
)  # fmt: skip
def test_nothing_lies_on_anything_else_or_outside(drawn: str) -> None:
    tree = ElementTree.fromstring(drawn)
    wide, high = float(tree.get("width", 0)), float(tree.get("height", 0))
    boxes = []
    for each in tree.iter("{http://www.w3.org/2000/svg}text"):
        said = "".join(each.itertext())
        size = len(said) * (8.0 if each.get("class") == "title" else 7.0)
        back = {"start": 0.0, "middle": 0.5, "end": 1.0}[each.get("text-anchor", "start")]
        x, y = float(each.get("x", 0)) - back * size, float(each.get("y", 0))
        boxes.append((x, y - 10, x + size, y + 3, said))
    for i, (left, top, right, low, said) in enumerate(boxes):
        assert left >= 0 and right <= wide and top >= 0 and low <= high, said
        for a, b, c, d, other in boxes[:i]:
            assert c <= left or right <= a or d <= top or low <= b, (said, other)


def test_a_noisy_line_comes_with_its_mean_and_fills_the_width() -> None:
    drawn = curves("loss", {"loss": [(i + 1, 2.0 * (i % 2)) for i in range(120)]})
    each, mean = (
        [tuple(map(float, point.split(","))) for point in way.split()] for way in re.findall('points="([^"]*)"', drawn)
    )
    assert "mean of 6" in drawn and each[0][0] == mean[0][0] == 64 and each[-1][0] == mean[-1][0] == 720 - 32
    middle = (max(y for _, y in each) + min(y for _, y in each)) / 2
    assert all(y == pytest.approx(middle, abs=0.1) for _, y in mean[5::2])


def test_lines_beyond_the_colours_are_told_apart() -> None:
    drawn = curves("loss", {name: [(0, 1.0), (1, 2.0)] for name in NAMES})
    ways = re.findall(r'<polyline points="[^"]*" fill="none" ([^/]*)/>', drawn)
    assert len(set(ways)) == len(NAMES)
    assert all(drawn.count(f" {way}/>") == 2 for way in ways)  # the line, and its piece beside its name


def test_one_value_and_equal_values_can_be_drawn() -> None:
    assert "polyline" in curves("flat", {"a": [(3, 2.0)]}) and "polyline" in curves("zero", {"a": [(0, 0.0), (1, 0.0)]})


def test_long_lines_are_averaged() -> None:
    found = thinned([(i, i % 2) for i in range(10 * MOST)])
    assert len(found) == MOST and found[0] == (4.5, 0.5)


@pytest.mark.parametrize(
    "span, wanted",
    [((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1.0]), ((3, 47), [0, 10, 20, 30, 40, 50]), ((-1, 1), [-1, -0.5, 0, 0.5, 1])],
)
def test_ticks_are_round(span: tuple[float, float], wanted: list[float]) -> None:
    assert ticks(*span) == pytest.approx(wanted)
