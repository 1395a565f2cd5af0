"""Silkie."""

from collections.abc import Callable

from ..training.adapters import Lora
from ..training.recipe import Recipe, Source, Stage
from ..training.settings import DPOConfig
from ..training.sources import FilesSource
from ..zoo.families import ROWS
from .published import cosine, published

ADAPTED = ("attention.*", "feedforward.gate.weight", "feedforward.up.weight")  # c_attn, attn.c_proj, w2 and w1


def silkie() -> Recipe:
    """Silkie (arXiv:2312.10665; dpo_config/example.yaml of vlf-silkie/VLFeedback): Qwen-VL-Chat by DPO on VLFeedback.

    Three epochs of 380 thousand pairs less half a percent that was held out. Queries, keys and values have an adapter
    each, there one of all three.
    """
    row = ROWS["qwen-vl-chat"]
    lora = Lora(64, alpha=16, rate=1e-5, dropout=0.05)
    prefer = Stage(
        "prefer",
        learn={f"decoder.blocks.*.{part}": lora for part in ADAPTED},
        data={"vlfeedback": 1.0},
        objective=DPOConfig(beta=0.1),
        betas=(0.9, 0.98),
        weight_decay=0.05,
        batch=2,
        accumulate=128,
        recompute=True,
        **cosine(4431, 443),
    )
    sources: dict[str, Source] = {"vlfeedback": FilesSource(kind="preferences", format="vlfeedback", text=512)}
    return published(row, sources, (prefer,), name="silkie", max_length=2048, start="Qwen/Qwen-VL-Chat")


RECIPES: dict[str, Callable[[], Recipe]] = {"silkie": silkie}
