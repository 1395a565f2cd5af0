"""Questions about scenes whose answers follow from the scene, in varied wording.

Every yes/no question is one of a pair: the same words with the answer turned (another direction, another of two
things counted, colour and shape joined differently), and a fair coin decides which of the two is asked. A reader who
does not see the picture therefore gains nothing from the words.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .scene_phrases import GENERIC, Phrase
from .scene_view import DIRECTIONS, Reference, View
from .scenes import COLORS, SHAPES, SIZES, TEXTURES, Object, Scene, Xyxy, reading_order
from .words import article, number, plural, sentence

Labelled = tuple[tuple[str, Xyxy], ...]
Pointed = tuple[tuple[str, tuple[float, float]], ...]


@dataclass(frozen=True)
class Question:
    """A question with its answer: short, lower case. For `locate` and `point` the answer is the label of what is
    found ("none" if nothing is), and `boxes` or `points` hold (label, place in pixels), left to right. `meta` says
    which `form` was asked."""

    kind: str
    text: str
    answer: str
    boxes: Labelled = ()
    points: Pointed = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


Builder = Callable[[View, random.Random], Question | None]

WEIGHTS = {
    "existence": 2.0,
    "count": 3.0,
    "color": 1.6,
    "shape": 1.4,
    "size": 0.9,
    "texture": 0.8,
    "relation": 3.0,
    "comparison": 1.5,
    "statement": 2.5,
    "locate": 2.5,
    "point": 0.8,
}
KINDS = tuple(WEIGHTS)


def questions(scene: Scene, rng: random.Random, count: int, kinds: Sequence[str] | None = None) -> list[Question]:
    """`count` different questions of mixed kinds, or of `kinds` alike often; fewer where the scene affords fewer."""
    view = View(scene)
    chosen = tuple(WEIGHTS) if kinds is None else tuple(kinds)
    weights = [WEIGHTS[kind] for kind in chosen] if kinds is None else None
    asked: dict[str, Question] = {}
    for _ in range(count * 12):
        if len(asked) == count:
            break
        question = BUILDERS[rng.choices(chosen, weights)[0]](view, rng)
        if question is not None:
            asked.setdefault(question.text, question)
    return list(asked.values())


def _ask(kind: str, form: str, templates: Sequence[str], answer: str, rng: random.Random, **words: str) -> Question:
    return Question(kind, sentence(rng.choice(templates).format(**words)), answer, meta={"form": form})


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _first(forms: Mapping[Builder, float], view: View, rng: random.Random) -> Question | None:
    """The first of the forms, in a weighted random order, that this scene affords."""
    left = dict(forms)
    while left:
        form = rng.choices(list(left), list(left.values()))[0]
        if (question := form(view, rng)) is not None:
            return question
        del left[form]
    return None


# -------------------------------------------------------------------------------------------------------- existence


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
    present = {getattr(each, name) for each in view.objects}
    return Phrase(**{name: rng.choice([value for value in values if (value in present) == truth])})


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


def _existence(view: View, rng: random.Random) -> Question:
    phrase, truth = presence(view, rng)
    generic = rng.choice(GENERIC)
    words = {"a": phrase.counted(1, generic), "many": phrase.plural(generic)}
    return _ask("existence", "presence", _EXISTENCE, _yes(truth), rng, **words)


# ------------------------------------------------------------------------------------------------------------ count

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


def _count(view: View, rng: random.Random) -> Question:
    numbers = list(view.by_count)
    asked = rng.choices(numbers, [_COUNT_WEIGHTS[value] for value in numbers])[0]
    phrase = rng.choice(view.by_count[asked])
    return _ask("count", "count", _COUNT, str(asked), rng, many=phrase.plural(rng.choice(GENERIC)))


# ------------------------------------------------------------------------------------------------------- attributes

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


def _attribute(name: str) -> Builder:
    def build(view: View, rng: random.Random) -> Question | None:
        if name == "texture" and not view.textured:
            return None
        found = view.any_reference(rng, without=name)
        if found is None:
            return None
        return _ask(name, "attribute", _ATTRIBUTE[name], getattr(found.target, name), rng, x=found.text)

    return build


# --------------------------------------------------------------------------------------------------------- relation

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
    "between {a} and {b}, is there {x}?",
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


def _directed(view: View, rng: random.Random) -> tuple[Reference, Reference, str, bool] | None:
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
    if (found := _directed(view, rng)) is None:
        return None
    first, second, side, truth = found
    words = {"a": first.text, "b": second.text, "side": rng.choice(DIRECTIONS[side].words)}
    return _ask("relation", "direct", _RELATION, _yes(truth), rng, **words)


def _either(view: View, rng: random.Random) -> Question | None:
    if (found := _directed(view, rng)) is None:
        return None
    first, second, side, truth = found
    actual = side if truth else DIRECTIONS[side].opposite
    return _ask("relation", "either", _EITHER[DIRECTIONS[side].axis], actual, rng, a=first.text, b=second.text)


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


def _relation_some(view: View, rng: random.Random) -> Question | None:
    if len(view.objects) < 2 or (found := some_directed(view, rng)) is None:
        return None
    first, second, side, truth = found
    generic = rng.choice(GENERIC)
    words = {
        "a": first.counted(1, generic),
        "b": second.counted(1, generic),
        "side": rng.choice(DIRECTIONS[side].words),
    }
    return _ask("relation", "some", _SOME_RELATION, _yes(truth), rng, **words)


def _nearest(view: View, rng: random.Random) -> Question | None:
    found = view.any_reference(rng)
    nearest = view.nearest(found.target) if found else None
    if found is None or nearest is None:
        return None
    return _ask("relation", "nearest", _NEAREST, nearest.label, rng, x=found.text)


def _neighbour(view: View, rng: random.Random) -> Question | None:
    found = view.any_reference(rng)
    if found is None:
        return None
    sides = [(side, only) for side in DIRECTIONS if (only := view.only_one(side, found.target)) is not None]
    if not sides:
        return None
    side, only = rng.choice(sides)
    words = {"x": found.text, "side": rng.choice(DIRECTIONS[side].words)}
    return _ask("relation", "neighbour", _NEIGHBOUR, only.label, rng, **words)


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
            return _ask("relation", "between", _BETWEEN[:4], _yes(truth), rng, x=inner.text, a=pair[0], b=pair[1])
    return None


def _what_between(view: View, rng: random.Random) -> Question | None:
    for _ in range(4):
        if (pair := view.references(rng, 2)) is None:
            return None
        only = view.only_between(pair[0].target, pair[1].target)
        if only is not None:
            words = {"a": pair[0].text, "b": pair[1].text}
            return _ask("relation", "what between", _WHAT_BETWEEN, only.label, rng, **words)
    return None


def _closer(view: View, rng: random.Random) -> Question | None:
    if (three := view.references(rng, 3)) is None:
        return None
    base, near, far = three
    closer = view.closer(base.target, near.target, far.target)
    if closer is None:
        return None
    words = {"x": base.text, "a": near.text, "b": far.text}
    return _ask("relation", "closer", _CLOSER, _yes(closer), rng, **words)


_RELATIONS = {
    _relation_direct: 4.0,
    _relation_some: 1.5,
    _either: 0.8,
    _nearest: 1.3,
    _neighbour: 1.2,
    _between: 2.0,
    _what_between: 1.2,
    _closer: 0.5,
}


def _relation(view: View, rng: random.Random) -> Question | None:
    return _first(_RELATIONS, view, rng)


# ------------------------------------------------------------------------------------------------------- comparison

_MORE = (
    "are there more {a} than {b}?",
    "are there more {a} than {b} in the picture?",
    "do you see more {a} than {b}?",
    "is the number of {a} greater than the number of {b}?",
    "does the image show more {a} than {b}?",
)
_FEWER = (
    "are there fewer {a} than {b}?",
    "are there fewer {a} than {b} in the picture?",
    "do you see fewer {a} than {b}?",
    "is the number of {a} smaller than the number of {b}?",
    "does the image show fewer {a} than {b}?",
)
_EQUAL = (
    "are there as many {a} as {b}?",
    "is the number of {a} the same as the number of {b}?",
    "are there equally many {a} and {b}?",
    "is the number of {a} equal to the number of {b}?",
    "does the picture show the same number of {a} and {b}?",
)
_WHICH = (
    "are there more {a} or more {b}?",
    "which are there more of, {a} or {b}?",
    "what is more frequent, {a} or {b}?",
    "of {a} and {b}, which are there more of?",
    "do you see more {a} or more {b}?",
)
_LARGER = (
    "is {a} larger than {b}?",
    "is {a} bigger than {b}?",
    "is {a} larger in size than {b}?",
    "compared with {b}, is {a} larger?",
    "is {b} smaller than {a}?",
)
_SAME = {
    "color": (
        "is {a} the same color as {b}?",
        "does {a} have the same colour as {b}?",
        "do {a} and {b} have the same color?",
    ),
    "shape": (
        "is {a} the same shape as {b}?",
        "does {a} have the same shape as {b}?",
        "do {a} and {b} have the same shape?",
    ),
}


def _more(view: View, rng: random.Random) -> Question | None:
    compared = view.compared(rng)
    if compared is None:
        return None
    many, few = compared.unequal
    fewer, truth = rng.random() < 0.4, rng.random() < 0.5
    first, second = (many, few) if truth != fewer else (few, many)
    if not truth and compared.equal and rng.random() < 0.25:
        first, second = compared.equal
    generic = rng.choice(GENERIC)
    words = {"a": first.plural(generic), "b": second.plural(generic)}
    return _ask("comparison", "fewer" if fewer else "more", _FEWER if fewer else _MORE, _yes(truth), rng, **words)


def _equal(view: View, rng: random.Random) -> Question | None:
    compared = view.compared(rng, equal=True)
    if compared is None or compared.equal is None:
        return None
    truth = rng.random() < 0.5
    pair = list(compared.equal if truth else compared.unequal)
    rng.shuffle(pair)
    generic = rng.choice(GENERIC)
    words = {"a": pair[0].plural(generic), "b": pair[1].plural(generic)}
    return _ask("comparison", "equal", _EQUAL, _yes(truth), rng, **words)


def _which(view: View, rng: random.Random) -> Question | None:
    compared = view.compared(rng)
    if compared is None:
        return None
    generic = rng.choice(GENERIC)
    both = [phrase.plural(generic) for phrase in compared.unequal]
    answer = both[0]
    rng.shuffle(both)
    return _ask("comparison", "which", _WHICH, answer, rng, a=both[0], b=both[1])


def _larger(view: View, rng: random.Random) -> Question | None:
    pair = view.references(rng, 2, without="size")
    if pair is None or pair[0].target.size == pair[1].target.size:
        return None
    truth = pair[0].target.size == "large"
    return _ask("comparison", "larger", _LARGER, _yes(truth), rng, a=pair[0].text, b=pair[1].text)


def _same(view: View, rng: random.Random) -> Question | None:
    name = rng.choice(("color", "shape"))
    three = view.references(rng, 3, without=name)
    if three is None:
        return None
    value = getattr(three[0].target, name)
    alike = [other for other in three[1:] if getattr(other.target, name) == value]
    if len(alike) != 1:
        return None
    truth = rng.random() < 0.5
    other = alike[0] if truth else next(each for each in three[1:] if each is not alike[0])
    return _ask("comparison", f"same {name}", _SAME[name], _yes(truth), rng, a=three[0].text, b=other.text)


_COMPARISONS = {_more: 5.0, _equal: 1.5, _which: 1.5, _larger: 1.0, _same: 1.0}


def _comparison(view: View, rng: random.Random) -> Question | None:
    return _first(_COMPARISONS, view, rng)


# -------------------------------------------------------------------------------------------------------- statement

_IS = (
    "there is {a}.",
    "there is {a} in the picture.",
    "the picture contains {a}.",
    "one can see {a}.",
    "at least one {one} is present.",
)
_EXACT = (
    "there {are} {n} {many}.",
    "there {are} exactly {n} {many}.",
    "there {are} {n} {many} in the picture.",
    "the number of {all} is {n}.",
    "the picture shows exactly {n} {many}.",
    "one can see {n} {many}.",
)
_BOUNDS = {
    "at least": (
        "there {are} at least {n} {many}.",
        "the picture has at least {n} {many}.",
        "at least {n} {many} can be seen.",
    ),
    "at most": (
        "there {are} at most {n} {many}.",
        "the picture has at most {n} {many}.",
        "at most {n} {many} can be seen.",
    ),
    "more than": (
        "there {are} more than {n} {many}.",
        "the picture has more than {n} {many}.",
        "more than {n} {many} can be seen.",
    ),
    "fewer than": (
        "there {are} fewer than {n} {many}.",
        "the picture has fewer than {n} {many}.",
        "fewer than {n} {many} can be seen.",
    ),
}
_IS_SIDE = (
    "{a} is {side} {b}.",
    "{a} is {side} {b}.",
    "{a} lies {side} {b}.",
    "{a} can be found {side} {b}.",
    "{a} is located {side} {b}.",
)
_SOME_SIDE = (
    "there is {a} {side} {b}.",
    "there is {a} {side} {b}.",
    "{a} is {side} {b}.",
    "the picture shows {a} {side} {b}.",
    "there is {a} that is {side} {b}.",
)
_ALL = (
    "all {many} are {value}.",
    "every {one} is {value}.",
    "each {one} is {value}.",
    "all of the {many} are {value}.",
)
_ALL_SHAPE = (
    "all {many} are {values}.",
    "every {one} is {a}.",
    "each {one} is {a}.",
    "all of the {many} are {values}.",
)
_COMPARED = {
    "more": ("there are more {a} than {b}.", "the picture shows more {a} than {b}.", "{a} are more frequent than {b}."),
    "fewer": (
        "there are fewer {a} than {b}.",
        "the picture shows fewer {a} than {b}.",
        "{a} are less frequent than {b}.",
    ),
}
_WRAPPERS = ("true or false: {s}", "true or false? {s}", "decide whether this is true or false: {s}")
_YES_WRAPPERS = (
    "is this statement true? {s}",
    "is this statement about the image true? {s}",
    "does this describe the picture? {s}",
)


def _state(form: str, templates: Sequence[str], truth: bool, rng: random.Random, **words: str) -> Question:
    """The statement alone or after a prompt; a prompt that is a yes/no question is answered with yes or no."""
    text = sentence(rng.choice(templates).format(**words))
    style = rng.random()
    if style < 0.15:
        text = sentence(rng.choice(_YES_WRAPPERS).format(s=text))
        return Question("statement", text, _yes(truth), meta={"form": form})
    if style < 0.35:
        text = sentence(rng.choice(_WRAPPERS).format(s=text))
    return Question("statement", text, "true" if truth else "false", meta={"form": form})


def _number_word(value: int, rng: random.Random) -> str:
    return str(value) if rng.random() < 0.5 else number(value)


def _counted(
    form: str, templates: Sequence[str], stated: int, phrase: Phrase, truth: bool, rng: random.Random
) -> Question:
    generic = rng.choice(GENERIC)
    words = {
        "n": "no" if stated == 0 and form == "exact" else _number_word(stated, rng),
        "many": phrase.singular(generic) if stated == 1 else phrase.plural(generic),
        "all": phrase.plural(generic),
        "are": "is" if stated == 1 else "are",
    }
    return _state(form, templates, truth, rng, **words)


def _state_count(view: View, rng: random.Random) -> Question | None:
    """A number that is right for one of two phrases and wrong for the other."""
    compared = view.compared(rng)
    if compared is None:
        return None
    pair = list(compared.unequal)
    truth = rng.random() < 0.5
    if rng.random() < 0.6:
        rng.shuffle(pair)
        templates = _EXACT if view.count(pair[0]) else _EXACT[:3]
        return _counted("exact", templates, view.count(pair[0]), pair[0] if truth else pair[1], truth, rng)
    many, few = pair
    form = rng.choice(tuple(_BOUNDS))
    stated = view.count(many if form in ("at least", "fewer than") else few)
    right = many if form in ("at least", "more than") else few
    said = right if truth else (few if right is many else many)
    return _counted(form, _BOUNDS[form], stated, said, truth, rng)


def _state_presence(view: View, rng: random.Random) -> Question:
    phrase, truth = presence(view, rng)
    generic = rng.choice(GENERIC)
    return _state("presence", _IS, truth, rng, a=phrase.counted(1, generic), one=phrase.singular(generic))


def _state_side(view: View, rng: random.Random) -> Question | None:
    if (found := _directed(view, rng)) is None:
        return None
    first, second, side, truth = found
    words = {"a": first.text, "b": second.text, "side": rng.choice(DIRECTIONS[side].words)}
    return _state("direct", _IS_SIDE, truth, rng, **words)


def _state_some_side(view: View, rng: random.Random) -> Question | None:
    if len(view.objects) < 2 or (found := some_directed(view, rng)) is None:
        return None
    first, second, side, truth = found
    generic = rng.choice(GENERIC)
    words = {
        "a": first.counted(1, generic),
        "b": second.counted(1, generic),
        "side": rng.choice(DIRECTIONS[side].words),
    }
    return _state("some", _SOME_SIDE, truth, rng, **words)


def _state_attribute(view: View, rng: random.Random) -> Question | None:
    """The colour, shape or size of one thing, said of it or of another thing that differs."""
    name = rng.choice(("color", "color", "shape", "size"))
    pair = view.references(rng, 2, without=name)
    if pair is None:
        return None
    value, other = (getattr(each.target, name) for each in pair)
    if value == other:
        return None
    truth = rng.random() < 0.5
    said = value if truth else other
    return _state(
        f"is {name}", ("{a} is {v}.",), truth, rng, a=pair[0].text, v=article(said) if name == "shape" else said
    )


def _state_all(view: View, rng: random.Random) -> Question | None:
    """A claim about all objects, or all of one shape or colour."""
    told = view.uniformity(rng)
    if told is None:
        return None
    generic = rng.choice(GENERIC)
    templates = _ALL_SHAPE if told.name == "shape" else _ALL
    words = {"many": told.phrase.plural(generic), "one": told.phrase.singular(generic)}
    values = {"value": told.value, "a": article(told.value), "values": plural(told.value)}
    return _state(f"all {told.name}", templates, told.truth, rng, **words, **values)


def _state_compared(view: View, rng: random.Random) -> Question | None:
    compared = view.compared(rng)
    if compared is None:
        return None
    many, few = compared.unequal
    form, truth = rng.choice(tuple(_COMPARED)), rng.random() < 0.5
    first, second = (many, few) if truth == (form == "more") else (few, many)
    generic = rng.choice(GENERIC)
    return _state(form, _COMPARED[form], truth, rng, a=first.plural(generic), b=second.plural(generic))


_STATEMENTS = {
    _state_count: 4.0,
    _state_presence: 1.2,
    _state_side: 2.5,
    _state_some_side: 1.5,
    _state_attribute: 1.5,
    _state_all: 0.8,
    _state_compared: 0.8,
}


def _statement(view: View, rng: random.Random) -> Question | None:
    return _first(_STATEMENTS, view, rng)


# ------------------------------------------------------------------------------------------------- locate and point

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


def _sought(view: View, rng: random.Random, most: int) -> tuple[Phrase, list[Object]]:
    """What to search for, and all of it, left to right; fewer are likelier."""
    if rng.random() < _ABSENT:
        return _pair(False, view, rng), []
    numbers = [value for value in view.by_count if 1 <= value <= most]
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
            phrase, things = _sought(view, rng, 6)
            generic, form = rng.choice(GENERIC), "all"
            text = rng.choice(every).format(many=phrase.plural(generic), one=phrase.singular(generic))
        labels = [_label(phrase, each) for each in things]
        boxes = tuple((label, each.box) for label, each in zip(labels, things, strict=True))
        points = tuple((label, each.center) for label, each in zip(labels, things, strict=True))
        places = {"boxes": boxes} if kind == "locate" else {"points": points}
        return Question(kind, sentence(text), labels[0] if labels else "none", meta={"form": form}, **places)

    return build


BUILDERS: dict[str, Builder] = {
    "existence": _existence,
    "count": _count,
    "color": _attribute("color"),
    "shape": _attribute("shape"),
    "size": _attribute("size"),
    "texture": _attribute("texture"),
    "relation": _relation,
    "comparison": _comparison,
    "statement": _statement,
    "locate": _search("locate", _LOCATE, _LOCATE_ALL),
    "point": _search("point", _POINT, _POINT_ALL),
}
