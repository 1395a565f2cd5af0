"""Questions about objects one by one or all together: is it there, how many, what is it like, where is it."""

import random
from collections.abc import Sequence

from .scene_asking import Builder, Question, ask, yes
from .scene_phrases import GENERIC, Phrase
from .scene_view import View
from .scenes import COLORS, SHAPES, SIZES, TEXTURES, Object, reading_order
from .words import sentence

# existence


def presence(view: View, rng: random.Random) -> tuple[Phrase, bool]:
    """A phrase, and whether something matches it: a fair coin, the same distribution of words on both sides."""
    truth = rng.random() < 0.5
    style = rng.random()
    if style < 0.16:
        return _single("shape", SHAPES, truth, view, rng), truth
    if style < 0.3:
        return _single("color", COLORS, truth, view, rng), truth
    if style < 0.5:
        name, values = ("texture", TEXTURES) if view.textured and rng.random() < 0.5 else ("size", SIZES)
        if (phrase := _qualified(name, rng.choice(values), truth, view, rng)) is not None:
            return phrase, truth
    return _pair(truth, view, rng), truth


def _single(name: str, values: Sequence[str], truth: bool, view: View, rng: random.Random) -> Phrase:
    """One colour or shape; a colour with a shape where all of them are there and an absent one is wanted."""
    present = {getattr(each, name) for each in view.objects}
    fitting = [value for value in values if (value in present) == truth]
    return Phrase(**{name: rng.choice(fitting)}) if fitting else _pair(truth, view, rng)


def _pair(truth: bool, view: View, rng: random.Random) -> Phrase:
    """Colour and shape of an object, or of two: both there, but not together."""
    first = rng.choice(view.objects)
    if truth:
        return Phrase(first.color, first.shape)
    for _ in range(4):
        second = rng.choice(view.objects)
        phrase = Phrase(first.color, second.shape)
        if not view.count(phrase):
            return phrase
    while True:
        swapped = rng.random() < 0.5
        phrase = Phrase(rng.choice(COLORS), first.shape) if swapped else Phrase(first.color, rng.choice(SHAPES))
        if not view.count(phrase):
            return phrase


def _qualified(name: str, value: str, truth: bool, view: View, rng: random.Random) -> Phrase | None:
    """A size or texture with a colour and shape that are there; None unless both answers could be asked."""
    bare = rng.choice((("shape",), ("color", "shape"), ("color",)))
    phrases = {Phrase.of(each, bare): None for each in view.objects}
    sides: dict[bool, list[Phrase]] = {True: [], False: []}
    for phrase in phrases:
        qualified = Phrase(**{**vars(phrase), name: value})
        sides[view.count(qualified) > 0].append(qualified)
    return rng.choice(sides[truth]) if all(sides.values()) else None


_EXISTENCE = (
    "is there {a}?",
    "is there {a} in the picture?",
    "is there {a} in the image?",
    "are there any {many}?",
    "do you see {a}?",
    "does the picture contain {a}?",
    "can you see any {many}?",
    "is {a} present?",
)


def existence(view: View, rng: random.Random) -> Question:
    phrase, truth = presence(view, rng)
    generic = rng.choice(GENERIC)
    words = {"a": phrase.counted(1, generic), "many": phrase.plural(generic)}
    return ask("existence", "presence", _EXISTENCE, yes(truth), rng, **words)


# count

_COUNT = (
    "how many {many} are there?",
    "how many {many} are there?",
    "how many {many}?",
    "how many {many} are in the picture?",
    "how many {many} can you see?",
    "how many {many} does the image show?",
    "count the {many}.",
    "what is the number of {many}?",
)
# The more rarely a scene has so many of anything, the likelier that number is asked for where it has.
_COUNT_WEIGHTS = (0.5, 0.55, 0.9, 1.6, 2.5, 3.7, 5.0, 2.5, 2.0, 2.0, 2.0, 2.0, 2.0)


def count_of(view: View, rng: random.Random) -> Question:
    numbers = list(view.by_count)
    asked = rng.choices(numbers, [_COUNT_WEIGHTS[value] for value in numbers])[0]
    phrase = rng.choice(view.by_count[asked])
    return ask("count", "count", _COUNT, str(asked), rng, many=phrase.plural(rng.choice(GENERIC)))


# attributes

_ATTRIBUTE = {
    "color": (
        "what color is {x}?",
        "what colour is {x}?",
        "which color does {x} have?",
        "what is the color of {x}?",
        "what is the colour of {x}?",
        "{x} is what color?",
        "name the color of {x}.",
    ),
    "shape": (
        "what shape is {x}?",
        "which shape is {x}?",
        "what is the shape of {x}?",
        "what shape does {x} have?",
        "name the shape of {x}.",
        "{x} has what shape?",
    ),
    "size": (
        "what size is {x}?",
        "is {x} small or large?",
        "is {x} large or small?",
        "how big is {x}?",
        "what is the size of {x}?",
        "which size does {x} have?",
    ),
    "texture": (
        "what texture does {x} have?",
        "what is the texture of {x}?",
        "which pattern does {x} have?",
        "what is the pattern of {x}?",
        "how is {x} filled?",
        "is {x} solid, striped, dotted or hollow?",
    ),
}


def attribute(name: str) -> Builder:
    def build(view: View, rng: random.Random) -> Question | None:
        if name == "texture" and not view.textured:
            return None
        found = view.any_reference(rng, without=name)
        if found is None:
            return None
        return ask(name, "attribute", _ATTRIBUTE[name], getattr(found.target, name), rng, x=found.text)

    return build


# locate and point

_LOCATE = (
    "where is {x}?",
    "where is {x}?",
    "locate {x}.",
    "find {x}.",
    "show me {x}.",
    "detect {x}.",
    "give the box of {x}.",
)
_LOCATE_ALL = (
    "find all the {many}.",
    "find all {many}.",
    "locate all {many}.",
    "locate every {one}.",
    "show me all the {many}.",
    "detect all {many}.",
    "give the boxes of all {many}.",
)
_POINT = (
    "point to {x}.",
    "point at {x}.",
    "mark {x} with a point.",
    "give a point on {x}.",
    "where is the middle of {x}?",
    "click on {x}.",
)
_POINT_ALL = (
    "point to all {many}.",
    "point to all the {many}.",
    "point at every {one}.",
    "mark all {many} with points.",
    "click on every {one}.",
)
_ABSENT = 0.06  # share of searches for what is not there, answered "none"


def _label(phrase: Phrase, each: Object) -> str:
    """What is asked for where its shape is named, else colour and shape."""
    return phrase.singular() if phrase.shape else each.label


def _sought(view: View, rng: random.Random, most: int) -> tuple[Phrase, list[Object]] | None:
    """What to search for, and all of it, left to right; None where everything comes in more than `most`."""
    if rng.random() < _ABSENT:
        return _pair(False, view, rng), []
    numbers = [value for value in view.by_count if 1 <= value <= most]
    if not numbers:
        return None
    wanted = rng.choices(numbers, [1.0 if value > 1 else 0.6 for value in numbers])[0]
    phrase = rng.choice(view.by_count[wanted])
    return phrase, reading_order([each for each in view.objects if phrase.matches(each)])


def _search(kind: str, one: Sequence[str], every: Sequence[str]) -> Builder:
    def build(view: View, rng: random.Random) -> Question | None:
        if rng.random() < 0.55:
            if (found := view.any_reference(rng)) is None:
                return None
            things, phrase, form = [found.target], found.phrase, "one"
            text = rng.choice(one).format(x=found.text)
        else:
            if (sought := _sought(view, rng, 6)) is None:
                return None
            phrase, things = sought
            generic, form = rng.choice(GENERIC), "all"
            text = rng.choice(every).format(many=phrase.plural(generic), one=phrase.singular(generic))
        labels = [_label(phrase, each) for each in things]
        boxes = tuple((label, each.box) for label, each in zip(labels, things, strict=True))
        points = tuple((label, each.center) for label, each in zip(labels, things, strict=True))
        places = {"boxes": boxes} if kind == "locate" else {"points": points}
        return Question(kind, sentence(text), labels[0] if labels else "none", meta={"form": form}, **places)

    return build


locate = _search("locate", _LOCATE, _LOCATE_ALL)
point = _search("point", _POINT, _POINT_ALL)
