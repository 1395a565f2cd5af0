"""LLaVA (arXiv:2304.08485) and LLaVA-1.5 (arXiv:2310.03744): CLIP, one or two linear layers, LLaMA/Vicuna.

Four layouts are read: the published llava-hf one, transformers 4.52's with everything below `model.`, a fresh save of
transformers 5 without `vision_model.`, and the original code's, whose picture tower may lie in a folder of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import CheckpointError, ConfigError
from ..data.images import PadSquare, Scaling, Square
from ..data.processor import ImagePipeline
from ..data.template import TEMPLATES
from ..fusion.projector import ProjectorConfig
from ..model import VLM, VLMConfig
from .backbones import clip_config, siglip_config
from .checkpoint import read_json, read_tensors
from .configs import Json, act
from .encoder_names import clip_keys, siglip_keys
from .family import Family, Habits, Row, Stages, clip_crop, llama, scaling
from .keymap import KeyMap, rule
from .language_names import decoder_keys
from .languages import language_config

# the towers that the original configurations name; sizes as published by OpenAI
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {**CLIP_L, "image_size": 224, "patch_size": 14},
    "openai/clip-vit-large-patch14-336": {**CLIP_L, "image_size": 336, "patch_size": 14},
}


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json` of llava-hf."""
    vision = c["vision_config"]
    siglip = str(vision.get("model_type", "")).startswith("siglip")
    strategy = c.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full") or (siglip and strategy == "default"):
        wanted = "'full' for this encoder" if siglip else "'default' or 'full'"  # SigLIP has no first token to drop
        raise ConfigError(f"vision_feature_select_strategy {strategy!r}, expected {wanted}")
    image = siglip_config(vision) if siglip else clip_config(vision)
    layer = _layer(c.get("vision_feature_layer", -2))
    image = replace(image, layer=layer, normed=False, keep_prefix=strategy == "full" and not siglip)
    decoder = language_config(c["text_config"])
    projector = ProjectorConfig(
        inputs=image.features,
        width=decoder.width,
        layers=2,
        activation=act(c.get("projector_hidden_act", "gelu")),
        bias=c.get("multimodal_projector_bias", True),
    )
    return VLMConfig(image=image, fusion=projector, decoder=decoder)


def _layer(found: Any) -> int | tuple[int, ...]:
    """The layer that features are taken from, or several."""
    layers = found if isinstance(found, list) else [found]
    if not layers or not all(isinstance(layer, int) and layer < 0 for layer in layers):
        raise ConfigError(f"vision_feature_layer {found!r}, expected layers counted from the end, such as -2")
    return tuple(layers) if isinstance(found, list) else layers[0]


def keys(cfg: VLMConfig, projector: str = "fusion.") -> KeyMap:
    """The published llava-hf names; `projector` is where its layers lie here."""
    tower = clip_keys(cfg.vit) if cfg.vit.class_token else siglip_keys(cfg.vit)
    return (
        tower.under("vision_tower.vision_model.", "encoder.")
        + decoder_keys(cfg.decoder, "language_model.model.", "language_model.lm_head.").under("", "decoder.")
        + KeyMap(
            (
                rule("multi_modal_projector.linear_1.{p}", f"{projector}layers.0.{{p}}"),
                rule("multi_modal_projector.linear_2.{p}", f"{projector}layers.1.{{p}}"),
            )
        )
    )


def published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of any layout that transformers writes, under the published names."""
    return {published_name(key): value for key, value in tensors.items()}


def bare_tower(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for families whose tower is published without `vision_model.` (InternVL, Aria)."""
    inner, outer = "vision_tower.vision_model.", "vision_tower."
    return {key.replace(inner, outer): value for key, value in published(tensors).items()}


def published_name(key: str) -> str:
    """One name of any layout that transformers writes, as published."""
    if key.startswith("model.language_model."):
        key = "language_model.model." + key.removeprefix("model.language_model.")
    elif key.startswith("lm_head."):
        key = "language_model." + key
    elif key.startswith(("model.vision_tower.", "model.multi_modal_projector.", "model.image_newline")):
        key = key.removeprefix("model.")
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", key)


def module_name(key: str) -> str:
    """One name of any layout as transformers 5 has it in memory."""
    key = published_name(key)
    if key.startswith("language_model.model."):
        return "model.language_model." + key.removeprefix("language_model.model.")
    if key.startswith("language_model.lm_head"):
        return key.removeprefix("language_model.")
    return "model." + key.replace("vision_tower.vision_model.", "vision_tower.").removeprefix("model.")


# -------------------------------------------------------------------------------------------------- original layout


def original_config(c: Json, folder: Path) -> VLMConfig:
    """Settings from a `config.json` of the original code: a LLaMA's, with the tower named."""
    image = clip_config(_tower(c, folder), c.get("mm_vision_select_layer", -2))
    decoder = language_config({**c, "model_type": "llama"})
    kind = c.get("mm_projector_type", "linear")
    found = re.fullmatch(r"linear|mlp(\d+)x_gelu", kind)
    if not found:
        raise ConfigError(f"mm_projector_type {kind!r}, expected 'linear' or 'mlp2x_gelu'")
    layers = int(found[1] or 1)
    return VLMConfig(image, ProjectorConfig(inputs=image.width, width=decoder.width, layers=layers), decoder)


def _tower(c: Json, folder: Path) -> dict[str, Any]:
    name = c.get("mm_vision_tower", "")
    if name in TOWERS:
        return TOWERS[name]
    local = folder / name
    if not name or not local.is_dir():
        raise CheckpointError(f"{folder}: mm_vision_tower {name!r} is neither known ({', '.join(TOWERS)}) nor a folder")
    found = read_json(local / "config.json")
    return dict(found.get("vision_config", found))


def original_keys(cfg: VLMConfig) -> KeyMap:
    """Names of haotian-liu/LLaVA: one linear layer has no number, layers of an MLP skip the activation's."""
    assert isinstance(cfg.fusion, ProjectorConfig)
    layers = cfg.fusion.layers
    projector = (
        [rule("model.mm_projector.{p}", "fusion.layers.0.{p}")]
        if layers == 1
        else [rule(f"model.mm_projector.{2 * k}.{{p}}", f"fusion.layers.{k}.{{p}}") for k in range(layers)]
    )
    return (
        clip_keys(cfg.vit).under("model.vision_tower.vision_tower.vision_model.", "encoder.")
        + decoder_keys(cfg.decoder).under("", "decoder.")
        + KeyMap(tuple(projector))
    )


def original_tensors(c: Json, folder: Path) -> dict[str, Tensor]:
    """Tensors of the original layout; the tower's come from its own folder where the file leaves them out."""
    tensors = read_tensors(folder)
    inside = "model.vision_tower.vision_tower.vision_model."
    if any(key.startswith(inside) for key in tensors):
        return tensors
    name = c.get("mm_vision_tower", "")
    local = folder / name
    if not local.is_dir():
        raise CheckpointError(f"{folder}: the picture tower {name!r} is not in the file; put it into {local}")
    tower = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in read_tensors(local).items()}
    skipped = ("vision_model.text_model.", "vision_model.visual_projection", "vision_model.text_projection")
    kept = {key: value for key, value in tower.items() if not key.startswith((*skipped, "vision_model.logit_scale"))}
    return tensors | {inside + key.removeprefix("vision_model."): value for key, value in kept.items()}


# ------------------------------------------------------------------------------------------------- families and rows


def published_tensors(c: Json, folder: Path) -> Mapping[str, Tensor]:
    """Tensors of a folder in any layout that transformers writes, under the published names."""
    return published(read_tensors(folder))


def _padded(c: Json, side: int) -> ImagePipeline:
    return PadSquare(side, scaling(c, PadSquare(side).scaling))


def _pixels(c: Json, side: int) -> ImagePipeline:
    """As the class says that a `preprocessor_config.json` names; CLIP's where it names none."""
    named = str(c.get("image_processor_type", ""))
    if named.startswith("Siglip"):
        return Square(c.get("size", {}).get("height", side), scaling(c, Scaling()))
    if named.startswith("Llava") and c.get("do_pad"):
        return _padded(c, side)
    return clip_crop(c, side)


# the original has no image token of its own; the unknown token stands in its slots, which the model replaces
FAMILIES = {
    "llava": Family(
        lambda c, f: VLM(config(c)),
        keys,
        published_tensors,
        habits=Habits(TEMPLATES["llava-hf"], "<image>", "decimals", pixels=_pixels),
        modules=module_name,
    ),
    "llava_llama": Family(
        lambda c, f: VLM(original_config(c, f)),
        original_keys,
        original_tensors,
        habits=Habits(TEMPLATES["llava-v1"], "<unk>", "decimals", pixels=_padded),
    ),
}

STAGES: Stages = {"align": ("fusion.*",), "instruct": ("fusion.*", "decoder.*")}  # arXiv:2304.08485 section 4.2


def clip_l(side: int) -> dict[str, Any]:
    """CLIP ViT-L/14's sizes, for pictures of this side."""
    return {**CLIP_L, "model_type": "clip_vision_model", "image_size": side, "patch_size": 14}


def _llava_15(size: str) -> Row:
    sizes = {"vision_config": clip_l(336), "text_config": llama(size, vocab_size=32064)}
    return Row(
        name=f"llava-1.5-{size}",
        family="LLaVA-1.5",
        encoder="CLIP ViT-L/14 336",
        fusion="MLP of 2 layers",
        llm=f"Vicuna {size.upper()} v1.5",
        licence="Llama 2",
        source=f"llava-hf/llava-1.5-{size}-hf",
        read=config,
        config=sizes,
        stages=STAGES,
    )


LINEAR = Row(
    name="llava-llama-2-13b",
    family="LLaVA",
    encoder="CLIP ViT-L/14 224",
    fusion="linear",
    llm="LLaMA-2 13B Chat",
    licence="Llama 2",
    source="liuhaotian/llava-llama-2-13b-chat-lightning-preview",
    read=lambda c: original_config(c, Path()),
    config=llama("13b", vocab_size=32000, mm_vision_tower="openai/clip-vit-large-patch14", mm_vision_select_layer=-2),
    stages=STAGES,
    proof="logits equal transformers' on a random checkpoint, its second layer set to the identity",
)

ROWS = (LINEAR, _llava_15("7b"), _llava_15("13b"))
