"""PaliGemma."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..training.recipe import Parts, Recipe, Source, Stage
from ..zoo.families import ROWS
from .published import constant, cosine, files, published

TOKENS = (*(f"<loc{i:04d}>" for i in range(1024)), *(f"<seg{i:03d}>" for i in range(128)), "<image>")
PARTS = Parts("google/siglip-so400m-patch14-224", decoder="google/gemma-2b")


def pretraining(side: int) -> Recipe:
    """PaliGemma's pretraining (arXiv:2407.07726, section 3.2): everything learns, the loss is that of the suffix.

    Its first stage sees 224 pixels for a billion examples, with 128 tokens of text; its second goes on at 448 for 50
    million and at 896 for 10 million more, with 512. Each begins from the one before, a recipe of its own here. The
    rate is told in arXiv:2412.03555, section 3. Not told are the sizes of batches, here 8192 and 4096, and how many
    steps rates rise over, here 1,000: but for the encoder's, which rises more slowly, as long as the fusion gives it
    gradients of no use: here 10,000. Then rates fall with the root of the steps, at the pace that is usual in
    google-research/big_vision. There the linear layer of the fusion began from zero.
    """
    examples, batch, text, before = {
        224: (1_000_000_000, 32, 128, PARTS),
        448: (50_000_000, 16, 512, "runs/paligemma-3b-pt-224/model"),
        896: (10_000_000, 4, 512, "runs/paligemma-3b-pt-448/model"),
    }[side]
    whole = 8192 if side == 224 else 4096
    slow = {"warmups": {"encoder.*": 10_000}} if side == 224 else {}
    stage = Stage(
        name="pretrain" if side == 224 else "resolution",
        learn={"*": 2e-5, "encoder.*": 2e-5},
        data={"webli_and_tasks": 1.0},
        batch=batch,
        accumulate=whole // batch,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        schedule="rsqrt",
        **constant(-(-examples // whole), 1000),
        **slow,
    )
    length = (side // 14) ** 2 + text
    return _paligemma(side, {"webli_and_tasks": files("openai", text // 4)}, stage, length, before)


def vqav2(side: int) -> Recipe:
    """PaliGemma's third stage for one task, VQAv2 (transfers/vqav2.py of google-research/big_vision).

    Ten epochs of the 658,111 questions of train and validation, each after "answer en". The decay that is written there
    is not multiplied by the rate; here it is, so that what is written is their ratio.
    """
    stage = Stage(
        name="transfer",
        learn={"*": 1e-5},
        data={"vqav2": 1.0},
        batch=16,
        accumulate=16,
        weight_decay=0.1 if side == 224 else 0.0,
        betas=(0.9, 0.999),
        **cosine(25_708, 1285),
    )
    sources = {"vqav2": files("vqa", 12, prompt="answer en {}")}
    length, start = (side // 14) ** 2 + 32, f"google/paligemma-3b-pt-{side}"
    return _paligemma(side, sources, stage, length, start, name=f"paligemma-3b-vqav2-{side}")


def _paligemma(
    side: int, sources: dict[str, Source], stage: Stage, length: int, start: str | Parts, **more: Any
) -> Recipe:
    row = ROWS[f"paligemma-3b-pt-{side}"]
    return published(row, sources, (stage,), max_length=length, start=start, added_tokens=TOKENS, **more)


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"paligemma-3b-pt-{side}": partial(pretraining, side) for side in (224, 448, 896)},
    **{f"paligemma-3b-vqav2-{side}": partial(vqav2, side) for side in (224, 448)},
}
