"""BLIP-2."""

from collections.abc import Callable
from functools import partial

from ..training.recipe import Parts, Recipe, Stage
from ..zoo.families import ROWS
from .published import CAPTIONS, cosine, published


def blip_2(size: str) -> Recipe:
    """BLIP-2's second stage with OPT (arXiv:2301.12597, section 3.4); the first has objectives that are not here.

    A Q-Former from a first stage may be given as start.fusion. EVA-CLIP g was published as a pickle; the folder of any
    BLIP-2 has it as well.
    """
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
    start = Parts("Salesforce/blip2-opt-2.7b", decoder=f"facebook/opt-{size}")
    return published(row, {"pairs_129m": CAPTIONS}, (generate,), start=start, added_tokens=("<image>",))


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"blip2-opt-{size}": partial(blip_2, size) for size in ("2.7b", "6.7b")},
}
