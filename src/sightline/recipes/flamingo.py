"""Flamingo, as OpenFlamingo trained it."""

from collections.abc import Callable
from functools import partial

from ..training.recipe import Parts, Recipe, Stage
from ..zoo.families import ROWS
from .published import CAPTIONS, constant, files, published

LANGUAGE = {
    "3b": "anas-awadalla/mpt-1b-redpajama-200b",
    "4b": "togethercomputer/RedPajama-INCITE-Base-3B-v1",
    "9b": "anas-awadalla/mpt-7b",
}


def open_flamingo(size: str) -> Recipe:
    """OpenFlamingo (arXiv:2308.01390; open_flamingo/train of mlfoundations/open_flamingo).

    It saw 60 million documents of Multimodal C4 and 120 million pairs of LAION-2B; a device had 32 and 64 of them a
    step. How many devices there were is told for the largest model, 64, and taken for all. The script of the smallest
    warmed up for 1,875 steps, which is taken for all too. The loss is the mean over documents and a fifth of that over
    pairs; the resampler does not decay, and of the table of words two new rows learn.

    Flamingo (arXiv:2204.14198) had an NFNet and Chinchilla, whose weights were never published, and the same rate of
    1e-4, constant after 5,000 steps of warm-up; its 500,000 steps mixed M3W, ALIGN, LTIP and VTP with weights of 1,
    0.2, 0.2 and 0.03, whose gradients were added up. There, too, the resampler did not decay, all else by 0.1.
    """
    stage = Stage(
        name="pretrain",
        learn={"fusion.*": 1e-4, "decoder.blocks.*.cross_*": 1e-4, "decoder.embedding.*": 1e-4},
        data={"mmc4": 1.0, "laion_2b": 2.0},
        loss_weights={"mmc4": 1.0, "laion_2b": 0.2},
        weight_decays={"fusion.*": 0.0},
        trainable_tokens=("<image>", "<|endofchunk|>"),
        batch=96,
        accumulate=64,
        weight_decay=0.1,
        betas=(0.9, 0.999),
        **constant(29_297, 1875),
    )
    return published(
        ROWS[f"openflamingo-{size}"],
        {"mmc4": files("openai", 256), "laion_2b": CAPTIONS},
        (stage,),
        max_length=2048,
        start=Parts("openai/clip-vit-large-patch14", decoder=LANGUAGE[size]),
        added_tokens=("<|endofchunk|>", "<image>", "<PAD>"),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {f"openflamingo-{size}": partial(open_flamingo, size) for size in LANGUAGE}
