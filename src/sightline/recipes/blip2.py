"""BLIP-2."""

from collections.abc import Callable
from functools import partial

from ..training.recipe import Parts, Recipe, Source, Stage
from ..training.settings import RepresentationConfig
from ..zoo.families import ROWS
from .published import CAPTIONS, PICTURES, cosine, published


def blip_2(size: str) -> Recipe:
    """BLIP-2 with OPT (arXiv:2301.12597, section 3.4): a Q-Former learns by itself, then for the language model.

    The lowest rate of the first stage is that of its code. Its contrast is among all 1,680 pictures of a step, which
    16 devices shared; fewer can learn it as they did with stages.0.batch=105 and
    stages.0.accumulate=16, among 105. Its Q-Former, there a
    BERT with BERT's words, is drawn and reads OPT's; dropout is BERT's, but for that of its attention.
    The second stage may begin from another's Q-Former, given as start.fusion. EVA-CLIP g was published as a pickle; the
    folder of any BLIP-2 has it as well.
    """
    row = ROWS[f"blip2-opt-{size}"]
    represent = Stage(
        name="represent",
        learn=dict.fromkeys(row.stages["represent"], 1e-4),
        data={"pictures_129m": 1.0},
        objective=RepresentationConfig(),
        batch=1680,
        weight_decay=0.05,
        dropout=0.1,
        **cosine(250_000, 2000, floor=0.1),
    )
    generate = Stage(
        name="generate",
        learn={"fusion.*": 1e-4},
        data={"pairs_129m": 1.0},
        batch=120,
        accumulate=16,
        weight_decay=0.05,
        dropout=0.1,
        **cosine(80_000, 2000, floor=0.5),
    )
    sources: dict[str, Source] = {"pictures_129m": PICTURES, "pairs_129m": CAPTIONS}
    start = Parts("Salesforce/blip2-opt-2.7b", decoder=f"facebook/opt-{size}")
    return published(row, sources, (represent, generate), start=start, added_tokens=("<image>",))


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"blip2-opt-{size}": partial(blip_2, size) for size in ("2.7b", "6.7b")},
}
