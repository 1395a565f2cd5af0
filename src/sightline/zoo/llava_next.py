"""LLaVA-NeXT (LLaVA-1.6): LLaVA-1.5 that sees a picture whole and in tiles, whose tokens are laid out as its rows.

How many tiles a picture has follows from its size and the grids that `config.json` lists (liuhaotian/LLaVA-NeXT's blog
and haotian-liu/LLaVA). Files are laid out as llava-hf's, with one vector more.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.patches import Patches, Tiling
from ..core.sequence import Conversation, Image, Message, Video, images_of
from ..data.batch import Batch
from ..data.processor import ImagePipeline
from ..data.template import End, Segment, Template, Writer, chatml, turns, vicuna_template
from ..data.tiles import AnyResolution, best_grid
from ..fusion.anyres import AnyResConfig
from ..fusion.projector import ProjectorConfig
from ..model import VLM, VLMConfig
from . import llava
from .configs import Json
from .family import CLIP, Family, Habits, Row, scaling
from .inputs import checked, cut, filled, is_image
from .keymap import KeyMap, rule

Grids = tuple[tuple[int, int], ...]


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`."""
    plain = llava.config(c)
    if plain.vit.keep_prefix:
        raise ConfigError("vision_feature_select_strategy 'full', expected 'default': only patches are laid out")
    assert isinstance(plain.fusion, ProjectorConfig)
    grids_of(c, plain.image.image_size)
    return replace(plain, fusion=AnyResConfig(plain.fusion))


def grids_of(c: Json, side: int) -> Grids:
    """Rows and columns of squares of this side, from heights and widths in pixels."""
    found = c.get("image_grid_pinpoints") or [(side * rows, side * columns) for rows, columns in AnyResolution(1).grids]
    for height, width in found:
        if height % side or width % side:
            raise ConfigError(f"image_grid_pinpoints: {height}x{width} pixels, expected whole squares of {side}")
    return tuple((height // side, width // side) for height, width in found)


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names."""
    return llava.keys(cfg, "fusion.projector.") + KeyMap((rule("image_newline", "fusion.newline"),))


def inputs(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_sizes: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Batch:
    """Pictures [n, views, 3, height, width], filled up to the one with most views, and their heights and widths [n, 2].

    The views of all pictures may also come one after the other, [views, 3, height, width].
    """
    ids = checked(input_ids, attention_mask=attention_mask)
    patches = None if pixel_values is None else tiled(model, c, pixel_values, image_sizes)
    return filled(model, ids, is_image(c, ids), patches, attention_mask)


def tiled(model: VLM, c: Json, pixel_values: Tensor, image_sizes: Tensor | None) -> Patches:
    """Patches of pictures whose tilings follow from their sizes."""
    if image_sizes is None or image_sizes.dim() != 2 or image_sizes.shape[1] != 2:
        found = "none" if image_sizes is None else list(image_sizes.shape)
        raise InputError(f"image_sizes: found {found}, expected [pictures, 2], the height and width of each")
    side = model.config.image.image_size
    grids = grids_of(c, side)
    tilings = tuple(
        Tiling(*best_grid(width, height, grids, side), width, height) for height, width in image_sizes.tolist()
    )
    views = pixel_values
    if pixel_values.dim() == 5:
        if len(pixel_values) != len(tilings):
            raise InputError(f"{len(tilings)} image_sizes for {len(pixel_values)} pictures, expected one for each")
        kept = [(i, view) for i, tiling in enumerate(tilings) for view in range(tiling.items)]
        if max(view for _, view in kept) >= pixel_values.shape[1]:
            wanted = max(tiling.items for tiling in tilings)
            raise InputError(f"pixel_values: {pixel_values.shape[1]} views a picture, their sizes need {wanted}")
        picture, view = map(list, zip(*kept, strict=True))
        views = pixel_values[picture, view]
    patches = cut(model, views)
    wanted = sum(tiling.items for tiling in tilings)
    if len(patches.grids) != wanted:
        raise InputError(f"pixel_values: {len(patches.grids)} views, the pictures' sizes need {wanted}")
    return replace(patches, tilings=tilings)


# ------------------------------------------------------------------------------------------------------- processors


def _said(out: Writer, message: Message) -> None:
    """A user's pictures, a line break after each, then the words."""
    for _ in images_of((message,)):
        out.image()
        out.words("\n")
    out.parts(Message("user", tuple(part for part in message.parts if not isinstance(part, (Image, Video)))))


def mistral_template(conversation: Conversation) -> list[Segment]:
    """Mistral's: what a user says stands between `[INST]` and `[/INST]`, which are words like any other."""
    out = Writer()
    out.control("<s>")
    system = "".join(message.text for message in conversation if message.role == "system")
    for i, message in enumerate(turns(conversation)):
        if message.role == "user":
            out.words("[INST] " + (f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and not i else ""))
            _said(out, message)
            out.words(" [/INST]")
        else:
            out.parts(message, learned=True, before=" ")
            out.segments.append(End("</s>"))
    return out.segments


def habits(c: Json) -> Habits:
    """Its three text halves have a form of conversation each; Yi is a LLaMA with twice as many words."""
    text = c.get("text_config") or {}
    template: Template = vicuna_template()
    end = ""
    if text.get("model_type") == "mistral":
        template = mistral_template
    elif text.get("vocab_size", 0) >= 64_000:
        template, end = chatml(_said, "Answer the questions.", ""), "<|im_end|>"
    return Habits(template, "<image>", end=end, pixels=partial(_pixels, c))


def _pixels(model: Json, c: Json, side: int) -> ImagePipeline:
    return AnyResolution(side, grids_of({**model, **c}, side), scaling(c, CLIP))


FAMILIES = {
    "llava_next": Family(
        lambda c, f: VLM(config(c)),
        keys,
        llava.published_tensors,
        inputs,
        habits=lambda c, f, t: habits(c),
    ),
}

MISTRAL_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
MISTRAL_7B |= {"intermediate_size": 14_336, "vocab_size": 32_064, "max_position_embeddings": 32_768}
YI_34B = {"hidden_size": 7168, "num_hidden_layers": 60, "num_attention_heads": 56, "num_key_value_heads": 8}
YI_34B |= {"intermediate_size": 20_480, "vocab_size": 64_064, "max_position_embeddings": 4096}


def _row(size: str, llm: str, licence: str, text: dict[str, Any]) -> Row:
    return Row(
        name=f"llava-1.6-{size}",
        family="LLaVA-NeXT",
        encoder="CLIP ViT-L/14 336",
        fusion="MLP of 2 layers, up to 4 tiles",
        llm=llm,
        licence=licence,
        source=f"llava-hf/llava-v1.6-{size}-hf",
        read=config,
        config={"vision_config": llava.clip_l(336), "text_config": {"rms_norm_eps": 1e-5, **text}},
        stages={"align": ("fusion.*",), "instruct": ("*",)},
    )


ROWS = (
    _row(
        "mistral-7b",
        "Mistral 7B v0.2",
        "Apache-2.0",
        {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6, **MISTRAL_7B},
    ),
    _row("34b", "Yi 34B", "Apache-2.0", {"model_type": "llama", "rope_theta": 5e6, **YI_34B}),
)
