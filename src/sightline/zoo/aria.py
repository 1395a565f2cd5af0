"""Aria (arXiv:2410.05993): SigLIP with bucketed positions, a pool that has more queries for more patches, experts.

Its files are laid out as llava-hf's, but for `vision_model.`, which is left out.
"""

from dataclasses import replace
from functools import partial

from torch import Tensor

from ..core.errors import InputError
from ..core.patches import Patches, join
from ..core.sequence import Image, Message, Video, images_of
from ..data.batch import Batch
from ..data.images import Scaling
from ..data.processor import ImagePipeline
from ..data.template import Writer, chatml
from ..data.tiles import Fitted
from ..fusion.pooling import SizedPoolConfig
from ..model import VLM, VLMConfig
from . import llava
from .backbones import siglip_config
from .checkpoint import read_tensors
from .configs import Json, expect
from .encoder_names import siglip_keys
from .family import Family, Habits, Row, scaling
from .inputs import checked, cut, filled, is_image
from .keymap import KeyMap, rule, stacked
from .language_names import aria_keys
from .languages import language_config

# what the published configuration class of its encoder has by default and SigLIP's has not
TOWER = {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`; features are taken before the encoder's final norm."""
    expect(c, vision_feature_layer=-1)
    image = siglip_config({**TOWER, **(c.get("vision_config") or {})})
    text = {**(c.get("text_config") or {}), "model_type": "aria_text"}
    return VLMConfig(replace(image, normed=False, bucketed=True), pool_config(c), language_config(text))


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names."""
    return (
        siglip_keys(cfg.vit).under("vision_tower.", "encoder.")
        + pool_keys().under("multi_modal_projector.", "fusion.")
        + aria_keys(cfg.decoder).under("language_model.", "decoder.")
    )


def pool_config(c: Json) -> SizedPoolConfig:
    """From its `config.json`, where numbers of patches are written as text."""
    vision, text = c.get("vision_config") or {}, c.get("text_config") or {}
    queries = c.get("projector_patch_to_query_dict") or {1225: 128, 4900: 256}
    return SizedPoolConfig(
        inputs=vision.get("hidden_size", 1152),
        width=text.get("hidden_size", 4096),
        heads=vision.get("num_attention_heads", 16),
        queries={int(patches): int(count) for patches, count in queries.items()},
    )


def pool_keys() -> KeyMap:
    """The published names, below `multi_modal_projector.`."""
    inner = (f"attention.{x}.{{p}}" for x in "qkv")
    return KeyMap(
        (
            rule("query", "queries"),
            rule("cross_attn.layer_norm.{p}", "norm_queries.{p}"),
            rule("cross_attn.layer_norm_kv.{p}", "norm_features.{p}"),
            *(rule(f"cross_attn.{x}_proj.{{p}}", f"{x}.{{p}}") for x in "qkv"),
            rule("cross_attn.multihead_attn.in_proj_{p}", *inner, reshape=stacked(3)),
            rule("cross_attn.multihead_attn.out_proj.{p}", "attention.o.{p}"),
            rule("cross_attn.linear.{p}", "mix.{p}"),
            rule("layer_norm.{p}", "norm.{p}"),
            rule("feed_forward.linear_in.{p}", "up.{p}"),
            rule("feed_forward.linear_out.{p}", "down.{p}"),
        )
    )


def inputs(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    pixel_mask: Tensor | None = None,
) -> Batch:
    """Pictures [n, 3, height, width]; the mask [n, height, width] is 1 in the upper left part that a picture fills."""
    ids = checked(input_ids, attention_mask=attention_mask)
    patches = None
    if pixel_mask is not None:
        patches = filling(model, pixel_values, pixel_mask)
    elif pixel_values is not None:
        patches = cut(model, pixel_values)
    return filled(model, ids, is_image(c, ids), patches, attention_mask)


def filling(model: VLM, pixel_values: Tensor | None, pixel_mask: Tensor) -> Patches:
    """The patches that a picture fills, wholly or in part; those that are all padding, which nothing sees, left out."""
    wanted = None if pixel_values is None else [len(pixel_values), *pixel_values.shape[2:]]
    if pixel_values is None or list(pixel_mask.shape) != wanted:
        raise InputError(f"pixel_mask is {list(pixel_mask.shape)}, expected {wanted or 'pixel_values with it'}")
    mask, patch = pixel_mask.bool(), model.config.image.patch_size
    parts = []
    for pixels, real in zip(pixel_values, mask, strict=True):
        height, width = int(real.any(1).sum()), int(real.any(0).sum())
        if int(real.sum()) != height * width or not bool(real[:height, :width].all()):
            raise InputError("pixel_mask: a picture must fill one rectangle in the upper left corner")
        down, across = (-(-side // patch) * patch for side in (height, width))
        parts.append(cut(model, pixels[None, :, :down, :across]))
    return join(parts)


# ------------------------------------------------------------------------------------------------------- processors

# rows and columns of the canvases that pictures are cut on, of equally good ones the first
GRIDS = (*((1, n) for n in range(2, 9)), (2, 4), (2, 3), (2, 2), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2))
GRIDS = (*GRIDS, *((n, 1) for n in range(5, 9)))
UNIT = 490  # what its grids are squares of


def _said(out: Writer, message: Message) -> None:
    """What a user says, each picture between two tags."""
    for part in message.parts:
        alone = Message("user", (part,))
        for _ in images_of((alone,)):
            out.control("<fim_prefix>")
            out.image()
            out.control("<fim_suffix>")
        if not isinstance(part, (Image, Video)):
            out.parts(alone)


def habits(c: Json) -> Habits:
    """Its processor, which fits pictures into the larger of two squares unless the file says otherwise."""
    patch = (c.get("vision_config") or {}).get("patch_size", 32)
    return Habits(chatml(_said), "<|img|>", end="<|im_end|>", bos="", pixels=partial(_fitted, patch))


def _fitted(patch: int, c: Json, side: int) -> ImagePipeline:
    pixels = [tuple(size) for size in c.get("split_resolutions") or ()]
    grids = tuple((height // UNIT, width // UNIT) for height, width in pixels) or GRIDS
    return Fitted(
        size=c.get("max_image_size", side),
        patch=patch,
        min_size=c.get("min_image_size", 336),
        grids=grids if c.get("split_image", False) else (),
        scaling=scaling(c, Scaling()),
    )


FAMILIES = {
    "aria": Family(
        lambda c, f: VLM(config(c)),
        keys,
        lambda c, f: llava.bare_tower(read_tensors(f)),
        inputs,
        habits=lambda c, f, t: habits(c),
        modules=llava.module_name,
    )
}

# arXiv:2410.05993, table 1 and section 2
ARIA_VISION = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
ARIA_TEXT = {"hidden_size": 2560, "num_hidden_layers": 28, "num_attention_heads": 20, "intermediate_size": 1664}
ARIA_TEXT |= {"moe_num_experts": 64, "moe_topk": 6, "moe_num_shared_experts": 2, "vocab_size": 100352}
ARIA = Row(
    name="aria",
    family="Aria",
    encoder="SigLIP So400m/14 980",
    fusion="pool of 128 or 256 queries",
    llm="Aria's 24.9B, 64 experts",
    licence="Apache 2.0",
    source="rhymes-ai/Aria",
    read=config,
    config={
        "vision_config": {**ARIA_VISION, "patch_size": 14, "image_size": 980},
        "text_config": {**ARIA_TEXT, "max_position_embeddings": 65536, "rope_theta": 5e6},
    },
)

ROWS = (ARIA,)
