"""Questions about scenes: every answer found again from the words of the question and the objects alone.

The reference below shares no code with the questions: it reads the English text, looks objects up by their
attributes and computes with their boxes.
"""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count, pairwise

import pytest

from sightline.core.errors import ConfigError
from sightline.worlds import (
    COLORS,
    KINDS,
    SHAPES,
    SIZES,
    TEXTURES,
    Object,
    Question,
    Scene,
    SceneConfig,
    questions,
    scene,
)
from sightline.worlds.words import NUMBERS

SCENES = 700
GENERIC = ("thing", "object", "shape", "item")
ATTRIBUTES = {"color": COLORS, "shape": SHAPES, "size": SIZES, "texture": TEXTURES}
PHRASE = re.compile(
    rf"(?P<outer>(?:leftmost|rightmost|topmost|highest|lowest) )?"
    rf"(?P<adjectives>(?:(?:{'|'.join((*SIZES, *TEXTURES, *COLORS))}) )*)"
    rf"\b(?P<noun>{'|'.join((*SHAPES, *GENERIC))})(?:s|es)?\b"
    r"(?P<far> farthest to the left| farthest to the right| nearest to the bottom)?"
)
FILLERS = re.compile(r"\b(which|what|name the|the same) (object|thing|shape)s?\b|\bthe shape of\b")


@cache
def asked() -> tuple[tuple[Scene, Question], ...]:
    """Twelve questions of all kinds on each of many scenes."""
    found = []
    for seed in range(SCENES):
        drawn = scene(seed, SceneConfig(160, 120) if seed % 5 == 0 else SceneConfig())
        found += [(drawn, question) for question in questions(drawn, random.Random(seed), 12)]
    return tuple(found)


# -------------------------------------------------------------------------------------------------- the reference


class Said:
    """The noun phrases of a text in order, each as the objects that it describes."""

    def __init__(self, drawn: Scene, text: str) -> None:
        self.objects = drawn.objects
        self.text = text.lower()
        self.matches = list(PHRASE.finditer(FILLERS.sub("", self.text)))
        self.groups = [self.described(match) for match in self.matches]

    def described(self, match: re.Match[str]) -> list[Object]:
        words = {*match["adjectives"].split(), match["noun"]} - set(GENERIC)
        group = [each for each in self.objects if words <= {each.color, each.shape, each.size, each.texture}]
        outer = (match["outer"] or match["far"] or "").split()
        if not outer:
            return group
        axis, sign = {"leftmost": (0, -1), "left": (0, -1), "rightmost": (0, 1), "right": (0, 1)}.get(
            outer[-1], (1, 1 if outer[-1] in ("lowest", "bottom") else -1)
        )
        return [max(group, key=lambda each: sign * each.center[axis])]

    def counts(self) -> list[int]:
        return [len(group) for group in self.groups]

    def single(self) -> list[Object]:
        """The one object of each phrase: a definite phrase must have exactly one."""
        assert all(len(group) == 1 for group in self.groups), self.text
        return [group[0] for group in self.groups]

    def direction(self) -> tuple[int, int]:
        """Axis and sign of the one side that is named after the first phrase."""
        rest = PHRASE.sub("#", self.text)
        (side,) = re.findall(r"\b(left|right|above|higher|over|below|lower|under)\b", rest)
        return {"left": (0, -1), "right": (0, 1)}.get(side, (1, -1 if side in ("above", "higher", "over") else 1))

    def number(self) -> int:
        words = re.findall(
            rf"\b(\d+|no|{'|'.join(NUMBERS)})\b", self.text.replace("one can see", "").replace("at least one ", "")
        )
        (word,) = words if "at least one " not in self.text or words else ["one"]
        return 0 if word == "no" else NUMBERS.index(word) if word in NUMBERS else int(word)


def lead(first: Object, second: Object, axis: int, sign: int) -> float:
    return sign * (first.center[axis] - second.center[axis])


def apart(first: Object, second: Object) -> float:
    return math.hypot(first.center[0] - second.center[0], first.center[1] - second.center[1])


def inside(middle: Object, end: Object, other: Object) -> tuple[float, float]:
    """Along and off the line from `end` to `other`, by the sides of the triangle that the three make."""
    whole, left, right = apart(end, other), apart(end, middle), apart(middle, other)
    along = (left**2 + whole**2 - right**2) / (2 * whole**2)
    return along, math.sqrt(max(0.0, (left / whole) ** 2 - along**2))


def presence(said: Said) -> bool:
    return said.counts()[-1] > 0


def direct(said: Said) -> bool:
    first, second = said.single()
    ahead = lead(first, second, *said.direction())
    assert abs(ahead) >= 8, "a close call"
    return ahead > 0


def some(said: Said) -> bool:
    firsts, seconds = said.groups
    leads = [lead(a, b, *said.direction()) for a in firsts for b in seconds if a is not b]
    assert max(leads) >= 8 or max(leads) <= 0, "a close call"
    return max(leads) > 0


def between(said: Said) -> bool:
    three = said.single()
    along, off = inside(*three)
    assert (0.2 <= along <= 0.8 and off <= 0.21) or not 0.05 <= along <= 0.95 or off > 0.6, "a close call"
    return 0.2 <= along <= 0.8


def closer(said: Said) -> bool:
    three = said.single()
    base, first, second = (three[2], three[1], three[0]) if "compared" in said.text else three
    ratio = apart(base, second) / apart(base, first)
    assert ratio > 1.2 or ratio < 1 / 1.2, "a close call"
    return ratio > 1


def compared(said: Said) -> bool:
    first, second = said.counts()
    if re.search(r"\b(fewer|less|smaller)\b", said.text):
        return first < second
    assert re.search(r"\b(more|greater)\b", said.text)
    return first > second


def larger(said: Said) -> bool:
    first, second = said.single()
    if "compared" in said.text or "smaller" in said.text:
        first, second = second, first
    one, other = (max(each.box[2] - each.box[0], each.box[3] - each.box[1]) for each in (first, second))
    return one > other


def same(name: str) -> Callable[[Said], bool]:
    return lambda said: len({getattr(each, name) for each in said.single()}) == 1


def bound(said: Said) -> bool:
    count, stated = said.counts()[-1], said.number()
    if "at least" in said.text:
        return count >= stated
    if "at most" in said.text:
        return count <= stated
    if "more than" in said.text:
        return count > stated
    return count < stated if "fewer than" in said.text else count == stated


def is_value(name: str) -> Callable[[Said], bool]:
    def check(said: Said) -> bool:
        value = said.text.rstrip(".").split()[-1]
        assert value in ATTRIBUTES[name]
        return [getattr(each, name) for each in said.groups[0]] == [value]

    return check


def all_are(name: str) -> Callable[[Said], bool]:
    def check(said: Said) -> bool:
        claimed = re.split(r"\b(?:are|is)\b", said.text.rstrip("."))[-1]
        (value,) = [value for value in ATTRIBUTES[name] if value in claimed]
        subject = said.groups[0]
        assert len(subject) > 1
        return {getattr(each, name) for each in subject} == {value}

    return check


TRUTH: dict[str, Callable[[Said], bool]] = {
    "presence": presence, "direct": direct, "some": some, "between": between, "closer": closer,
    "more": compared, "fewer": compared, "larger": larger, "equal": lambda said: len(set(said.counts())) == 1,
    "same color": same("color"), "same shape": same("shape"),
    "exact": bound, "at least": bound, "at most": bound, "more than": bound, "fewer than": bound,
    "is color": is_value("color"), "is shape": is_value("shape"), "is size": is_value("size"),
    "all color": all_are("color"), "all shape": all_are("shape"), "all size": all_are("size"),
}  # fmt: skip


def nearest(said: Said) -> str:
    (thing,) = said.single()
    others = sorted((each for each in said.objects if each is not thing), key=lambda each: apart(each, thing))
    assert len(others) == 1 or apart(others[1], thing) > 1.2 * apart(others[0], thing), "a close call"
    return f"{others[0].color} {others[0].shape}"


def neighbour(said: Said) -> str:
    (thing,) = said.single()
    (only,) = [each for each in said.objects if each is not thing and lead(each, thing, *said.direction()) > 0]
    return f"{only.color} {only.shape}"


def what_between(said: Said) -> str:
    end, other = said.single()
    places = {each: inside(each, end, other) for each in said.objects if each not in (end, other)}
    (only,) = [each for each, (along, off) in places.items() if 0 <= along <= 1 and off <= 0.4]
    return f"{only.color} {only.shape}"


def either(said: Said) -> str:
    first, second = said.single()
    if "left" in said.text.replace("leftmost", ""):
        return "left" if first.center[0] < second.center[0] else "right"
    return "above" if first.center[1] < second.center[1] else "below"


def which(said: Said) -> str:
    (first, one), (second, other) = zip((match[0] for match in said.matches), said.counts(), strict=True)
    assert one != other
    return (first if one > other else second).strip()


WORDS: dict[str, Callable[[Said], str]] = {
    "nearest": nearest, "neighbour": neighbour, "what between": what_between, "either": either, "which": which,
    "count": lambda said: str(said.counts()[0]),
}  # fmt: skip


def statement_of(text: str) -> str:
    """A statement without the prompt before it."""
    return re.sub(
        r"^(true or false|decide whether this is true or false|is this [\w ]+ true|does this [\w ]+)[:?] ",
        "",
        text.lower(),
    )


def expected(drawn: Scene, question: Question) -> str:
    said = Said(drawn, statement_of(question.text) if question.kind == "statement" else question.text)
    form = question.meta["form"]
    if form == "attribute":
        return str(getattr(said.single()[0], question.kind))
    if form in WORDS:
        return WORDS[form](said)
    truth = TRUTH[form](said)
    if question.kind == "statement" and not question.text.lower().startswith(("is this", "does this")):
        return "true" if truth else "false"
    return "yes" if truth else "no"


# ------------------------------------------------------------------------------------------------------- the tests


def test_every_answer_follows_from_the_words_and_the_objects() -> None:
    forms = Counter()
    for drawn, question in asked():
        if question.kind in ("locate", "point"):
            continue
        assert question.answer == expected(drawn, question), (question, drawn.objects)
        forms[question.kind, question.meta["form"]] += 1
    assert {form for _, form in forms} == {*TRUTH, *WORDS, "attribute"}


def test_places_are_those_of_all_that_is_sought() -> None:
    sought = Counter()
    for drawn, question in asked():
        if question.kind not in ("locate", "point"):
            continue
        (group,) = Said(drawn, question.text).groups
        if question.meta["form"] == "one":
            assert len(group) == 1
        things = sorted(group, key=lambda each: (each.box[0] + each.box[2], each.box[1] + each.box[3]))
        places = question.boxes if question.kind == "locate" else question.points
        assert not (question.points if question.kind == "locate" else question.boxes)
        truth = [each.box if question.kind == "locate" else each.center for each in things]
        assert [place for _, place in places] == truth
        for (label, _), each in zip(places, things, strict=True):
            assert set(label.split()) <= {each.color, each.shape, each.size, each.texture} and each.shape in label
        assert question.answer == (places[0][0] if places else "none")
        sought[len(places)] += 1
    assert set(sought) == set(range(7)) and sought[0] < 0.06 * sum(sought.values())


def test_questions_are_short_and_say_things_in_many_ways() -> None:
    wordings = defaultdict(set)
    for _, question in asked():
        assert re.fullmatch(r"[A-Z][A-Za-z0-9 ,:?.]*[?.]", question.text) and len(question.text) < 130
        assert re.fullmatch(r"[a-z0-9]+( [a-z]+){0,3}", question.answer), question
        wordings[question.kind].add(PHRASE.sub("#", FILLERS.sub("~", question.text.lower())))
    assert set(wordings) == set(KINDS)
    assert all(len(found) >= 5 for found in wordings.values()), {kind: len(found) for kind, found in wordings.items()}


def test_the_vocabulary_is_small_and_closed() -> None:
    words = set()
    for drawn, question in asked():
        words |= set(re.findall(r"[a-z]+|\d+", f"{question.text} {question.answer}".lower()))
        words |= set(re.findall(r"[a-z]+", drawn.caption(random.Random(drawn.seed))))
    assert {"color", "colour", *COLORS, *SHAPES, *SIZES, *TEXTURES, *map(str, range(13)), *NUMBERS[1:7]} <= words
    assert len(words) < 260


def test_questions_are_pure_and_differ_within_a_picture() -> None:
    for seed in range(40):
        drawn = scene(seed)
        first = questions(drawn, random.Random(seed), 12)
        assert first == questions(drawn, random.Random(seed), 12)
        assert len(first) == len({question.text for question in first}) == 12


@pytest.mark.parametrize(
    "config",
    [
        SceneConfig(min_objects=12, shapes=("circle",), colors=("red",), textures=("solid",)),
        SceneConfig(min_objects=12, shapes=("circle",)),
        SceneConfig(min_objects=12),
        SceneConfig(max_objects=1),
        SceneConfig(max_objects=2, colors=("red", "blue"), textures=("hollow",)),
    ],
)
def test_extreme_scenes_have_right_answers_too(config: SceneConfig) -> None:
    for seed in range(150):
        drawn = scene(seed, config)
        for kind in KINDS:
            for question in questions(drawn, random.Random(seed), 2, (kind,)):
                if kind not in ("locate", "point"):
                    assert question.answer == expected(drawn, question), (question, drawn.objects)


def crowded(seed: int) -> Scene:
    return scene(seed, SceneConfig(min_objects=12))


def test_presence_is_asked_even_where_every_shape_is_there() -> None:
    full = next(drawn for drawn in map(crowded, count()) if len({each.shape for each in drawn.objects}) == len(SHAPES))
    found = [question for seed in range(60) for question in questions(full, random.Random(seed), 3, ("existence",))]
    assert Counter(question.answer for question in found).keys() == {"yes", "no"}
    assert all(question.answer == expected(full, question) for question in found)


def test_only_the_kinds_asked_for() -> None:
    for seed in range(30):
        found = questions(scene(seed, SceneConfig(min_objects=3)), random.Random(seed), 6, ("count", "locate"))
        assert {question.kind for question in found} <= {"count", "locate"} and len(found) == 6
    assert questions(scene(0), random.Random(0), 0) == []
    with pytest.raises(ConfigError, match=r"'colour'.*color"):
        questions(scene(0), random.Random(0), 1, ("colour",))


def yes_no() -> Iterator[tuple[str, str, bool]]:
    for _, question in asked():
        if question.answer in ("yes", "no", "true", "false"):
            yield question.kind, question.text, question.answer in ("yes", "true")


def test_half_of_the_answers_are_yes() -> None:
    shares = defaultdict(list)
    for kind, _, truth in yes_no():
        shares[kind].append(truth)
    assert set(shares) == {"existence", "relation", "comparison", "statement"}
    for kind, truths in shares.items():
        spread = 3.5 * math.sqrt(0.25 / len(truths))
        assert abs(sum(truths) / len(truths) - 0.5) < spread, (kind, len(truths))


def test_counts_are_asked_for_about_alike_often() -> None:
    answers = Counter(question.answer for _, question in asked() if question.kind == "count")
    small = [answers[str(count)] for count in range(1, 7)]
    assert min(small) > 0.6 * max(small) and answers["0"] > 0 and answers["12"] > 0


def test_a_reader_who_sees_no_picture_gains_nothing() -> None:
    """Naive Bayes over the words and pairs of words of half the questions, tried on the other half."""
    rows = defaultdict(list)
    for kind, text, truth in yes_no():
        words = re.findall(r"\w+", text.lower())
        rows[kind].append(({*words, *pairwise(words)}, truth))
    for kind, known in rows.items():
        half = len(known) // 2
        seen = {
            truth: Counter(word for words, is_so in known[:half] if is_so == truth for word in words)
            for truth in (True, False)
        }
        totals = Counter(truth for _, truth in known[:half])

        def odds(words: set, seen: dict = seen, totals: Counter = totals) -> float:
            scale = (totals[False] + 2) / (totals[True] + 2)
            return sum(math.log((seen[True][word] + 1) / (seen[False][word] + 1) * scale) for word in words)

        right = sum((odds(words) > 0) == truth for words, truth in known[half:]) / (len(known) - half)
        assert right <= 0.6, (kind, right)
