"""What can be said of a scene: how many match a phrase, who can be named alone, who is on which side of whom."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product

from .scene_phrases import GENERIC, Phrase
from .scenes import Object, Scene


@dataclass(frozen=True)
class Direction:
    """A side: the axis it runs along, its sign there (y grows downwards), its opposite, and the words for it."""

    axis: str
    sign: int
    opposite: str
    words: tuple[str, ...]


DIRECTIONS = {
    "left": Direction("x", -1, "right", ("to the left of", "to the left of", "left of", "on the left of")),
    "right": Direction("x", 1, "left", ("to the right of", "to the right of", "right of", "on the right of")),
    "above": Direction("y", -1, "below", ("above", "above", "higher than", "over")),
    "below": Direction("y", 1, "above", ("below", "below", "lower than", "under")),
}
_EXTREMES = {
    "left": ("the leftmost {}", "the {} farthest to the left"),
    "right": ("the rightmost {}", "the {} farthest to the right"),
    "above": ("the topmost {}", "the highest {}"),
    "below": ("the lowest {}", "the {} nearest to the bottom"),
}
_NAMINGS = {  # how one object is told from the others, and how often
    ("color", "shape"): 5.0,
    ("shape",): 3.0,
    ("color",): 2.0,
    ("size", "color", "shape"): 1.5,
    ("size", "shape"): 1.2,
    ("size", "color"): 0.8,
    ("texture", "color", "shape"): 0.8,
    ("texture", "shape"): 0.8,
    ("texture", "color"): 0.4,
    ("size",): 0.4,
}
_MARGIN = 0.1  # of the shorter side: two centres nearer than this along an axis are not said to be side by side


@dataclass(frozen=True)
class Reference:
    """Words that name exactly one object: "the red circle", "the leftmost star"."""

    text: str
    phrase: Phrase
    target: Object


@dataclass(frozen=True)
class Compared:
    """Phrases of one kind: `unequal` the one that matches more and the one that matches fewer, `equal` two that
    match as many as each other, if there are such."""

    unequal: tuple[Phrase, Phrase]
    equal: tuple[Phrase, Phrase] | None


@dataclass(frozen=True)
class Claim:
    """That all objects of `phrase` have this value of attribute `name`, and whether it is so."""

    phrase: Phrase
    name: str
    value: str
    truth: bool


class View:
    """A scene with what questions look up again and again."""

    def __init__(self, scene: Scene) -> None:
        self.objects = scene.objects
        self.textured = scene.textured
        self.margin = _MARGIN * min(scene.size)
        self._counts: dict[Phrase, int] = {}
        self._named: dict[int, list[tuple[tuple[str, ...], Phrase]]] = {}

    def count(self, phrase: Phrase) -> int:
        """How many objects match."""
        if phrase not in self._counts:
            self._counts[phrase] = sum(map(phrase.matches, self.objects))
        return self._counts[phrase]

    def two(self, rng: random.Random) -> list[Object]:
        """Two different objects."""
        return rng.sample(self.objects, 2)

    # ----------------------------------------------------------------------------------------------------- counting

    @cached_property
    def kinds(self) -> dict[str, list[Phrase]]:
        """Phrases by the attributes they say; colour with shape includes pairs that are not there together."""
        shapes = list(dict.fromkeys(each.shape for each in self.objects))
        colors = list(dict.fromkeys(each.color for each in self.objects))
        kinds = {
            "shape": [Phrase(shape=shape) for shape in shapes],
            "color": [Phrase(color) for color in colors],
            "pair": [Phrase(color, shape) for color, shape in product(colors, shapes)],
            "size": list(dict.fromkeys(Phrase(shape=each.shape, size=each.size) for each in self.objects)),
            "big": list(dict.fromkeys(Phrase(size=each.size) for each in self.objects)),
            "all": [Phrase()],
        }
        if self.textured:
            kinds["texture"] = list(dict.fromkeys(Phrase(texture=each.texture) for each in self.objects))
        return kinds

    @cached_property
    def by_count(self) -> dict[int, list[Phrase]]:
        """Phrases by how many objects match them."""
        found: dict[int, list[Phrase]] = {}
        for phrases in self.kinds.values():
            for phrase in phrases:
                found.setdefault(self.count(phrase), []).append(phrase)
        return found

    def compared(self, rng: random.Random, equal: bool = False) -> Compared | None:
        """Two phrases of one kind that match differently many, and two alike (required with `equal`)."""
        kinds = ["shape", "color", "pair"]
        rng.shuffle(kinds)
        for kind in kinds:
            phrases = self.kinds[kind][:]
            rng.shuffle(phrases)
            present = [phrase for phrase in phrases if self.count(phrase)]
            pool = phrases if rng.random() < 0.25 else present
            unequal = self._unequal(pool)
            same = next(((a, b) for a, b in pairwise(present) if self.count(a) == self.count(b)), None)
            if unequal and (same or not equal):
                return Compared(unequal, same)
        return None

    def _unequal(self, phrases: Sequence[Phrase]) -> tuple[Phrase, Phrase] | None:
        for first, second in pairwise(phrases):
            if self.count(first) != self.count(second):
                return (first, second) if self.count(first) > self.count(second) else (second, first)
        return None

    def uniformity(self, rng: random.Random) -> Claim | None:
        """A claim about all objects, or about groups of which one is all alike and one is not, by a fair coin."""
        if len(self.objects) < 2:
            return None
        if rng.random() < 0.5:
            return self._about_all(rng)
        by, name = rng.choice((("shape", "color"), ("color", "size"), ("shape", "size")))
        alike: list[tuple[Phrase, str]] = []
        mixed: list[tuple[Phrase, str]] = []
        for phrase in self.kinds[by]:
            values = [getattr(each, name) for each in self.objects if phrase.matches(each)]
            if len(values) > 1:
                (alike if len(set(values)) == 1 else mixed).append((phrase, rng.choice(values)))
        if not (alike and mixed):
            return None
        truth = rng.random() < 0.5
        phrase, value = rng.choice(alike if truth else mixed)
        return Claim(phrase, name, value, truth)

    def _about_all(self, rng: random.Random) -> Claim | None:
        """Most scenes are mixed: a false claim is made of as many of them as there are uniform ones."""
        name = rng.choice(("color", "shape", "size"))
        values = [getattr(each, name) for each in self.objects]
        truth = len(set(values)) == 1
        if not truth and rng.random() > (0.5 if name == "size" else 0.15):
            return None
        return Claim(Phrase(), name, rng.choice(values), truth)

    # ------------------------------------------------------------------------------------------------------- naming

    def reference(self, thing: Object, rng: random.Random, without: str = "") -> Reference | None:
        """Words that fit `thing` alone, none of them about the attribute `without`."""
        if len(self.objects) == 1 and rng.random() < 0.3:
            return Reference(f"the {rng.choice(GENERIC)}", Phrase(), thing)
        fitting = {named: phrase for named, phrase in self._names(thing) if without not in named}
        if not fitting:
            return None
        chosen = rng.choices(list(fitting), [_NAMINGS[named] for named in fitting])[0]
        phrase = fitting[chosen]
        return Reference(f"the {phrase.singular(rng.choice(GENERIC))}", phrase, thing)

    def _names(self, thing: Object) -> list[tuple[tuple[str, ...], Phrase]]:
        """The attributes that tell `thing` from all others, with the phrases that say them."""
        known = self._named.get(id(thing))
        if known is None:
            allowed = [named for named in _NAMINGS if self.textured or "texture" not in named]
            phrases = [(named, Phrase.of(thing, named)) for named in allowed]
            known = self._named[id(thing)] = [each for each in phrases if self.count(each[1]) == 1]
        return known

    def any_reference(self, rng: random.Random, without: str = "") -> Reference | None:
        """Words for some object, by its attributes or, now and then or in need, as the outermost on one side."""
        if len(self.objects) > 1 and rng.random() < 0.15 and (found := self.outermost(rng, without)) is not None:
            return found
        things = list(self.objects)
        rng.shuffle(things)
        for thing in things:
            if (found := self.reference(thing, rng, without)) is not None:
                return found
        return self.outermost(rng, without)

    def references(self, rng: random.Random, count: int, without: str = "") -> list[Reference] | None:
        """Words for `count` different objects in random order, or None."""
        things = list(self.objects)
        rng.shuffle(things)
        found: list[Reference] = []
        for thing in things:
            if len(found) < count and (reference := self.reference(thing, rng, without)) is not None:
                found.append(reference)
        return found if len(found) == count else None

    def outermost(self, rng: random.Random, without: str = "") -> Reference | None:
        """The outermost of all, or of those of one shape or colour, on a random side, if it stands out."""
        phrase = Phrase()
        if rng.random() < 0.5:
            by = rng.choice([name for name in ("shape", "color") if name != without])
            phrase = Phrase.of(rng.choice(self.objects), (by,))
        things = [each for each in self.objects if phrase.matches(each)]
        if len(things) < 2:
            return None
        side = rng.choice(tuple(DIRECTIONS))
        things.sort(key=lambda each: -self._along(side, each))
        if self._along(side, things[0]) - self._along(side, things[1]) < self.margin / 2:
            return None
        if any(_edge(side, each) > _edge(side, things[0]) for each in things[1:]):
            return None
        text = rng.choice(_EXTREMES[side]).format(phrase.singular(rng.choice(GENERIC)))
        return Reference(text, phrase, things[0])

    # ------------------------------------------------------------------------------------------------------- places

    def _along(self, side: str, thing: Object) -> float:
        direction = DIRECTIONS[side]
        return direction.sign * thing.center[direction.axis == "y"]

    def sides(self, first: Object, second: Object) -> list[str]:
        """The sides of `second` on which `first` clearly is."""
        return [side for side in DIRECTIONS if self._along(side, first) - self._along(side, second) >= self.margin]

    def sides_of_kinds(self, first: Phrase, second: Phrase) -> list[str]:
        """Sides on which some of the first clearly are of some of the second, and none on the opposite side."""
        firsts = [each for each in self.objects if first.matches(each)]
        seconds = [each for each in self.objects if second.matches(each)]
        found = []
        for side in DIRECTIONS:
            leads = [self._along(side, a) - self._along(side, b) for a in firsts for b in seconds if a is not b]
            if leads and max(leads) >= self.margin and min(leads) >= 0:
                found.append(side)
        return found

    def only_one(self, side: str, thing: Object) -> Object | None:
        """The one object clearly on that side of `thing`, if no other is there even slightly."""
        leads = [
            (self._along(side, each) - self._along(side, thing), each) for each in self.objects if each is not thing
        ]
        ahead = [(lead, each) for lead, each in leads if lead > 0]
        return ahead[0][1] if len(ahead) == 1 and ahead[0][0] >= self.margin else None

    def nearest(self, thing: Object) -> Object | None:
        """The nearest object, if clearly: any other at least a quarter farther away."""
        others = sorted((each for each in self.objects if each is not thing), key=lambda each: _apart(each, thing))
        if not others or any(not self.closer(thing, others[0], each) for each in others[1:]):
            return None
        return others[0]

    def closer(self, base: Object, first: Object, second: Object) -> bool | None:
        """Whether `first` is closer to `base` than `second`; None when it is a close call or the gap between the
        boxes says otherwise than the distance of the centres."""
        one, other = _apart(base, first), _apart(base, second)
        near, far = (first, second) if one < other else (second, first)
        if max(one, other) < 1.25 * min(one, other) or _gap(base, near) > _gap(base, far):
            return None
        return one < other

    def between(self, middle: Object, end: Object, other: Object) -> bool:
        """Whether `middle` is clearly between the two: near their line, in its inner part."""
        share, off = _projected(middle, end, other)
        return 0.2 <= share <= 0.8 and off <= 0.2

    def only_between(self, end: Object, other: Object) -> Object | None:
        """The one object clearly between two, if no other is even roughly."""
        found = None
        for each in self.objects:
            if each is end or each is other:
                continue
            share, off = _projected(each, end, other)
            if 0 <= share <= 1 and off <= 0.45:
                if found is not None or not self.between(each, end, other):
                    return None
                found = each
        return found


def _apart(first: Object, second: Object) -> float:
    return math.dist(first.center, second.center)


def _gap(first: Object, second: Object) -> float:
    """The distance between two boxes."""
    a, b = first.box, second.box
    return math.hypot(max(0, a[0] - b[2], b[0] - a[2]), max(0, a[1] - b[3], b[1] - a[3]))


def _edge(side: str, thing: Object) -> float:
    """How far the box reaches towards a side."""
    direction = DIRECTIONS[side]
    low = 0 if direction.axis == "x" else 1
    return max(direction.sign * thing.box[low], direction.sign * thing.box[low + 2])


def _projected(middle: Object, end: Object, other: Object) -> tuple[float, float]:
    """Where along the line from `end` to `other` a centre lies (0..1), and how far off it, in lengths of the line."""
    dx, dy = other.center[0] - end.center[0], other.center[1] - end.center[1]
    x, y = middle.center[0] - end.center[0], middle.center[1] - end.center[1]
    length = dx * dx + dy * dy
    return (x * dx + y * dy) / length, abs(x * dy - y * dx) / length
