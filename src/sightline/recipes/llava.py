"""LLaVA-1.5."""

from collections.abc import Callable
from functools import partial

from ..data.images import PadSquare
from ..training.adapters import Lora
from ..training.recipe import Parts, Recipe, Stage
from ..zoo.families import ROWS
from .published import cosine, files, published


def llava_15(size: str, lora: bool = False) -> Recipe:
    """LLaVA-1.5 (arXiv:2310.03744; scripts/v1_5 of haotian-liu/LLaVA, where the second stage has LoRA as well).

    In the first stage a picture is followed by its caption and nothing else. The table of words grows as in the
    published model of transformers, with a token for pictures and one for padding.
    """
    row = ROWS[f"llava-1.5-{size}"]
    stage = partial(Stage, betas=(0.9, 0.999), weight_decay=0.0, accumulate=8)
    decoder = Lora(128, alpha=256, rate=2e-4, dropout=0.05) if lora else 2e-5
    stages = (  # an epoch each of 558,128 and 665,298 samples, 3% of it warm-up
        stage(
            name="align",
            learn={"fusion.*": 1e-3},
            data={"lcs_558k": 1.0},
            batch=32,
            template="llava-plain",
            **cosine(2181, 66),
        ),
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
    return published(
        row,
        sources,
        stages,
        name=name,
        pixels=PadSquare(336),
        template="llava-v1",
        max_length=2048,
        start=Parts("openai/clip-vit-large-patch14-336", decoder=f"lmsys/vicuna-{size}-v1.5"),
        added_tokens=("<image>", "<pad>"),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"llava-1.5-{size}": partial(llava_15, size) for size in ("7b", "13b")},
    **{f"llava-1.5-{size}-lora": partial(llava_15, size, lora=True) for size in ("7b", "13b")},
}
