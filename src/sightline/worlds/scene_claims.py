"""Comparisons, and statements that are true or false."""

import random
from collections.abc import Sequence

from .scene_asking import Builder, Question, ask, first_of, yes
from .scene_facts import presence
from .scene_phrases import GENERIC, Phrase
from .scene_relations import directed, some_directed, some_words
from .scene_view import DIRECTIONS, View
from .words import article, number, plural, sentence

# comparison

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
    return ask("comparison", "fewer" if fewer else "more", _FEWER if fewer else _MORE, yes(truth), rng, **words)


def _equal(view: View, rng: random.Random) -> Question | None:
    compared = view.compared(rng, equal=True)
    if compared is None or compared.equal is None:
        return None
    truth = rng.random() < 0.5
    pair = list(compared.equal if truth else compared.unequal)
    rng.shuffle(pair)
    generic = rng.choice(GENERIC)
    words = {"a": pair[0].plural(generic), "b": pair[1].plural(generic)}
    return ask("comparison", "equal", _EQUAL, yes(truth), rng, **words)


def _which(view: View, rng: random.Random) -> Question | None:
    compared = view.compared(rng)
    if compared is None:
        return None
    generic = rng.choice(GENERIC)
    both = [phrase.plural(generic) for phrase in compared.unequal]
    answer = both[0]
    rng.shuffle(both)
    return ask("comparison", "which", _WHICH, answer, rng, a=both[0], b=both[1])


def _larger(view: View, rng: random.Random) -> Question | None:
    pair = view.references(rng, 2, without="size")
    if pair is None or pair[0].target.size == pair[1].target.size:
        return None
    truth = pair[0].target.size == "large"
    return ask("comparison", "larger", _LARGER, yes(truth), rng, a=pair[0].text, b=pair[1].text)


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
    return ask("comparison", f"same {name}", _SAME[name], yes(truth), rng, a=three[0].text, b=other.text)


# How often each form is tried first.
_COMPARISONS: dict[Builder, float] = {_more: 5.0, _equal: 1.5, _which: 1.5, _larger: 1.0, _same: 1.0}


def comparison(view: View, rng: random.Random) -> Question | None:
    return first_of(_COMPARISONS, view, rng)


# statement

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
        return Question("statement", text, yes(truth), meta={"form": form})
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
    if (found := directed(view, rng)) is None:
        return None
    first, second, side, truth = found
    words = {"a": first.text, "b": second.text, "side": rng.choice(DIRECTIONS[side].words)}
    return _state("direct", _IS_SIDE, truth, rng, **words)


def _state_some_side(view: View, rng: random.Random) -> Question | None:
    if len(view.objects) < 2 or (found := some_directed(view, rng)) is None:
        return None
    first, second, side, truth = found
    return _state("some", _SOME_SIDE, truth, rng, **some_words(first, second, side, rng))


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


_STATEMENTS: dict[Builder, float] = {
    _state_count: 4.0,
    _state_presence: 1.2,
    _state_side: 2.5,
    _state_some_side: 1.5,
    _state_attribute: 1.5,
    _state_all: 0.8,
    _state_compared: 0.8,
}


def statement(view: View, rng: random.Random) -> Question | None:
    return first_of(_STATEMENTS, view, rng)
