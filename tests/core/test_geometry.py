"""Places: boxes and points in their frame, overlap and matching, and the way between frames and back."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sightline.core.errors import InputError
from sightline.core.geometry import (
    Box,
    Frame,
    Point,
    Step,
    Transform,
    crop,
    generalized_iou,
    iou,
    match,
    orient,
    pad,
    resize,
)

FRAME = Frame(100, 80)
CORNERS = ((0, 0), (100, 0), (0, 80), (30, 20))

sizes = st.integers(1, 4000)
shares = st.floats(-0.5, 1.5)  # of a frame, places beyond its edges included


@st.composite
def chains(draw: st.DrawFn) -> Transform:
    """One to five steps of any kind, each from where the last one ended."""
    way = Transform(Frame(draw(sizes), draw(sizes)))
    for _ in range(draw(st.integers(1, 5))):
        here = way.target
        corner = draw(st.integers(-50, 50)), draw(st.integers(-50, 50))
        size = draw(sizes), draw(sizes)
        turned = orient(here, draw(st.integers(1, 8)))
        cut, framed = crop(here, *corner, *size), pad(here, *corner, *size)
        way = way.then(draw(st.sampled_from([resize(here, *size), cut, framed, turned])))
    return way


def box(*xyxy: float, label: str = "") -> Box:
    return Box(*xyxy, FRAME, label)


def test_a_box_knows_its_area_and_center() -> None:
    found = Box(10, 20, 30, 60, FRAME, "cat", 0.5)
    assert found.xyxy == (10, 20, 30, 60) and found.area == 800
    assert found.center == Point(20, 40, FRAME, "cat", 0.5)


@pytest.mark.parametrize(
    "given, inside",
    [
        ((-5, -5, 120, 90), (0, 0, 100, 80)),
        ((10, 20, 30, 40), (10, 20, 30, 40)),
        ((110, 20, 130, 40), (100, 20, 100, 40)),  # beyond the right edge nothing remains
        ((-9, -9, -1, -1), (0, 0, 0, 0)),
    ],
)
def test_clipping_keeps_the_part_inside_the_frame(given: tuple[float, ...], inside: tuple[float, ...]) -> None:
    assert box(*given, label="cat").clipped() == box(*inside, label="cat")


@pytest.mark.parametrize(
    "xyxy", [(2, 0, 1, 1), (0, 2, 1, 1), (math.nan, 0, 1, 1), (0, 0, math.inf, 1), (-math.inf, 0, 1, 1)]
)
def test_corners_out_of_order_or_not_finite_are_refused(xyxy: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="expected finite left <= right and top <= bottom"):
        box(*xyxy)


@pytest.mark.parametrize("x, y", [(math.nan, 0), (0, math.inf)])
def test_points_are_finite(x: float, y: float) -> None:
    with pytest.raises(InputError, match="expected finite numbers"):
        Point(x, y, FRAME)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5), (math.nan, 5), (5, math.inf)])
def test_frames_have_sides(size: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="expected sides above 0"):
        Frame(*size)


@pytest.mark.parametrize(
    "other, overlap",
    [
        ((0, 0, 10, 10), 1),
        ((5, 0, 15, 10), 1 / 3),
        ((5, 5, 15, 15), 25 / 175),
        ((10, 0, 20, 10), 0),  # a shared edge is no overlap: edges are outer ones, without +1
        ((50, 50, 60, 60), 0),
        ((2, 2, 4, 4), 4 / 100),
        ((5, 5, 5, 5), 0),
    ],
)
def test_iou(other: tuple[float, ...], overlap: float) -> None:
    first, second = box(0, 0, 10, 10), box(*other)
    assert iou(first, second) == iou(second, first) == pytest.approx(overlap)


def test_generalized_iou_by_hand() -> None:
    one = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 2, 2], [1, 1, 1, 1]], requires_grad=True)
    other = torch.tensor([[0.0, 0, 2, 2], [2, 0, 3, 1], [2, 2, 3, 3], [1, 1, 3, 3], [1, 1, 1, 1]])
    found = generalized_iou(one, other)
    wanted = [1.0, -1 / 3, 2 / 9 - 1, 1 / 7 - 2 / 9, 0.0]  # the last two of no size
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    assert generalized_iou(other, one).tolist() == pytest.approx(wanted, abs=1e-6)
    found.sum().backward()
    assert one.grad is not None and torch.isfinite(one.grad).all()
    assert one.grad[1, 2] > 0 and one.grad[2, 3] > 0  # boxes that do not meet are drawn together


def test_two_empty_boxes_overlap_by_nothing() -> None:
    assert iou(box(3, 3, 3, 3), box(3, 3, 3, 3)) == 0


def test_boxes_of_two_frames_are_not_compared() -> None:
    with pytest.raises(InputError, match="measured in 100x80 and 50x80 pixels, expected one frame"):
        iou(box(0, 0, 1, 1), Box(0, 0, 1, 1, Frame(50, 80)))


def test_matching_takes_the_best_pairs_first_and_each_box_once() -> None:
    truth = [box(0, 0, 10, 10), box(20, 0, 30, 10)]
    found = [box(1, 0, 11, 10), box(0, 0, 10, 10), box(20, 0, 30, 8), box(60, 60, 70, 70)]
    assert match(found, truth) == [(1, 0, 1.0), (2, 1, pytest.approx(0.8))]
    assert match(found, truth, threshold=0.9) == [(1, 0, 1.0)]
    assert match([], truth) == match(found, []) == []


def test_each_step_moves_the_corners_to_where_they_belong() -> None:
    wanted = {
        resize(FRAME, 200, 40): ((0, 0), (200, 0), (0, 40), (60, 10)),
        crop(FRAME, 10, 5, 50, 60): ((-10, -5), (90, -5), (-10, 75), (20, 15)),
        pad(FRAME, 10, 5, 150, 100): ((10, 5), (110, 5), (10, 85), (40, 25)),
    }
    for step, places in wanted.items():
        assert tuple(step.forward(*corner) for corner in CORNERS) == places
        assert tuple(step.backward(*place) for place in places) == CORNERS


@pytest.mark.parametrize(
    "orientation, size, corner",
    [
        (1, (100, 80), (0, 0)),
        (2, (100, 80), (100, 0)),
        (3, (100, 80), (100, 80)),
        (4, (100, 80), (0, 80)),
        (5, (80, 100), (0, 0)),
        (6, (80, 100), (80, 0)),
        (7, (80, 100), (80, 100)),
        (8, (80, 100), (0, 100)),
        (0, (100, 80), (0, 0)),
        (9, (100, 80), (0, 0)),
    ],
)
def test_orientation_puts_the_stored_corner_where_exif_says(
    orientation: int, size: tuple[int, int], corner: tuple[int, int]
) -> None:
    step = orient(FRAME, orientation)
    assert step.target == Frame(*size) and step.forward(0, 0) == corner


@settings(max_examples=60, deadline=None)
@given(chains(), shares, shares, shares, shares)
def test_a_chain_is_undone_exactly(way: Transform, a: float, b: float, c: float, d: float) -> None:
    """Exactly: to float64 rounding at the scale of the largest number on the way, far below a thousandth of a pixel."""
    (width, height), (x1, x2), (y1, y2) = (way.source.width, way.source.height), sorted((a, b)), sorted((c, d))
    place = Box(x1 * width, y1 * height, x2 * width, y2 * height, way.source, "cat", 0.5)
    there = way.apply(place)
    assert there.frame == way.target and (there.label, there.confidence) == ("cat", 0.5)
    back = way.invert(there)
    assert back.xyxy == pytest.approx(place.xyxy, abs=1e-6) and back.frame == way.source
    point = way.invert(way.apply(place.center))
    assert (point.x, point.y) == pytest.approx((place.center.x, place.center.y), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 7), st.integers(1, 8), st.integers(0, 256), st.integers(0, 128))
def test_numbers_that_float64_holds_come_back_bit_by_bit(power: int, orientation: int, x: int, y: int) -> None:
    source, canvas = Frame(256, 128), Frame(200, 200)
    way = Transform(source).then(resize(source, 2**power, 2 ** (7 - power)))
    way = way.then(pad(way.target, 3, 5, 200, 200)).then(orient(canvas, orientation)).then(crop(canvas, 9, 1, 20, 30))
    place = Point(x, y, source)
    assert way.invert(way.apply(place)) == place


def test_a_box_stays_a_box_when_axes_swap_or_run_backwards() -> None:
    for orientation in range(1, 9):
        way = Transform(FRAME).then(orient(FRAME, orientation))
        moved = way.apply(box(10, 20, 30, 60))
        assert moved.area == 800 and way.invert(moved) == box(10, 20, 30, 60)


def test_a_transform_without_steps_changes_nothing() -> None:
    way = Transform(FRAME)
    assert way.target == FRAME and way.apply(box(1, 2, 3, 4)) == box(1, 2, 3, 4)


def test_steps_must_follow_one_another() -> None:
    first, second = resize(FRAME, 50, 50), resize(Frame(51, 50), 10, 10)
    with pytest.raises(ValueError, match="cannot follow"):
        Transform(FRAME, (first, second))
    with pytest.raises(ValueError, match="cannot follow"):
        Transform(FRAME).then(Step(Frame(1, 1), FRAME))


@pytest.mark.parametrize("place", [Point(1, 1, Frame(1000, 1000)), Box(1, 1, 2, 2, Frame(1000, 1000))])
def test_a_place_of_another_frame_is_refused(place: Box | Point) -> None:
    way = Transform(FRAME).then(resize(FRAME, 50, 50))
    with pytest.raises(InputError, match="measured in 1000x1000 pixels, expected pixels of 100x80"):
        way.apply(place)
    with pytest.raises(InputError, match="measured in 1000x1000 pixels, expected pixels of 50x50"):
        way.invert(place)
