"""Noun phrases that pick out objects of a scene: "small striped red circle", "blue things"."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .words import article, number, plural, series

GENERIC = ("thing", "object", "shape", "item")  # nouns for an object whose shape is not said


class Described(Protocol):
    """What a phrase looks at."""

    @property
    def size(self) -> str: ...
    @property
    def texture(self) -> str: ...
    @property
    def color(self) -> str: ...
    @property
    def shape(self) -> str: ...


@dataclass(frozen=True)
class Phrase:
    """A description by any of the four attributes; an empty one says nothing about it."""

    color: str = ""
    shape: str = ""
    size: str = ""
    texture: str = ""

    @classmethod
    def of(cls, thing: Described, attributes: Iterable[str]) -> "Phrase":
        """The phrase that says these attributes of `thing`."""
        return cls(**{name: getattr(thing, name) for name in attributes})

    def matches(self, thing: Described) -> bool:
        """Whether everything said is true of `thing`."""
        return (
            self.color in ("", thing.color)
            and self.shape in ("", thing.shape)
            and self.size in ("", thing.size)
            and self.texture in ("", thing.texture)
        )

    def singular(self, generic: str = "object") -> str:
        """As in "small red circle"; `generic` stands where no shape is said."""
        return " ".join(word for word in (self.size, self.texture, self.color, self.shape or generic) if word)

    def plural(self, generic: str = "object") -> str:
        """As in "small red circles"."""
        return plural(self.singular(generic))

    def counted(self, count: int, generic: str = "object") -> str:
        """As in "a red circle" or "three red circles"."""
        return article(self.singular(generic)) if count == 1 else f"{number(count)} {self.plural(generic)}"


def describe(things: Sequence[Described], attributes: Sequence[str], generic: str = "object") -> str:
    """Every one of `things`, alike ones counted together, in the order of their first mention."""
    counts = Counter(Phrase.of(thing, attributes) for thing in things)
    return series([phrase.counted(count, generic) for phrase, count in counts.items()])


def caption(things: Sequence[Described], textured: bool, rng: random.Random) -> str:
    """One exact caption of all `things`, in one of several wordings; `textured` allows textures to be said."""
    detail = ("size", "texture", "color", "shape") if textured else ("size", "color", "shape")
    attributes = rng.choice((("color", "shape"), ("color", "shape"), detail, ("shape",), ("color",)))
    order = list(things)
    rng.shuffle(order)
    listed = describe(order, attributes, rng.choice(GENERIC))
    total = Phrase().counted(len(order), rng.choice(GENERIC))
    template = rng.choice(
        (
            "{listed}",
            "{listed}",
            "a picture of {listed}",
            "an image with {listed}",
            "a drawing of {listed}",
            "there {verb} {listed}",
            "{total}: {listed}",
            "a picture with {total}: {listed}",
            "the picture shows {listed}",
        )
    )
    verb = "is" if listed.split()[0] in ("a", "an") else "are"
    return template.format(listed=listed, total=total, verb=verb)
