"""Plain questions, read back with nothing but their words and the scene."""

import math
import random
from collections import Counter

import pytest

from sightline.core.errors import ConfigError
from sightline.worlds.scene_plain import PLAIN_KINDS, plain_questions
from sightline.worlds.scenes import Object, Scene, SceneConfig, scene
from sightline.worlds.words import plural

MOVES = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}


def named(made: Scene, text: str) -> list[Object]:
    """The objects that the words of a question name, in the order of the words."""
    words = text.rstrip("?").split()
    return [each for word in words for each in made.objects if word in (each.shape, each.color, plural(each.shape))]


def by_distance(made: Scene, text: str, things: list[Object]) -> str:
    """The answer to a question about what is near to what, from the middles of the objects alone."""
    apart = lambda a, b: math.dist(a.center, b.center)  # noqa: E731
    others = [each for each in made.objects if each not in things]
    if "nearest" in text:
        return min(others, key=lambda each: apart(each, things[0])).label
    if "closer" in text:
        return "yes" if apart(things[0], things[1]) < apart(things[0], things[2]) else "no"

    def detour(middle: Object, end: Object, other: Object) -> float:
        return apart(end, middle) + apart(middle, other) - apart(end, other)

    if text.startswith("What"):
        return min(others, key=lambda each: detour(each, *things)).label
    return "yes" if detour(*things) < 0.15 * apart(*things[1:]) else "no"


@pytest.mark.parametrize("seed", range(40))
def test_their_answers_follow_from_the_objects_that_their_words_name(seed: int) -> None:
    made = scene(seed)
    asked = plain_questions(made, random.Random(seed), 1000)
    assert len({question.text for question in asked}) == len(asked)
    once = {
        name: sum(number == 1 for number in Counter(getattr(each, name) for each in made.objects).values())
        for name in ("shape", "color")
    }
    kinds = Counter(question.kind for question in asked)
    assert (kinds["color"], kinds["shape"], kinds["locate"]) == (once["shape"], once["color"], once["shape"])
    for question in asked:
        things = named(made, question.text)
        if question.kind == "relation":
            first, second = things
            x, y = next(move for word, move in MOVES.items() if word in question.text.split())
            ahead = (first.center[0] - second.center[0]) * x + (first.center[1] - second.center[1]) * y
            assert question.answer == ("yes" if ahead > 0 else "no")
            continue
        if question.kind == "distance":
            assert question.answer == by_distance(made, question.text, things)
            continue
        if question.kind == "count":
            assert question.answer == str(len(things))
            continue
        (only,) = things
        assert question.answer == (only.color if question.kind == "color" else only.shape)
        assert [box for _, box in question.boxes] == ([only.box] if question.kind == "locate" else [])


def test_what_is_there_often_is_counted_more_often() -> None:
    asked = [q for seed in range(200) for q in plain_questions(scene(seed), random.Random(seed), 100, ("count",))]
    numbers = Counter(question.answer for question in asked)
    assert numbers["1"] < len(asked) / 2
    assert all(numbers[str(number)] > 20 for number in range(1, 7))


@pytest.mark.parametrize("kind", ["relation", "distance"])
def test_yes_and_no_are_alike_often(kind: str) -> None:
    made = [scene(seed, SceneConfig(min_objects=4, max_objects=8, distinct=True)) for seed in range(150)]
    asked = [q for each in made for q in plain_questions(each, random.Random(each.seed), 100, (kind,))]
    answers = Counter(question.answer for question in asked)
    assert answers["yes"] + answers["no"] > 1000
    assert 0.46 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.54


def test_all_that_is_asked_about_distances_is_asked_often() -> None:
    made = [scene(seed, SceneConfig(min_objects=4, max_objects=8, distinct=True)) for seed in range(100)]
    asked = [q for each in made for q in plain_questions(each, random.Random(each.seed), 12, ("distance",))]
    forms = Counter(next(form for form in ("nearest", "closer", "between") if form in q.text) for q in asked)
    whats = sum(q.text.startswith("What is between") for q in asked)
    assert min(*forms.values(), whats) > 50


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_only_the_kinds_that_are_wanted_are_asked(kind: str) -> None:
    made = scene(3, SceneConfig(min_objects=6, max_objects=6, distinct=True))
    assert {question.kind for question in plain_questions(made, random.Random(0), 50, (kind,))} == {kind}


def test_they_are_at_most_so_many() -> None:
    made = scene(0, SceneConfig(min_objects=4, max_objects=4, distinct=True))
    assert len(plain_questions(made, random.Random(0), 3)) == 3


def test_an_unknown_kind_is_told() -> None:
    with pytest.raises(ConfigError, match="unknown kind of plain question 'size': expected some of color, shape"):
        plain_questions(scene(0), random.Random(0), 3, ("size",))
