"""LLaVA-RLHF."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..data.images import PadSquare
from ..training.adapters import Lora
from ..training.recipe import Parts, Recipe, Source, Stage
from ..training.settings import PPOConfig, RewardConfig
from ..training.sources import FilesSource
from ..zoo.families import ROWS
from .published import cosine, files, published, seeing

ASKS = (
    "How good is this answer? A good one is true of the picture, helps, reads naturally and is no longer than it has "
    "to be. What is known of the picture: {}"
)
# what else an answer is paid for than the reward model's opinion
SHAPING = {"text": 2.0, "unfinished": -8.0, "length": -10.0}


def llava_rlhf(size: str) -> Recipe:
    """LLaVA-RLHF (arXiv:2309.14525; SFT/scripts and RLHF/scripts of llava-rlhf/LLaVA-RLHF).

    The 13B sees 336 pixels. The 7B sees 224, and the 13B's reward model judges it, from that recipe's run. Here a step
    of `ppo` is 256 answers that are learned from twice, there 512 in two halves; a value head on the policy takes the
    place of a value model that began as the reward model; the adapters of `init` are merged and new ones learn;
    `center` weighs squares of the sum of a pair's rewards, there the size of the sums' mean; and being right is the
    same words as the truth, where theirs knew choices and noes.
    """
    side = 336 if size == "13b" else 224
    row = ROWS[f"llava-1.5-{size}"]
    model = seeing(replace(row.model, fusion=replace(row.model.fusion, layers=1)), side)
    stage = partial(Stage, betas=(0.9, 0.999), weight_decay=0.0)
    lora = partial(Lora, 64, alpha=16)
    align = stage(
        name="align",
        learn={"fusion.*": 2e-3},
        data={"lcs_558k": 1.0},
        batch=16,
        accumulate=8,
        template="llava-plain",
        **cosine(4361, 131),
    )
    instruct = stage(  # three epochs of 212 thousand
        name="instruct",
        learn={"fusion.*": 2e-5, "decoder.*": 2e-5},
        data={"mix_212k": 1.0},
        batch=16,
        accumulate=8,
        **cosine(4969, 149),
    )
    reward = stage(  # stopped early, after 200 steps of an epoch of 297
        name="reward",
        learn={"decoder.blocks.*": lora(rate=2e-5)},
        data={"preferences_10k": 1.0},
        objective=RewardConfig(center=1e-3, asks=ASKS),
        steps=200,
        batch=4,
        accumulate=8,
        warmup=9,
        decay=0.0,
    )
    init = stage(
        name="init",
        after="instruct",
        learn={"decoder.blocks.*": lora(rate=1e-4)},
        data={"prompts_15k": 1.0},
        batch=8,
        accumulate=16,
        **cosine(113, 4),
    )
    judge = "reward" if size == "13b" else "runs/llava-rlhf-13b"
    ppo = stage(  # four epochs of 72 thousand prompts
        name="ppo",
        learn={"decoder.blocks.*": lora(rate=3e-5)},
        data={"prompts_72k": 1.0},
        objective=PPOConfig(
            rewards={judge: 1.0, **SHAPING},
            kl=0.1,
            one_sided=True,
            scale=10.0,
            trace=1.0,
            updates=2,
            max_new_tokens=896,
        ),
        batch=16,
        accumulate=16,
        **cosine(1125, 5),
    )
    sources: dict[str, Source] = {"lcs_558k": files("llava", 24), "mix_212k": files("llava")}
    if size == "13b":
        sources["preferences_10k"] = FilesSource(kind="preferences", format="llava-pairs", text=512)
    sources |= {"prompts_15k": files("llava"), "prompts_72k": files("llava", 512)}
    stages = (align, instruct, reward, init, ppo) if size == "13b" else (align, instruct, init, ppo)
    clip = "openai/clip-vit-large-patch14-336" if side == 336 else "openai/clip-vit-large-patch14"
    return published(
        row,
        sources,
        stages,
        model=model,
        name=f"llava-rlhf-{size}",
        pixels=PadSquare(side),
        template="llava-v1",
        max_length=2048,
        start=Parts(clip, decoder=f"lmsys/vicuna-{size}-v1.5"),
        added_tokens=("<image>", "<pad>"),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"llava-rlhf-{size}": partial(llava_rlhf, size) for size in ("7b", "13b")},
}
