"""Kosmos-2."""

from collections.abc import Callable
from functools import partial

from ..training.recipe import Parts, Recipe, Stage
from ..zoo.families import ROWS
from .published import files, linear, published


def kosmos_2() -> Recipe:
    """Kosmos-2 (arXiv:2306.14824, section 3; kosmos-2/train.sh of microsoft/unilm).

    A step had 419 thousand tokens: 185 of text, 215 of pairs, with places and without, 19 of documents with pictures.
    Here these are shares of samples with usual lengths, 2048 tokens of text or of a document and 128 of a pair. Of the
    encoder only the last block learned. The second stage mixed instructions into the same data for 10,000 steps; in
    which shares, and at which rate, is not in the script: both are a guess here. Dropout leaves attention itself whole.

    It went on from Kosmos-1, whose weights were never published: here CLIP alone is given, and words are those of
    Kosmos-2's own folder. A decoder may be given as start.decoder. GRIT is read as phrases with a box each, in MDETR's
    form.
    """
    learn = ("encoder.blocks.23.*", "fusion.*", "decoder.*")
    stage = partial(Stage, batch=8, accumulate=222, betas=(0.9, 0.98), weight_decay=0.01, clip=2.0, dropout=0.1)
    shares = {"text": 90.0, "grit_91m": 1680.0, "documents": 9.0}
    pretrain = stage(name="pretrain", learn=dict.fromkeys(learn, 2e-4), data=shares, **linear(60_000, 375))
    instruct = stage(
        name="instruct",
        learn=dict.fromkeys(learn, 1e-5),
        data={**shares, "llava_instruct": 90.0, "instructions": 90.0},
        **linear(10_000, 375),
    )
    sources = {
        "text": files("openai", 2048),
        "grit_91m": files("refcoco", 64, prompt="{}"),
        "documents": files("openai", 1920),
        "llava_instruct": files("llava"),
        "instructions": files("openai"),
    }
    start = Parts("openai/clip-vit-large-patch14", tokenizer="microsoft/kosmos-2-patch14-224")
    return published(ROWS["kosmos-2-patch14-224"], sources, (pretrain, instruct), max_length=2048, start=start)


RECIPES: dict[str, Callable[[], Recipe]] = {"kosmos-2-patch14-224": kosmos_2}
