"""Every family that a folder's `config.json` may name, and every published model by its name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.config import nearest
from ..core.errors import ConfigError
from ..encoders.vit import ViT
from ..language.decoder import Decoder
from ..language.tokenizer import Tokenizer
from . import (
    aria,
    backbones,
    blip2,
    chameleon,
    cogvlm,
    encoder_names,
    ferret,
    flamingo,
    fuyu,
    gemini,
    gpt4v,
    idefics,
    internvl,
    kosmos2,
    languages,
    llama4,
    llava,
    llava_next,
    mllama,
    pali,
    paligemma,
    qwen2_vl,
    qwen_vl,
    shikra,
    t5,
)
from .checkpoint import read_tensors
from .configs import Json
from .family import Family, Habits, Row
from .inputs import words


def _text(c: Json, folder: Path) -> Mapping[str, Tensor]:
    """Tensors of a language model; what turns pictures into words or back is left out."""
    return {key: value for key, value in read_tensors(folder).items() if not key.startswith("model.vqmodel.")}


def _tower(c: Json, folder: Path) -> Mapping[str, Tensor]:
    """Tensors of an encoder, with `vision_model.` before each name whichever way it was saved; text towers left out."""
    skipped = ("text_model.", "text_projection", "visual_projection", "logit_")
    found = {key: value for key, value in read_tensors(folder).items() if not key.startswith(skipped)}
    return {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in found.items()}


def _vision(c: Json) -> Json:
    """The vision half of a two-tower configuration, or the configuration itself."""
    found: Json = c.get("vision_config", c)
    return found


ENCODERS = {
    "clip": Family(
        lambda c, f: ViT(backbones.clip_config(_vision(c))),
        lambda cfg: encoder_names.clip_keys(cfg).under("vision_model.", ""),
        _tower,
        inputs=None,
    ),
    "siglip": Family(
        lambda c, f: ViT(backbones.siglip_config(_vision(c))),
        lambda cfg: encoder_names.siglip_keys(cfg).under("vision_model.", ""),
        _tower,
        inputs=None,
    ),
    "dinov2": Family(lambda c, f: ViT(backbones.dinov2_config(c)), encoder_names.dinov2_keys, inputs=None),
    "internvl_vision": Family(
        lambda c, f: ViT(backbones.internvl_vision_config(c)), encoder_names.internvl_vision_keys, inputs=None
    ),
    "intern_vit_6b": Family(
        lambda c, f: ViT(backbones.intern_vit_config(c)), encoder_names.intern_vit_keys, inputs=None
    ),
    "blip_2_vision_model": Family(
        lambda c, f: ViT(backbones.eva_clip_config(c)), encoder_names.eva_clip_keys, inputs=None
    ),
    "kosmos_2_vision_model": Family(
        lambda c, f: ViT(backbones.kosmos2_vision_config(c)),
        lambda cfg: encoder_names.clip_keys(cfg).under("model.", ""),
        inputs=None,
    ),
}
ENCODERS |= {
    "clip_vision_model": ENCODERS["clip"],
    "siglip_vision_model": ENCODERS["siglip"],
    "dinov2_with_registers": ENCODERS["dinov2"],
    "instructblip_vision_model": ENCODERS["blip_2_vision_model"],
}
LANGUAGES = {
    name: Family(lambda c, f: Decoder(languages.language_config(c)), language.keys, _text, words)
    for name, language in languages.LANGUAGES.items()
}
LANGUAGES |= t5.FAMILIES

# a file each; its rows are listed in this order
WHOLE = (
    llava,
    llava_next,
    blip2,
    internvl,
    kosmos2,
    aria,
    llama4,
    idefics,
    flamingo,
    mllama,
    gpt4v,
    paligemma,
    pali,
    qwen_vl,
    qwen2_vl,
    cogvlm,
    fuyu,
    chameleon,
    shikra,
    ferret,
    gemini,
)
FAMILIES: dict[str, Family] = ENCODERS | LANGUAGES
WORDLESS: dict[str, Any] = {"model": {"type": "BPE", "vocab": {}, "merges": []}}  # of a tokenizer that is not here
for module in WHOLE:
    FAMILIES |= module.FAMILIES
ROWS: dict[str, Row] = {row.name: row for module in WHOLE for row in module.ROWS}


def kind_of(row: Row) -> str:
    """The family that reads a row's folder: the one that its configuration names, or else the first of its file.

    "" for a model that was never published as a folder.
    """
    known = next(module.FAMILIES for module in WHOLE if any(row.name == each.name for each in module.ROWS))
    try:
        kind = family_of(row.config)
    except ConfigError:  # rows leave out what their files say of themselves
        kind = ""
    return kind if kind in known else next(iter(known), "")


def habits_of(row: Row, tokenizer: Tokenizer | None = None) -> Habits:
    """What a published model's processor does; its tokenizer, where it is here, may tell more of it."""
    if row.habits is not None:
        return row.habits
    found = FAMILIES[kind].habits if (kind := kind_of(row)) else None
    habits = found(row.config, Path(), tokenizer or Tokenizer(WORDLESS)) if callable(found) else found
    if habits is None:
        raise ConfigError(f"how the processor of {row.name!r} reads a conversation is not known here")
    return habits


def family_of(c: Json) -> str:
    """The family that a configuration names; ConfigError tells the nearest known one."""
    kind = str(c.get("model_type", ""))
    original = "mm_vision_tower" in c or "LlavaLlamaForCausalLM" in (c.get("architectures") or [])
    if original and kind in ("llava", "llava_llama", "llama"):
        return "llava_llama"
    if kind == "qwen" and "visual" in c:  # a Qwen-VL says that it is a Qwen
        return "qwen_vl"
    if "CogVLMForCausalLM" in (c.get("architectures") or []):  # its own files name no type
        return "cogvlm"
    if not kind:
        raise ConfigError("config.json names no model type, expected that of a published model")
    if kind not in FAMILIES:
        raise ConfigError(f"config.json names the model type {kind!r}, which is not known{nearest(kind, FAMILIES)}")
    return kind
