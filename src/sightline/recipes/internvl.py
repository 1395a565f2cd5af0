"""InternVL-1.5."""

from collections.abc import Callable
from functools import partial

from ..training.recipe import Parts, Recipe, Stage
from ..zoo.families import ROWS
from .published import cosine, files, published

# <IMG_CONTEXT> fills a picture's places; the others stand around pictures, phrases and places
TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")


def internvl_15() -> Recipe:
    """InternVL-1.5 (arXiv:2404.16821; internvl_chat/shell/internvl1.5 of OpenGVLab/InternVL).

    Each stage was an epoch. How many samples the first had is not told, nor are its steps, which are a guess here: set
    stages.0.steps. The second had 5.1 million (arXiv:2412.05271, which compares it with its own). Until there are
    files a plan takes pictures for 640 x 480, which are cut into 12 tiles, with the whole beside them.
    """
    stage = partial(Stage, batch=4, weight_decay=0.05, betas=(0.9, 0.999), recompute=True)
    pretrain = stage(
        name="pretrain",
        learn={"encoder.*": 1e-5, "fusion.*": 1e-5},
        data={"pairs_and_documents": 1.0},
        accumulate=512,
        drop_path=0.2,
        **cosine(10_000, 100),
    )
    instruct = stage(
        name="instruct",
        learn={"*": 2e-5},
        data={"mix_5m": 1.0},
        accumulate=256,
        drop_path=0.4,
        group=16,
        **cosine(4981, 150),
    )
    return published(
        ROWS["internvl-chat-v1-5"],
        {"pairs_and_documents": files("openai", 64), "mix_5m": files("openai")},
        (pretrain, instruct),
        max_length=4096,
        start=Parts("OpenGVLab/InternViT-6B-448px-V1-5", decoder="internlm/internlm2-chat-20b"),
        added_tokens=TOKENS,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"internvl-chat-v1-5": internvl_15}
