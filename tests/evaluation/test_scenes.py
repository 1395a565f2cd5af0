"""Scores of answers that are known to be right, wrong or half right; controls that show what they say."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from sightline.core.geometry import Box, Frame, Point
from sightline.core.sequence import Conversation, images_of
from sightline.evaluation.scenes import (
    FIRST_SEED,
    REACH,
    Item,
    Score,
    evaluate,
    group,
    items,
    score,
)
from sightline.grounding.codecs import Grounded
from sightline.recipes import sightline_mini
from sightline.training.run import TOKENIZER_SCENES
from sightline.worlds.scene_questions import Question
from sightline.worlds.scenes import scene

COUNT = 60


def truth(item: Item) -> Grounded:
    """The right answer as a model would give it."""
    question, frame = item.question, item.frame
    boxes = tuple(Box(*map(float, box), frame) for _, box in question.boxes)
    points = tuple(Point(float(x), float(y), frame) for _, (x, y) in question.points)
    return Grounded(question.answer, boxes, points)


class Oracle:
    """Knows every answer, in the order in which they are asked."""

    def __init__(self, answers: Sequence[Grounded]) -> None:
        self.answers, self.asked = list(answers), 0
        self.pictures: list[np.ndarray] = []

    def __call__(self, conversations: Sequence[Conversation]) -> list[Grounded]:
        start, self.asked = self.asked, self.asked + len(conversations)
        self.pictures += [np.asarray(images_of(talk)[0].picture) for talk in conversations]
        return self.answers[start : self.asked]


def test_right_answers_score_everything_and_empty_ones_nothing() -> None:
    right = evaluate(Oracle([truth(item) for item in items(COUNT)]), COUNT)
    assert right.overall == 1 and right.boxes == 1
    assert sum(each.total for each in right.groups.values()) == COUNT
    assert {"count 1-6", "existence", "locate"} <= set(right.groups)
    wrong = evaluate(Oracle([Grounded("")] * COUNT), COUNT)
    assert wrong.overall == 0 and wrong.boxes == 0


@pytest.mark.parametrize("control", ["real", "blank", "shuffled"])
def test_controls_show_what_they_say(control: str) -> None:
    asked = list(items(8))
    oracle = Oracle([truth(item) for item in asked])
    evaluate(oracle, 8, control)  # type: ignore[arg-type]
    for item, shown in zip(asked, oracle.pictures, strict=True):
        own = np.asarray(scene(item.number).picture())
        assert shown.shape == own.shape
        assert np.array_equal(shown, own) == (control == "real")
        assert (len(np.unique(shown)) == 1) == (control == "blank")


def test_in_a_talk_a_question_comes_after_others_with_their_right_answers() -> None:
    asked, talks = list(items(8)), []

    def answers(conversations: Sequence[Conversation]) -> list[Grounded]:
        talks.extend(conversations)
        return [truth(item) for item in asked]

    assert evaluate(answers, 8, "talk").overall == 1
    for item, talk in zip(asked, talks, strict=True):
        assert [message.text for message in talk if message.role == "user"] == [
            question.text for question in (*item.before, item.question)
        ]
        assert len(images_of(talk)) == 1 and images_of(talk[:1])
    assert [len(item.before) for item in asked] == [0, 1, 2, 3] * 2
    words = next(i for i, item in enumerate(asked) if item.before and not item.before[0].boxes + item.before[0].points)
    assert talks[words][1].text == asked[words].before[0].answer


def located(boxes: Sequence[tuple[float, float, float, float]]) -> Score:
    """The score of these boxes where two are asked for."""
    frame = Frame(128, 128)
    question = Question(
        "locate", "Find all circles.", "circle", boxes=(("a", (10, 10, 30, 30)), ("b", (60, 60, 90, 90)))
    )
    into = Score()
    score(Item(0, question, frame, "locate"), Grounded("", tuple(Box(*b, frame) for b in boxes)), into)
    return into


def test_boxes_count_one_by_one_and_an_answer_as_a_whole() -> None:
    both = [(11.0, 9.0, 31.0, 30.0), (60.0, 60.0, 88.0, 90.0)]
    assert located(both) == Score(right=1, total=1, found=2, boxes=2)
    assert located(both[:1]) == Score(right=0, total=1, found=1, boxes=2)
    assert located([*both, (100.0, 100.0, 120.0, 120.0)]) == Score(right=0, total=1, found=2, boxes=2)
    assert located([both[0], (75.0, 75.0, 105.0, 105.0)]).found == 1  # an overlap of a seventh is no find


@pytest.mark.parametrize("away, right", [(0.0, 1), (REACH * 128 - 0.5, 1), (REACH * 128 + 0.5, 0)])
def test_a_point_must_be_near_its_place(away: float, right: int) -> None:
    frame = Frame(128, 256)
    question = Question("point", "Point to the star.", "star", points=(("star", (50.0, 60.0)),))
    into = Score()
    score(Item(0, question, frame, "point"), Grounded("", points=(Point(50 + away, 60, frame),)), into)
    assert into.right == right


def test_one_point_does_not_answer_for_two() -> None:
    frame = Frame(128, 128)
    question = Question("point", "Point to all stars.", "star", points=(("a", (50.0, 60.0)), ("b", (52.0, 60.0))))
    found = Point(51.0, 60.0, frame)
    into = Score()
    score(Item(0, question, frame, "point"), Grounded("", points=(found,)), into)
    assert into.right == 0
    score(Item(0, question, frame, "point"), Grounded("", points=(found, found)), into)
    assert into.right == 1


def test_groups() -> None:
    count = Question("count", "How many?", "3")
    assert group(count) == "count 1-6"
    assert {group(replace(count, answer=answer)) for answer in ("0", "7", "12")} == {"count other"}
    assert group(Question("relation", "", "yes", meta={"form": "direct"})) == "left/right/above/below"
    assert group(Question("relation", "", "yes", meta={"form": "between"})) == "relation other"
    assert group(Question("color", "", "red")) == "color"


def test_scenes_of_evaluation_are_never_trained_on() -> None:
    recipe = sightline_mini()
    steps = {
        name: sum(s.steps * s.batch * s.accumulate for s in recipe.stages if name in s.data) for name in recipe.sources
    }
    trained = [range(source.start, source.start + steps[name]) for name, source in recipe.sources.items()]
    asked = range(FIRST_SEED, FIRST_SEED + 600_000)  # the shuffled control reaches half a million further
    for seeds in (*trained, TOKENIZER_SCENES):
        assert seeds.stop <= asked.start or seeds.start >= asked.stop
