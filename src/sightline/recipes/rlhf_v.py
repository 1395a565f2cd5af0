"""RLHF-V."""

from collections.abc import Callable
from functools import partial

from ..data.images import PadSquare
from ..training.recipe import Recipe, Source, Stage
from ..training.settings import DenseDPOConfig
from ..training.sources import FilesSource
from ..zoo.families import ROWS
from .published import cosine, published


def rlhf_v(released: bool = False) -> Recipe:
    """RLHF-V's dense DPO (arXiv:2312.00849) on the 13B of LLaVA-1.5; its own model was Muffin, which is not here.

    As the paper tells it (1,400 corrections seven times, weight 5), or as its code was released
    (script/train/run_RLHFV.sh of thunlp/Muffin: later data, weight 1.1, answers not divided by their weights).
    """
    row = ROWS["llava-1.5-13b"]
    stage = partial(
        Stage, "prefer", {"*": 5e-7}, {"rlhf_v": 1.0}, betas=(0.9, 0.999), weight_decay=0.0, batch=1, recompute=True
    )
    if released:
        prefer = stage(objective=DenseDPOConfig(beta=0.1, gamma=1.1, average=False), accumulate=8, **cosine(2160, 65))
    else:
        prefer = stage(objective=DenseDPOConfig(beta=0.5, gamma=5.0), accumulate=32, **cosine(307, 9))
    sources: dict[str, Source] = {"rlhf_v": FilesSource(kind="preferences", format="rlhf-v", text=256)}
    name = "rlhf-v-13b-released" if released else "rlhf-v-13b"
    return published(
        row,
        sources,
        (prefer,),
        name=name,
        pixels=PadSquare(336),
        template="llava-v1",
        max_length=2048,
        start="llava-hf/llava-1.5-13b-hf",
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "rlhf-v-13b": rlhf_v,
    "rlhf-v-13b-released": partial(rlhf_v, released=True),
}
