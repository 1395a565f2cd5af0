"""Questions about scenes whose answers follow from the scene, in varied wording.

Every yes/no question is one of a pair: the same words with the answer turned (another direction, another of two
things counted, colour and shape joined differently), and a fair coin decides which of the two is asked. A reader who
does not see the picture therefore gains nothing from the words.
"""

import random
from collections.abc import Sequence

from ..core.errors import ConfigError
from .scene_asking import Builder, Question
from .scene_claims import comparison, statement
from .scene_facts import attribute, count_of, existence, locate, point
from .scene_relations import relation
from .scene_view import View
from .scenes import Scene

_WEIGHTS = {
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
_BUILDERS: dict[str, Builder] = {
    "existence": existence,
    "count": count_of,
    "color": attribute("color"),
    "shape": attribute("shape"),
    "size": attribute("size"),
    "texture": attribute("texture"),
    "relation": relation,
    "comparison": comparison,
    "statement": statement,
    "locate": locate,
    "point": point,
}
KINDS = tuple(_BUILDERS)


def questions(scene: Scene, rng: random.Random, count: int, kinds: Sequence[str] | None = None) -> list[Question]:
    """`count` different questions of mixed kinds, or of `kinds` alike often; fewer where the scene affords fewer.

    Raises ConfigError for an unknown kind.
    """
    if unknown := [kind for kind in kinds or () if kind not in _WEIGHTS]:
        raise ConfigError(f"unknown kind of question {unknown[0]!r}: expected some of {', '.join(KINDS)}")
    view = View(scene)
    chosen = tuple(_WEIGHTS) if kinds is None else tuple(kinds)
    weights = [_WEIGHTS[kind] for kind in chosen] if kinds is None else None
    asked: dict[str, Question] = {}
    for _ in range(count * 12):
        if len(asked) == count:
            break
        question = _BUILDERS[rng.choices(chosen, weights)[0]](view, rng)
        if question is not None:
            asked.setdefault(question.text, question)
    return list(asked.values())
