"""BLIP-2."""

from collections.abc import Callable
from functools import partial

from ..training.recipe import Recipe, Stage
from ..zoo.families import ROWS
from .published import CAPTIONS, cosine, square


def blip_2(size: str) -> Recipe:
    """BLIP-2's second stage with OPT (arXiv:2301.12597, section 3.4); the first has objectives that are not here."""
    row = ROWS[f"blip2-opt-{size}"]
    generate = Stage(
        name="generate",
        learn={"fusion.*": 1e-4},
        data={"pairs_129m": 1.0},
        batch=120,
        accumulate=16,
        weight_decay=0.05,
        **cosine(80_000, 2000, floor=0.5),
    )
    return Recipe(row.name, row.model, square(224), {"pairs_129m": CAPTIONS}, (generate,))


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"blip2-opt-{size}": partial(blip_2, size) for size in ("2.7b", "6.7b")},
}
