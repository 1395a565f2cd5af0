"""LLaVA-1.5."""

from collections.abc import Callable
from functools import partial

from ..data.images import PadSquare
from ..training.adapters import Lora
from ..training.recipe import Recipe, Stage
from ..zoo.families import ROWS
from .published import cosine, files


def llava_15(size: str, lora: bool = False) -> Recipe:
    """LLaVA-1.5 (arXiv:2310.03744; scripts/v1_5 of haotian-liu/LLaVA, where the second stage has LoRA as well)."""
    row = ROWS[f"llava-1.5-{size}"]
    stage = partial(Stage, betas=(0.9, 0.999), weight_decay=0.0, accumulate=8)
    decoder = Lora(128, alpha=256, rate=2e-4, dropout=0.05) if lora else 2e-5
    stages = (  # an epoch each of 558,128 and 665,298 samples, 3% of it warm-up
        stage(name="align", learn={"fusion.*": 1e-3}, data={"lcs_558k": 1.0}, batch=32, **cosine(2181, 66)),
        stage(
            name="instruct",
            learn={"fusion.*": 2e-5, "decoder.*": decoder},
            data={"mix_665k": 1.0},
            batch=16,
            **cosine(5198, 156),
        ),
    )
    sources = {"lcs_558k": files("llava", 24), "mix_665k": files("llava")}
    name = f"{row.name}-lora" if lora else row.name
    return Recipe(name, row.model, PadSquare(336), sources, stages, "llava-v1", "decimals", max_length=2048)


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"llava-1.5-{size}": partial(llava_15, size) for size in ("7b", "13b")},
    **{f"llava-1.5-{size}-lora": partial(llava_15, size, lora=True) for size in ("7b", "13b")},
}
