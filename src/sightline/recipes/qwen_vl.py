"""Qwen-VL."""

from collections.abc import Callable
from functools import partial

from ..training.recipe import Parts, Recipe, Stage
from ..zoo.families import ROWS
from .published import CAPTIONS, cosine, files, published


def qwen_vl(side: int) -> Recipe:
    """Qwen-VL (arXiv:2308.12966): its first stage sees 224 pixels, the other two 448.

    While the encoder learns, its rate falls by 5% from each block to the one before it. The last stage is laid out as
    Qwen-VL-Chat's conversations, the others as text that goes on.
    """
    row = ROWS["qwen-vl"]
    stage = partial(Stage, weight_decay=0.05, eps=1e-6)
    pretrain = stage(
        name="pretrain",
        learn={"encoder.*": 2e-4, "fusion.*": 2e-4},
        data={"pairs_1400m": 1.0},
        batch=64,
        accumulate=480,
        layer_decay=0.95,
        **cosine(50_000, 500, floor=0.005),
    )
    tasks = stage(
        name="tasks",
        learn={"*": 5e-5},
        data={"seven_tasks": 1.0},
        batch=16,
        accumulate=256,
        layer_decay=0.95,
        **cosine(19_000, 400, floor=0.2),
    )
    instruct = stage(
        name="instruct",
        learn={"fusion.*": 1e-5, "decoder.*": 1e-5},
        template="qwen-vl-chat",
        data={"dialogues_350k": 1.0},
        batch=8,
        accumulate=16,
        **cosine(8000, 3000, floor=0.1),
    )
    if side == 224:
        start = Parts("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", decoder="Qwen/Qwen-7B")
        return published(row, {"pairs_1400m": CAPTIONS}, (pretrain,), side, name="qwen-vl-224", start=start)
    sources = {"seven_tasks": files("openai", 64), "dialogues_350k": files("openai")}
    return published(row, sources, (tasks, instruct), side, max_length=2048, start="runs/qwen-vl-224/model")


RECIPES: dict[str, Callable[[], Recipe]] = {
    "qwen-vl-224": partial(qwen_vl, 224),
    "qwen-vl": partial(qwen_vl, 448),
}
