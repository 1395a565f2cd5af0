"""Published vision encoders on their own: settings from `config.json`; names of tensors are in `encoder_names`.

Defaults are those of the published configuration classes, which leave out of the file whatever equals them.
"""

from dataclasses import replace
from typing import Any

from ..core.errors import ConfigError
from ..encoders.audio import AudioConfig
from ..encoders.vit import ViTConfig
from .configs import Json, act


def clip_config(c: Json, layer: int = -1, normed: bool = False) -> ViTConfig:
    """CLIP's vision tower; its final norm is applied to the pooled token only, so features are not normed."""
    return ViTConfig(
        image_size=c.get("image_size", 224),
        patch_size=c.get("patch_size", 32),
        width=c.get("hidden_size", 768),
        depth=c.get("num_hidden_layers", 12),
        heads=c.get("num_attention_heads", 12),
        mlp=c.get("intermediate_size", 3072),
        activation=act(c.get("hidden_act", "quick_gelu")),
        eps=c.get("layer_norm_eps", 1e-5),
        patch_bias=False,
        class_token=True,
        pre_norm=True,
        layer=layer,
        normed=normed,
    )


def siglip_config(c: Json, layer: int = -1) -> ViTConfig:
    """SigLIP's vision tower; what is taken after the last block has been through the final norm."""
    return ViTConfig(
        image_size=c.get("image_size", 224),
        patch_size=c.get("patch_size", 16),
        width=c.get("hidden_size", 768),
        depth=c.get("num_hidden_layers", 12),
        heads=c.get("num_attention_heads", 12),
        mlp=c.get("intermediate_size", 3072),
        activation=act(c.get("hidden_act", "gelu_pytorch_tanh")),
        eps=c.get("layer_norm_eps", 1e-6),
        layer=layer,
        normed=layer == -1,
    )


def dinov2_config(c: Json) -> ViTConfig:
    """DINOv2, with registers where the configuration names some; the giant's feed-forward is gated."""
    width = c.get("hidden_size", 768)
    mlp = int(width * c.get("mlp_ratio", 4))
    gated = bool(c.get("use_swiglu_ffn", False))
    return ViTConfig(
        image_size=c.get("image_size", 224),
        patch_size=c.get("patch_size", 14 if "num_register_tokens" not in c else 16),
        width=width,
        depth=c.get("num_hidden_layers", 12),
        heads=c.get("num_attention_heads", 12),
        mlp=(int(mlp * 2 / 3) + 7) // 8 * 8 if gated else mlp,
        activation="silu" if gated else act(c.get("hidden_act", "gelu")),
        gated=gated,
        eps=c.get("layer_norm_eps", 1e-6),
        class_token=True,
        registers=c.get("num_register_tokens", 0),
        antialias="num_register_tokens" in c,
        layer_scale=True,
    )


def kosmos2_vision_config(c: Json) -> ViTConfig:
    """CLIP as Kosmos-2 uses it: all tokens are normed and scaled to length one, the class token among them."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    tower = clip_config({**sizes, "patch_size": 14, **c}, normed=True)
    return replace(tower, l2_norm=True, keep_prefix=True)


def idefics_vision_config(c: Json) -> ViTConfig:
    """OpenCLIP's ViT-H/14 as IDEFICS uses it: its exact GELU, the class token kept, no final norm."""
    sizes = {"intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14}
    width = c.get("embed_dim", c.get("hidden_size", 768))
    return replace(clip_config({"hidden_act": "gelu", **sizes, **c, "hidden_size": width}), keep_prefix=True)


def internvl_vision_config(c: Json, layer: int = -1) -> ViTConfig:
    """InternViT by the configuration of transformers; a class token that is dropped, no norm after the last block."""
    if not c.get("use_mean_pooling", True) or not c.get("use_absolute_position_embeddings", True):
        raise ConfigError("use_mean_pooling or use_absolute_position_embeddings is false, expected both true")
    norms = {"layer_norm": "layer", "rms_norm": "rms"}
    if (norm := c.get("norm_type", "layer_norm")) not in norms:
        raise ConfigError(f"norm_type {norm!r}, expected one of {', '.join(norms)}")
    return ViTConfig(
        image_size=_side(c.get("image_size", 448)),
        patch_size=_side(c.get("patch_size", 14)),
        width=c.get("hidden_size", 1024),
        depth=c.get("num_hidden_layers", 24),
        heads=c.get("num_attention_heads", 16),
        mlp=c.get("intermediate_size", 4096),
        channels=c.get("num_channels", 3),
        activation=act(c.get("hidden_act", "gelu")),
        norm=norms[norm],  # type: ignore[arg-type]
        eps=c.get("layer_norm_eps", 1e-6),
        qkv_bias=c.get("attention_bias", False),
        qk_norm="width" if c.get("use_qk_norm", False) else None,
        class_token=True,
        final_norm=False,
        layer_scale=True,
        layer=layer,
    )


def intern_vit_config(c: Json, layer: int = -1) -> ViTConfig:
    """InternViT by its original configuration, whose defaults are the 6B's before its last three blocks were cut."""
    sizes = {"hidden_size": 3200, "intermediate_size": 12_800, "num_hidden_layers": 48, "num_attention_heads": 25}
    renamed = {"attention_bias": c.get("qkv_bias", False), "use_qk_norm": c.get("qk_normalization", True)}
    return internvl_vision_config({"image_size": 224, "norm_type": "rms_norm", **sizes, **c, **renamed}, layer)


def eva_clip_config(c: Json) -> ViTConfig:
    """EVA-CLIP g as BLIP-2 and InstructBLIP use it: the class token is kept, the final norm applied to all tokens."""
    return ViTConfig(
        image_size=_side(c.get("image_size", 224)),
        patch_size=_side(c.get("patch_size", 14)),
        width=c.get("hidden_size", 1408),
        depth=c.get("num_hidden_layers", 39),
        heads=c.get("num_attention_heads", 16),
        mlp=c.get("intermediate_size", 6144),
        activation=act(c.get("hidden_act", "gelu")),
        eps=c.get("layer_norm_eps", 1e-6),
        qkv_bias=c.get("qkv_bias", True),
        class_token=True,
        keep_prefix=True,
    )


def vit_bigg_config(c: Json) -> ViTConfig:
    """OpenCLIP's ViT-bigG by the `visual` part of Qwen-VL's configuration; its table of positions is always 16x16."""
    return ViTConfig(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        width=c["width"],
        depth=c["layers"],
        heads=c["heads"],
        mlp=int(c["width"] * c["mlp_ratio"]),
        patch_bias=False,
        pre_norm=True,
        final_norm=False,
        position_grid=16,
    )


def eva2_clip_config(c: Json) -> ViTConfig:
    """EVA2-CLIP E by the `vision_config` of CogVLM: branches are normed after they are computed, no final norm."""
    return ViTConfig(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_heads"],
        mlp=c["intermediate_size"],
        channels=c.get("in_channels", 3),
        activation=act(c.get("hidden_act", "gelu")),
        eps=c["layer_norm_eps"],
        residual="res-post-norm",
        class_token=True,
        final_norm=False,
    )


def llama4_vision_config(c: Json) -> ViTConfig:
    """Llama-4's encoder without its adapter; its class token is the last one there and the first one here."""
    rope = c.get("rope_parameters") or {}
    return ViTConfig(
        image_size=_side(c.get("image_size", 448)),
        patch_size=_side(c.get("patch_size", 14)),
        width=c.get("hidden_size", 768),
        depth=c.get("num_hidden_layers", 34),
        heads=c.get("num_attention_heads", 16),
        mlp=c.get("intermediate_size", 5632),
        channels=c.get("num_channels", 3),
        eps=1e-5,
        patch_bias=False,
        class_token=True,
        pre_norm=True,
        rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10_000.0),
    )


def vit_22b_config(image_size: int = 224) -> ViTConfig:
    """ViT-22B, PaLI-X's encoder, from its paper: no weights were published.

    Its norms have neither biases nor centring, which is what RMS norms are (arXiv:2302.05442, section 2).
    """
    return ViTConfig(
        image_size=image_size,
        patch_size=14,
        width=6144,
        depth=48,
        heads=48,
        mlp=24_576,
        norm="rms",
        residual="parallel",
        qkv_bias=False,
        qk_norm="head",
    )


def whisper_config(c: Json) -> AudioConfig:
    """The encoder of Whisper."""
    return AudioConfig(
        width=c.get("d_model", 384),
        depth=c.get("encoder_layers", 4),
        heads=c.get("encoder_attention_heads", 6),
        mlp=c.get("encoder_ffn_dim", 1536),
        bins=c.get("num_mel_bins", 80),
        activation=act(c.get("activation_function", "gelu")),
        positions=c.get("max_source_positions", 1500),
    )


def _side(size: Any) -> int:
    """One side of a square that is published as a number or as two equal ones."""
    sides = size if isinstance(size, (list, tuple)) else [size]
    if len(set(sides)) != 1:
        raise ConfigError(f"a size of {size!r}, expected a square")
    return int(sides[0])
