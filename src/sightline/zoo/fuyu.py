"""Fuyu (Adept, 2023): no encoder; a linear map of 30x30 pixels makes tokens of a Persimmon, rows end with a token.

Published patches hold rows, columns, channels; here channels come first.
"""

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from torch import Tensor

from ..core.errors import InputError
from ..core.patches import Patches
from ..core.sequence import Conversation
from ..data.batch import Batch
from ..data.images import Scaling, Seen
from ..data.native_resolution import FitWithin
from ..data.processor import ImagePipeline
from ..data.template import Control, End, Segment, Writer, turns
from ..encoders.vit import ViTConfig
from ..fusion.projector import ProjectorConfig
from ..model import VLM, VLMConfig
from .configs import Json
from .family import EQUAL, Family, Habits, Row, scaling
from .inputs import checked, filled, is_image
from .keymap import KeyMap, Reshape, rule
from .language_names import persimmon_keys
from .languages import language_config

IMAGE, NEWLINE, ANSWER, END = "|SPEAKER|", "|NEWLINE|", "<0x04>", "|ENDOFTEXT|"


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`, its text half nested or flat."""
    text = {"rope_theta": 25_000.0, **c} if c.get("text_config") is None else dict(c["text_config"])
    decoder = language_config({**text, "model_type": "persimmon"})
    patch = c.get("patch_size", 30)
    image = ViTConfig(
        image_size=c.get("image_size", 300) // patch * patch,
        patch_size=patch,
        channels=c.get("num_channels", 3),
        width=decoder.width,
        depth=0,
        heads=1,
        mlp=1,
        positions="none",
        final_norm=False,
    )
    return VLMConfig(image, ProjectorConfig(inputs=decoder.width, width=decoder.width, layers=0), decoder)


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names."""
    image, theirs = cfg.image, "vision_embed_tokens."
    return persimmon_keys(cfg.decoder).under("language_model.", "decoder.") + KeyMap(
        (
            rule(f"{theirs}weight", "encoder.patch.weight", reshape=channels_last(image.channels, image.patch_size)),
            rule(f"{theirs}bias", "encoder.patch.bias"),
        )
    )


def channels_last(channels: int, patch: int) -> Reshape:
    """A map of patches published in (row, column, channel) order."""
    return Reshape(
        there=lambda x: [channels_first(x, channels, patch)],
        back=lambda xs: xs[0].unflatten(1, (channels, patch, patch)).permute(0, 2, 3, 1).flatten(1),
    )


def channels_first(x: Tensor, channels: int, patch: int) -> Tensor:
    """Vectors [n, patch*patch*channels] in (row, column, channel) order as (channel, row, column)."""
    out: Tensor = x.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2).flatten(1)
    return out


def inputs(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_patches: Tensor | None = None,
    image_patches_indices: Tensor | None = None,
    attention_mask: Tensor | None = None,
    mm_token_type_ids: Tensor | None = None,
) -> Batch:
    """Patches [n, width] or [batch, n, width] of all rows in order, by their newer name or the older `image_patches`.

    image_patches_indices: [batch, length], which of its row's patches stands at each token, negative at words; without
    them patches stand in order where the image token does. mm_token_type_ids say what the ids say already.
    """
    ids = checked(
        input_ids,
        image_patches_indices=image_patches_indices,
        attention_mask=attention_mask,
        mm_token_type_ids=mm_token_type_ids,
    )
    if pixel_values is not None and image_patches is not None:
        raise InputError("pixel_values and image_patches are two names of one input, expected one of them")
    values = image_patches if pixel_values is None else pixel_values
    slots = is_image({"image_token_id": 71_011, **c}, ids)
    if values is None:
        return filled(model, ids, slots, None, attention_mask)
    image = model.config.image
    if values.dim() not in (2, 3) or values.shape[-1] != image.patch_dim:
        raise InputError(f"pixel_values: found {list(values.shape)}, expected [batch, patches, {image.patch_dim}]")
    if image_patches_indices is not None:
        values, slots = chosen(values, image_patches_indices), image_patches_indices >= 0
    cut = channels_first(values.flatten(0, -2).to(model.dtype), image.channels, image.patch_size)
    return filled(model, ids, slots, Patches(cut, ((1, 1, len(cut)),)), attention_mask)


def chosen(values: Tensor, indices: Tensor) -> Tensor:
    """The patches [n, width] that indices [batch, length] name, of each row's own [batch, patches, width]."""
    values = values if values.dim() == 3 else values[None]
    if len(values) != len(indices) or int(indices.max()) >= values.shape[1]:
        raise InputError(f"image_patches_indices up to {int(indices.max())} for {list(values.shape)} patches")
    row, place = (indices >= 0).nonzero(as_tuple=True)
    return values[row, indices[row, place]]


# -------------------------------------------------------------------------------------------------------- processor


def template(conversation: Conversation) -> list[Segment]:
    """A picture, `<s>`, the question, the token that begins the answer; then the answer and the end of text."""
    talk, out = turns(conversation), Writer()
    if len(talk) > 2 or any(message.role == "system" for message in conversation):
        raise InputError("this model answers one question, expected no other messages")
    question = out.shown(talk[0])
    if out.images > 1:
        raise InputError(f"this model reads one picture, the question has {out.images}")
    out.control("<s>")
    out.parts(question)
    out.segments.append(Control(ANSWER))
    if len(talk) == 2:
        out.parts(talk[1], learned=True)
        out.segments.append(End(END))
    return out.segments


def rows(seen: Seen, counts: Sequence[int]) -> list[int | str]:
    """Each row of patches and the token that ends it."""
    _, height, width = seen.pixels[0].shape
    side = isqrt(height * width // counts[0])
    return [part for _ in range(height // side) for part in (width // side, NEWLINE)]


def pixels(c: Json, side: int) -> ImagePipeline:
    """From a `preprocessor_config.json`; what is filled is filled before levels are scaled, as published."""
    size, patch = c.get("size") or {"width": 1920, "height": 1080}, c.get("patch_size") or {"height": 30, "width": 30}
    half = {**c, **{name: (c.get(name, 0.5),) * 3 for name in ("image_mean", "image_std") if _single(c, name)}}
    usual = Scaling(resample="bilinear")
    return FitWithin(
        width=size["width"],
        height=size["height"],
        multiple=patch["height"],
        fill=round(c.get("padding_value", 1.0)),
        scaling=scaling({"resample": 2, **half}, usual),
    )


def _single(c: Mapping[str, Any], name: str) -> bool:
    """Whether a file has one number for all channels, or none."""
    return not isinstance(c.get(name, 0.5), list | tuple)


HABITS = Habits(template, IMAGE, end=END, pixels=pixels, expand=rows, controls=(IMAGE, NEWLINE, ANSWER, END, "<s>"))

FAMILIES = {"fuyu": Family(lambda c, f: VLM(config(c)), keys, inputs=inputs, habits=HABITS)}

PERSIMMON = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 64, "intermediate_size": 16_384}
FUYU = Row(
    name="fuyu-8b",
    family="Fuyu",
    encoder="none: 30x30 pixels of any picture",
    fusion="linear map of pixels",
    llm="Persimmon 8B",
    licence="CC-BY-NC 4.0",
    source="adept/fuyu-8b",
    read=config,
    config={"text_config": {**PERSIMMON, "vocab_size": 262_144, "rope_theta": 25_000.0}},
    stages={"pretrain": ("*",)},
    proof=EQUAL,
)

ROWS = (FUYU,)
