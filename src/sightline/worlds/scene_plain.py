"""Questions in one wording each, whose words name objects by one attribute: what a model first learns to look with.

A word of the question stands for one object (for all of them where they are counted), and the answer follows from
these alone. Asked in many wordings about crowded scenes from the start, the same things are learned much later.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations

from ..core.errors import ConfigError
from .scene_asking import Question, yes
from .scene_view import DIRECTIONS, View
from .scenes import Object, Scene
from .words import plural


def _color(view: View, rng: random.Random) -> Iterator[Question]:
    for each in _alone(view.objects, "shape"):
        yield Question("color", f"What color is the {each.shape}?", each.color)


def _shape(view: View, rng: random.Random) -> Iterator[Question]:
    for each in _alone(view.objects, "color"):
        yield Question("shape", f"What shape is the {each.color} thing?", each.shape)


def _locate(view: View, rng: random.Random) -> Iterator[Question]:
    for each in _alone(view.objects, "shape"):
        yield Question("locate", f"Where is the {each.shape}?", each.shape, boxes=((each.shape, each.box),))


def _relation(view: View, rng: random.Random) -> Iterator[Question]:
    """One question a pair, its side turned by a fair coin."""
    for first, second in permutations(_alone(view.objects, "shape"), 2):
        if sides := view.sides(first, second):
            side, truth = rng.choice(sides), rng.random() < 0.5
            said = DIRECTIONS[side if truth else DIRECTIONS[side].opposite].words[0]
            yield Question("relation", f"Is the {first.shape} {said} the {second.shape}?", yes(truth))


def _distance(view: View, rng: random.Random) -> Iterator[Question]:
    """What is nearest to each, of which two it is closer to, and of three in a row which is in the middle."""
    alone = _alone(view.objects, "shape")
    for base in alone:
        if nearest := view.nearest(base):
            yield Question("distance", f"What is nearest to the {base.shape}?", nearest.label)
        others = [each for each in alone if each is not base]
        first, second = rng.sample(others, 2) if len(others) > 1 else (base, base)
        if first is not second and (closer := view.closer(base, first, second)) is not None:
            said = f"Is the {base.shape} closer to the {first.shape} than to the {second.shape}?"
            yield Question("distance", said, yes(closer))
    for first, second in combinations(alone, 2):
        if only := view.only_between(first, second):
            said = f"What is between the {first.shape} and the {second.shape}?"
            yield Question("distance", said, only.label)
        for middle in alone:
            if middle not in (first, second) and view.between(middle, first, second):
                inner, outer = (middle, first) if rng.random() < 0.5 else (first, middle)
                said = f"Is the {inner.shape} between the {outer.shape} and the {second.shape}?"
                yield Question("distance", said, yes(inner is middle))


def _count(view: View, rng: random.Random) -> Iterator[Question]:
    """Of what there is once, less than half is asked for: larger numbers are rarer and harder."""
    counts = Counter(plural(each.shape) for each in view.objects)
    counts.update(f"{each.color} things" for each in view.objects)
    kept = {phrase: number for phrase, number in counts.items() if number > 1 or rng.random() < 0.4}
    for phrase, number in (kept or counts).items():
        yield Question("count", f"How many {phrase} are there?", str(number))


def _alone(objects: Sequence[Object], name: str) -> list[Object]:
    """The objects that share this attribute with no other."""
    counts = Counter(getattr(each, name) for each in objects)
    return [each for each in objects if counts[getattr(each, name)] == 1]


_PLAIN: dict[str, Callable[[View, random.Random], Iterator[Question]]] = {
    "color": _color,
    "shape": _shape,
    "locate": _locate,
    "relation": _relation,
    "distance": _distance,
    "count": _count,
}
PLAIN_KINDS = tuple(_PLAIN)


def plain_questions(scene: Scene, rng: random.Random, count: int, kinds: Sequence[str] = PLAIN_KINDS) -> list[Question]:
    """At most `count` questions of `kinds` in random order; ConfigError for a kind that has no plain form."""
    if unknown := [kind for kind in kinds if kind not in _PLAIN]:
        raise ConfigError(f"unknown kind of plain question {unknown[0]!r}: expected some of {', '.join(PLAIN_KINDS)}")
    view = View(scene)
    asked = [question for kind in kinds for question in _PLAIN[kind](view, rng)]
    rng.shuffle(asked)
    return asked[:count]
