"""What a question about a scene is, and how its words are put together."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .scene_view import View
from .scenes import Xyxy
from .words import sentence

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


def ask(kind: str, form: str, templates: Sequence[str], answer: str, rng: random.Random, **words: str) -> Question:
    """A question in one of the wordings, `words` put into its braces."""
    return Question(kind, sentence(rng.choice(templates).format(**words)), answer, meta={"form": form})


def yes(truth: bool) -> str:
    """The answer word of a yes/no question."""
    return "yes" if truth else "no"


def first_of(forms: Mapping[Builder, float], view: View, rng: random.Random) -> Question | None:
    """The first of the forms, in a weighted random order, that this scene affords."""
    left = dict(forms)
    while left:
        form = rng.choices(list(left), list(left.values()))[0]
        if (question := form(view, rng)) is not None:
            return question
        del left[form]
    return None
