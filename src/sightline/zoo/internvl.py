"""InternVL (arXiv:2404.16821): InternViT, squares of patches folded into one, an MLP, a language model.

A picture is cut into tiles, each of which is an item of its own. Two layouts are read: transformers', with a Qwen2 or
LLaMA text half, and that of the original code, whose text half is an InternLM2 or a Qwen2.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError
from ..fusion.projector import ProjectorConfig
from ..model import VLM, VLMConfig
from . import llava
from .backbones import (
    Json,
    act,
    decoder_keys,
    intern_vit_config,
    intern_vit_keys,
    internvl_vision_config,
    internvl_vision_keys,
    language_config,
)
from .checkpoint import read_tensors
from .family import LOGITS, Family, Row
from .keymap import KeyMap, rule
from .language_names import internlm2_keys


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json` of transformers."""
    if (strategy := c.get("vision_feature_select_strategy", "default")) != "default":
        raise ConfigError(f"vision_feature_select_strategy {strategy!r}, expected 'default': only patches are folded")
    image = internvl_vision_config(c["vision_config"], _layer(c, "vision_feature_layer"))
    decoder = language_config(c["text_config"])
    return VLMConfig(image, projector_config(c, image.width, decoder.width), decoder)


def _layer(c: Json, name: str) -> int:
    """The layer that features are taken from."""
    found: Any = c.get(name, -1)
    if not isinstance(found, int) or found >= 0:
        raise ConfigError(f"{name} {found!r}, expected one layer counted from the end, such as -1")
    return found


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names of transformers' layout."""
    return (
        internvl_vision_keys(cfg.image).under("vision_tower.", "encoder.")
        + projector_keys().under("multi_modal_projector.", "fusion.")
        + decoder_keys(cfg.decoder).under("language_model.", "decoder.")
    )


def tensors(c: Json, folder: Path) -> dict[str, Tensor]:
    """Tensors of any layout that transformers writes, under the published names: LLaVA's, the tower's one level up.

    A file of tied words holds them once, though the text half may say that they are not tied: the outer settings count.
    """
    found = llava.bare_tower(read_tensors(folder))
    head, table = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    if c.get("tie_word_embeddings") and head not in found and table in found:
        found[head] = found[table].clone()
    return found


def projector_config(c: Json, inputs: int, width: int) -> ProjectorConfig:
    """From a `config.json` of either layout; inputs, width: the encoder's and the decoder's."""
    ratio, order = c.get("downsample_ratio", 0.5), c.get("ps_version", "v2")
    if order not in ("v1", "v2"):
        raise ConfigError(f"ps_version {order!r}, expected 'v1' or 'v2'")
    return ProjectorConfig(
        inputs=inputs,
        width=width,
        activation=act(c.get("projector_hidden_act", "gelu")),
        shuffle=round(1 / ratio),
        norm=True,
        transposed=order == "v1",
    )


def projector_keys() -> KeyMap:
    """The names that transformers writes, below `multi_modal_projector.`."""
    return KeyMap(
        (
            rule("layer_norm.{p}", "norm.{p}"),
            rule("linear_1.{p}", "layers.0.{p}"),
            rule("linear_2.{p}", "layers.1.{p}"),
        )
    )


# -------------------------------------------------------------------------------------------------- original layout


def original_config(c: Json) -> VLMConfig:
    """Settings from a `config.json` of the original code; where it names no `ps_version`, it means the first."""
    text = c["llm_config"]
    if (kind := text.get("model_type")) not in ("internlm2", "qwen2"):
        raise ConfigError(f"llm_config of type {kind!r}, expected 'internlm2' or 'qwen2'")
    image = intern_vit_config(c["vision_config"], _layer(c, "select_layer"))
    decoder = language_config(text)
    return VLMConfig(image, projector_config({"ps_version": "v1", **c}, image.width, decoder.width), decoder)


def original_keys(cfg: VLMConfig) -> KeyMap:
    """The names of OpenGVLab/InternVL."""
    qwen2 = cfg.decoder.qkv_bias and not cfg.decoder.out_bias  # InternLM2 has both biases or neither
    words = decoder_keys if qwen2 else internlm2_keys
    return (
        intern_vit_keys(cfg.image).under("vision_model.", "encoder.")
        + original_projector_keys().under("mlp1.", "fusion.")
        + words(cfg.decoder).under("language_model.", "decoder.")
    )


def original_projector_keys() -> KeyMap:
    """The names of OpenGVLab/InternVL, below `mlp1.`."""
    return KeyMap((rule("0.{p}", "norm.{p}"), rule("1.{p}", "layers.0.{p}"), rule("3.{p}", "layers.1.{p}")))


# ------------------------------------------------------------------------------------------------- families and rows

FAMILIES = {
    "internvl": Family(lambda c, f: VLM(config(c)), keys, tensors, modules=llava.module_name),
    "internvl_chat": Family(lambda c, f: VLM(original_config(c)), original_keys),
}

# the 6B without its last three blocks; arXiv:2404.16821 sections 3 and 4.1
INTERN_VIT_6B = {"hidden_size": 3200, "intermediate_size": 12_800, "num_hidden_layers": 45, "num_attention_heads": 25}
INTERN_VIT_6B |= {"image_size": 448}
INTERNLM2_20B = {"model_type": "internlm2", "hidden_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 48}
INTERNLM2_20B |= {"num_key_value_heads": 8, "intermediate_size": 16_384, "vocab_size": 92_553, "bias": False}
INTERNLM2_20B |= {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-5, "rope_theta": 1e6}

INTERNVL_15 = Row(
    name="internvl-chat-v1-5",
    family="InternVL-1.5",
    encoder="InternViT-6B/14 448",
    fusion="2x2 patches folded into one, MLP of 2 layers",
    llm="InternLM2 20B",
    licence="MIT",
    source="OpenGVLab/InternVL-Chat-V1-5",
    read=original_config,
    config={"vision_config": INTERN_VIT_6B, "llm_config": INTERNLM2_20B, "ps_version": "v2"},
    stages={"align": ("encoder.*", "fusion.*"), "instruct": ("*",)},
    proof="logits equal transformers' on a random checkpoint, its LLaMA half renamed and packed as InternLM2",
)

# arXiv:2504.10479; Qwen2.5's head is kept apart from its table here
INTERN_VIT_300M = {"image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True}
QWEN2_HALF = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN2_HALF |= {"num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151_674, "rope_theta": 1e6}

INTERNVL_3 = Row(
    name="internvl3-1b-hf",
    family="InternVL3",
    encoder="InternViT-300M/14 448",
    fusion="2x2 patches folded into one, MLP of 2 layers",
    llm="Qwen2.5 0.5B",
    licence="MIT, Apache-2.0",
    source="OpenGVLab/InternVL3-1B-hf",
    read=config,
    config={"vision_config": INTERN_VIT_300M, "text_config": QWEN2_HALF, "image_token_id": 151_667},
    stages={"pretrain": ("*",), "instruct": ("*",)},
    proof=LOGITS,
)

ROWS = (INTERNVL_15, INTERNVL_3)
