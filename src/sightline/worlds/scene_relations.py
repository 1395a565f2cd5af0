"""Questions about where objects are to each other."""

import random

from .scene_asking import Builder, Question, ask, first_of, yes
from .scene_phrases import GENERIC, Phrase
from .scene_view import DIRECTIONS, Reference, View

_RELATION = (
    "is {a} {side} {b}?",
    "is {a} {side} {b}?",
    "is {a} located {side} {b}?",
    "does {a} lie {side} {b}?",
    "can {a} be found {side} {b}?",
    "in the picture, is {a} {side} {b}?",
)
_SOME_RELATION = (
    "is there {a} {side} {b}?",
    "is {a} {side} {b}?",
    "do you see {a} {side} {b}?",
    "is there {a} that is {side} {b}?",
    "does the picture show {a} {side} {b}?",
)
_EITHER = {
    "x": (
        "is {a} left or right of {b}?",
        "is {a} to the left or to the right of {b}?",
        "is {a} to the right or to the left of {b}?",
    ),
    "y": ("is {a} above or below {b}?", "is {a} below or above {b}?", "does {a} lie above or below {b}?"),
}
_NEAREST = (
    "what is nearest to {x}?",
    "what is closest to {x}?",
    "which object is nearest to {x}?",
    "which object is closest to {x}?",
    "which thing lies nearest to {x}?",
)
_NEIGHBOUR = (
    "what is {side} {x}?",
    "which object is {side} {x}?",
    "what can be seen {side} {x}?",
    "what lies {side} {x}?",
    "name the object {side} {x}.",
)
_BETWEEN = (
    "is {x} between {a} and {b}?",
    "does {x} lie between {a} and {b}?",
    "is {x} located between {a} and {b}?",
    "can {x} be found between {a} and {b}?",
)
_WHAT_BETWEEN = (
    "what is between {a} and {b}?",
    "which object is between {a} and {b}?",
    "what lies between {a} and {b}?",
    "name the object between {a} and {b}.",
    "what can be seen between {a} and {b}?",
)
_CLOSER = (
    "is {x} closer to {a} than to {b}?",
    "is {x} nearer to {a} than to {b}?",
    "does {x} lie closer to {a} than to {b}?",
    "is the distance from {x} to {a} shorter than to {b}?",
    "compared with {b}, is {a} closer to {x}?",
)


def directed(view: View, rng: random.Random) -> tuple[Reference, Reference, str, bool] | None:
    """Two things, a side, and whether the first lies on that side of the second."""
    pair = view.references(rng, 2)
    if pair is None:
        return None
    first, second = pair
    sides = view.sides(first.target, second.target)
    if not sides:
        return None
    side, truth = rng.choice(sides), rng.random() < 0.5
    return first, second, side if truth else DIRECTIONS[side].opposite, truth


def _relation_direct(view: View, rng: random.Random) -> Question | None:
    if (found := directed(view, rng)) is None:
        return None
    first, second, side, truth = found
    words = {"a": first.text, "b": second.text, "side": rng.choice(DIRECTIONS[side].words)}
    return ask("relation", "direct", _RELATION, yes(truth), rng, **words)


def _either(view: View, rng: random.Random) -> Question | None:
    if (found := directed(view, rng)) is None:
        return None
    first, second, side, truth = found
    actual = side if truth else DIRECTIONS[side].opposite
    return ask("relation", "either", _EITHER[DIRECTIONS[side].axis], actual, rng, a=first.text, b=second.text)


def some_directed(view: View, rng: random.Random) -> tuple[Phrase, Phrase, str, bool] | None:
    """Two kinds of things, a side, and whether any of the first kind is on that side of any of the second."""
    first, second = (
        Phrase.of(each, rng.choice((("shape",), ("color",), ("color", "shape")))) for each in view.two(rng)
    )
    sides = view.sides_of_kinds(first, second)
    if not sides:
        return None
    side, truth = rng.choice(sides), rng.random() < 0.5
    return first, second, side if truth else DIRECTIONS[side].opposite, truth


def some_words(first: Phrase, second: Phrase, side: str, rng: random.Random) -> dict[str, str]:
    """What a question or a statement about two kinds of things and a side says."""
    generic = rng.choice(GENERIC)
    named = {"a": first.counted(1, generic), "b": second.counted(1, generic)}
    return {**named, "side": rng.choice(DIRECTIONS[side].words)}


def _relation_some(view: View, rng: random.Random) -> Question | None:
    if len(view.objects) < 2 or (found := some_directed(view, rng)) is None:
        return None
    first, second, side, truth = found
    return ask("relation", "some", _SOME_RELATION, yes(truth), rng, **some_words(first, second, side, rng))


def _nearest(view: View, rng: random.Random) -> Question | None:
    found = view.any_reference(rng)
    nearest = view.nearest(found.target) if found else None
    if found is None or nearest is None:
        return None
    return ask("relation", "nearest", _NEAREST, nearest.label, rng, x=found.text)


def _neighbour(view: View, rng: random.Random) -> Question | None:
    found = view.any_reference(rng)
    if found is None:
        return None
    sides = [(side, only) for side in DIRECTIONS if (only := view.only_one(side, found.target)) is not None]
    if not sides:
        return None
    side, only = rng.choice(sides)
    words = {"x": found.text, "side": rng.choice(DIRECTIONS[side].words)}
    return ask("relation", "neighbour", _NEIGHBOUR, only.label, rng, **words)


def _between(view: View, rng: random.Random) -> Question | None:
    """The middle one of three in a row is between the outer ones; an outer one is not."""
    for _ in range(4):
        if (three := view.references(rng, 3)) is None:
            return None
        middle, end, other = three
        if view.between(middle.target, end.target, other.target):
            truth = rng.random() < 0.5
            inner, outer = (middle, end) if truth else (end, middle)
            pair = [outer.text, other.text]
            rng.shuffle(pair)
            return ask("relation", "between", _BETWEEN, yes(truth), rng, x=inner.text, a=pair[0], b=pair[1])
    return None


def _what_between(view: View, rng: random.Random) -> Question | None:
    for _ in range(4):
        if (pair := view.references(rng, 2)) is None:
            return None
        only = view.only_between(pair[0].target, pair[1].target)
        if only is not None:
            words = {"a": pair[0].text, "b": pair[1].text}
            return ask("relation", "what between", _WHAT_BETWEEN, only.label, rng, **words)
    return None


def _closer(view: View, rng: random.Random) -> Question | None:
    if (three := view.references(rng, 3)) is None:
        return None
    base, near, far = three
    closer = view.closer(base.target, near.target, far.target)
    if closer is None:
        return None
    words = {"x": base.text, "a": near.text, "b": far.text}
    return ask("relation", "closer", _CLOSER, yes(closer), rng, **words)


_RELATIONS: dict[Builder, float] = {  # how often each form is tried first
    _relation_direct: 4.0,
    _relation_some: 1.5,
    _either: 0.8,
    _nearest: 1.3,
    _neighbour: 1.2,
    _between: 2.0,
    _what_between: 1.2,
    _closer: 0.5,
}


def relation(view: View, rng: random.Random) -> Question | None:
    return first_of(_RELATIONS, view, rng)
