"""Shikra (arXiv:2306.15195): CLIP, one linear layer, LLaMA; pictures padded in white, places as decimals among words.

Its files are the original LLaVA's with another model type: the picture tower lies in a folder of its own. They are
published as differences to LLaMA's, which its `apply_delta` adds.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..core.errors import InputError
from ..core.sequence import Conversation, Image, Message, Part, Text, Video
from ..data.batch import Batch
from ..data.images import PadSquare
from ..data.processor import ImagePipeline, tagged
from ..data.template import Segment, vicuna_template
from ..model import VLM
from .configs import Json
from .family import CLIP, Family, Habits, Row, Stages, llama, scaling
from .inputs import checked, cut, filled
from .llava import original_config, original_keys, original_tensors

PATCH, START, END = "<im_patch>", "<im_start>", "<im_end>"  # added to LLaMA's vocabulary in this order, the last three
WHITE = (255, 255, 255)


def inputs(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    images: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Batch:
    """Ids in which a picture stands between `<im_start>` and `<im_end>`, and pictures [n, 3, height, width]."""
    ids = checked(input_ids, attention_mask=attention_mask)
    patch = int(c["vocab_size"]) - 3
    starts, slots = ids == patch + 1, ids == patch
    if bool((slots & ~(slots | starts).roll(1, 1)).any()):
        raise InputError("<im_patch> in input_ids that neither <im_start> nor <im_patch> comes before")
    patches = None if images is None else cut(model, images)
    if patches is not None and int(starts.sum()) != len(patches.grids):
        raise InputError(f"{int(starts.sum())} <im_start> in input_ids, expected one for each of {len(patches.grids)}")
    return filled(model, ids, slots, patches, attention_mask, told="<im_patch> in input_ids")


_VICUNA = vicuna_template(newline=False)


def template(conversation: Conversation) -> list[Segment]:
    """Vicuna's, a space between a picture and the words after it."""
    return _VICUNA(tuple(Message(message.role, spaced(message.parts)) for message in conversation))


def spaced(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Parts of a message with a space after every picture, and after every frame of a film."""
    single = [each for part in parts for each in (part.frames if isinstance(part, Video) else (part,))]
    return tuple(each for part in single for each in ((part, Text(" ")) if isinstance(part, Image) else (part,)))


def _padded(c: Json, side: int) -> ImagePipeline:
    return PadSquare(side, scaling(c, CLIP), fill=WHITE)


HABITS = Habits(template, PATCH, "shikra", pixels=_padded, expand=tagged(START, END))
FAMILIES = {
    "shikra": Family(
        lambda c, f: VLM(original_config(c, f)), original_keys, original_tensors, inputs=inputs, habits=HABITS
    )
}

# arXiv:2306.15195 section 5.2: both stages train all but the encoder, on ever more of the data
STAGES: Stages = {"align": ("fusion.*", "decoder.*"), "instruct": ("fusion.*", "decoder.*")}


def _row(size: str) -> Row:
    v1 = {"vocab_size": 32_003, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    tower = {"mm_vision_tower": "openai/clip-vit-large-patch14", "mm_vision_select_layer": -2}
    return Row(
        name=f"shikra-{size}",
        family="Shikra",
        encoder="CLIP ViT-L/14 224",
        fusion="linear",
        llm=f"Vicuna {size.upper()} v1",
        licence="LLaMA, CC-BY-NC 4.0",
        source=f"shikras/shikra-{size}-delta-v1, added to LLaMA {size.upper()}",
        read=lambda c: original_config(c, Path()),
        config=llama(size, **v1, **tower),
        stages=STAGES,
        proof="logits and greedy tokens equal golden values of the published code on random weights",
    )


ROWS = (_row("7b"),)
