"""Rewards that can be checked, by hand."""

import pytest
import torch

from sightline.core.errors import ConfigError
from sightline.core.geometry import Box, Frame, Point
from sightline.core.sequence import Message, Region, Text
from sightline.data.batch import Batch
from sightline.grounding.codecs import Grounded
from sightline.training.rewards import REWARDS, Weighted, counted, reward, truth_of

FRAME = Frame(100, 100)


def box(*xyxy: float) -> Box:
    return Box(*xyxy, FRAME)


@pytest.mark.parametrize(
    "answer, truth, worth",
    [
        ("3", "3", 1.0),
        ("three", "3", 1.0),
        ("Three.", "3", 1.0),
        ("13", "3", 0.0),
        ("3 or 4", "3", 0.0),  # who names two numbers has not counted
        ("", "3", 0.0),
        ("0", "zero", 1.0),
        ("Red", "red", 1.0),
        ("red circle", "red", 0.0),
        ("a red, round circle", "A red round circle.", 1.0),
        ("", "red", 0.0),
    ],
)
def test_words_and_counts(answer: str, truth: str, worth: float) -> None:
    assert reward(Grounded(answer), Grounded(truth)) == worth


def test_boxes_are_paid_by_their_overlap() -> None:
    truth = Grounded("circle", boxes=(box(0, 0, 10, 10), box(50, 50, 60, 60)))
    half = box(0, 0, 10, 5)
    assert reward(Grounded("", boxes=truth.boxes[::-1]), truth) == pytest.approx(1.0)
    assert reward(Grounded("circle", boxes=(half,)), truth) == pytest.approx(0.25)
    assert reward(Grounded("", boxes=(half, *truth.boxes)), truth) == pytest.approx(2 / 3)  # guessing costs
    assert reward(Grounded("circle"), truth) == 0.0


def test_a_number_is_a_number_alone() -> None:
    assert [counted(text) for text in ("7", "seven", "7 red", "", "-", "²", "99999999999")] == [7, 7, *[None] * 5]


def test_a_true_message_is_read_like_an_answer() -> None:
    place, point = box(1, 2, 3, 4), Point(5, 6, FRAME)
    found = truth_of(Message("assistant", (Text("red"), Region(place), Region(point))))
    assert found == Grounded("red", (place,), (point,))


def batch_of(pairs: list[tuple[Grounded, Grounded]], **extra: object) -> Batch:
    nothing = torch.zeros(0, dtype=torch.int64)
    answers, truths = zip(*pairs, strict=True)
    return Batch(nothing, None, nothing, extra={"answers": answers, "truths": truths, **extra})  # type: ignore[arg-type]


def test_each_reward_has_a_name() -> None:
    place = box(0, 0, 10, 10)
    pairs = [
        (Grounded("three"), Grounded("3")),
        (Grounded("red"), Grounded("Red.")),
        (Grounded("", boxes=(box(0, 0, 10, 5),)), Grounded("circle", boxes=(place,))),
    ]
    batch = batch_of(pairs, shares=torch.tensor([0.1, 0.5, 1.0]), cut=[False, False, True])
    wanted = {
        "truth": [1, 1, 0.5],
        "count": [1, 0, 0],
        "text": [0, 1, 0],
        "iou": [0, 0, 0.5],
        "length": [0.1, 0.5, 1],
        "unfinished": [0, 0, 1],
    }
    assert set(wanted) == set(REWARDS)
    for name, values in wanted.items():
        assert REWARDS[name](batch).tolist() == pytest.approx(values)
    total = Weighted(REWARDS, {"text": 2.0, "unfinished": -8.0, "length": -10.0})(batch)
    assert total.tolist() == pytest.approx([-1.0, -3.0, -18.0])


def test_a_reward_that_there_is_not_is_told() -> None:
    with pytest.raises(ConfigError, match="unknown reward 'coutn'; did you mean 'count'"):
        Weighted(REWARDS, {"coutn": 1.0})
