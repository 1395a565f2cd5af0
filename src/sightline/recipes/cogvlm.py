"""CogVLM."""

from collections.abc import Callable
from functools import partial

from ..training.recipe import Parts, Recipe, Stage
from ..zoo.families import ROWS
from .published import CAPTIONS, cosine, files, published


def cogvlm(side: int) -> Recipe:
    """CogVLM's two stages of pretraining and its chat (arXiv:2311.03079, sections 2.2 and 2.3).

    The second half of the second saw 490 pixels, what came before 224. In the last the encoder learns as well, at a
    tenth of the rate. What the rates fall to is not told, nor how long the last one rises; here to zero, and 120 steps.
    The expert begins from the words' own weights. EVA2-CLIP E was published as a pickle; the folder of any CogVLM has
    it as well.
    """
    row = ROWS["cogvlm-grounding-generalist"]  # whose form has no words of its own
    stage = partial(Stage, batch=16, weight_decay=0.05, betas=(0.9, 0.95))
    if side == 224:
        pairs = stage(
            name="pretrain",
            learn={"fusion.*": 1e-4, "decoder.blocks.*.vision.*": 1e-4},
            data={"pairs_1500m": 1.0},
            accumulate=512,
            **cosine(120_000, 12_000),
        )
        start = Parts("THUDM/cogvlm-base-224-hf", decoder="lmsys/vicuna-7b-v1.5")
        return published(row, {"pairs_1500m": CAPTIONS}, (pairs,), side, name="cogvlm-224", start=start)
    places = stage(
        name="places",
        learn={"fusion.*": 1e-5, "decoder.blocks.*.vision.*": 1e-5},
        data={"pairs_and_places": 1.0},
        accumulate=64,
        **cosine(60_000, 1200),
    )
    instruct = stage(
        name="instruct",
        learn={"encoder.*": 1e-6, "fusion.*": 1e-5, "decoder.blocks.*.vision.*": 1e-5},
        template="cogvlm-chat",
        data={"instructions": 1.0},
        accumulate=64,
        **cosine(6000, 120),
    )
    sources = {"pairs_and_places": files("openai", 48), "instructions": files("openai")}
    start = "runs/cogvlm-224/model"
    return published(row, sources, (places, instruct), side, name="cogvlm", max_length=2048, start=start)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "cogvlm-224": partial(cogvlm, 224),
    "cogvlm": partial(cogvlm, 490),
}
