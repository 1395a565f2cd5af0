"""Published vision encoders on their own: settings from `config.json`, names of their tensors.

Defaults are those of the published configuration classes, which leave out of the file whatever equals them. Language
models are in `languages`; what a family of both needs of them can be had from here.
"""

from dataclasses import replace
from typing import Any

from ..core.errors import ConfigError
from ..encoders.audio import AudioConfig
from ..encoders.vit import ViTConfig
from .keymap import KeyMap, Rule, by_head, flat_patch, half_apart, halves, last_first, leading, rule, stacked
from .language_names import decoder_keys
from .languages import LANGUAGES, Json, act, gemma_config, language_config

__all__ = ["LANGUAGES", "Json", "act", "decoder_keys", "gemma_config", "language_config"]  # and what is defined here


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


def _tower(cfg: ViTConfig) -> KeyMap:
    """Names that CLIP and SigLIP share, below `vision_model.`."""
    layer, block = "encoder.layers.{i}.", "blocks.{i}."
    return KeyMap(
        (
            rule("embeddings.patch_embedding.weight", "patch.weight", reshape=flat_patch(cfg.channels, cfg.patch_size)),
            rule("embeddings.position_embedding.weight", "positions"),
            *(rule(f"{layer}self_attn.{x}_proj.{{p}}", f"{block}attention.{x}.{{p}}") for x in "qkv"),
            rule(f"{layer}self_attn.out_proj.{{p}}", f"{block}attention.o.{{p}}"),
            rule(f"{layer}layer_norm1.{{p}}", f"{block}norm1.{{p}}"),
            rule(f"{layer}layer_norm2.{{p}}", f"{block}norm2.{{p}}"),
            rule(f"{layer}mlp.fc1.{{p}}", f"{block}feedforward.up.{{p}}"),
            rule(f"{layer}mlp.fc2.{{p}}", f"{block}feedforward.down.{{p}}"),
            rule("post_layernorm.{p}", "norm.{p}"),
        ),
        ignore=("embeddings.position_ids",),
    )


def clip_keys(cfg: ViTConfig) -> KeyMap:
    """Below `vision_model.`."""
    return _tower(cfg) + KeyMap(
        (rule("embeddings.class_embedding", "class_token"), rule("pre_layrnorm.{p}", "pre_norm.{p}"))
    )


def siglip_keys(cfg: ViTConfig) -> KeyMap:
    """Below `vision_model.`; the attention-pooling head, which no vision-language model uses, is left out."""
    pooling = ("probe", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.{p}")
    rest = ("layernorm.{p}", "mlp.fc1.{p}", "mlp.fc2.{p}")
    head = KeyMap((rule("embeddings.patch_embedding.bias", "patch.bias"),), tuple(f"head.{x}" for x in pooling + rest))
    return _tower(cfg) + head


def dinov2_keys(cfg: ViTConfig) -> KeyMap:
    """At the root of the file."""
    layer, block = "encoder.layer.{i}.", "blocks.{i}."
    names = (("query", "q"), ("key", "k"), ("value", "v"))
    feedforward = (
        (
            rule(
                f"{layer}mlp.weights_in.{{p}}",
                f"{block}feedforward.gate.{{p}}",
                f"{block}feedforward.up.{{p}}",
                reshape=halves(),
            ),
            rule(f"{layer}mlp.weights_out.{{p}}", f"{block}feedforward.down.{{p}}"),
        )
        if cfg.gated
        else (
            rule(f"{layer}mlp.fc1.{{p}}", f"{block}feedforward.up.{{p}}"),
            rule(f"{layer}mlp.fc2.{{p}}", f"{block}feedforward.down.{{p}}"),
        )
    )
    registers = (rule("embeddings.register_tokens", "registers", reshape=leading(1)),) if cfg.registers else ()
    return KeyMap(
        (
            rule("embeddings.cls_token", "class_token", reshape=leading(2)),
            rule("embeddings.position_embeddings", "positions", reshape=leading(1)),
            rule(
                "embeddings.patch_embeddings.projection.weight",
                "patch.weight",
                reshape=flat_patch(cfg.channels, cfg.patch_size),
            ),
            rule("embeddings.patch_embeddings.projection.bias", "patch.bias"),
            *registers,
            *(rule(f"{layer}attention.attention.{t}.{{p}}", f"{block}attention.{o}.{{p}}") for t, o in names),
            rule(f"{layer}attention.output.dense.{{p}}", f"{block}attention.o.{{p}}"),
            rule(f"{layer}norm1.{{p}}", f"{block}norm1.{{p}}"),
            rule(f"{layer}norm2.{{p}}", f"{block}norm2.{{p}}"),
            rule(f"{layer}layer_scale1.lambda1", f"{block}scale1"),
            rule(f"{layer}layer_scale2.lambda1", f"{block}scale2"),
            *feedforward,
            rule("layernorm.{p}", "norm.{p}"),
        ),
        ignore=("embeddings.mask_token",),
    )


QKV = tuple(f"blocks.{{i}}.attention.{x}.{{p}}" for x in "qkv")


def _block(layer: str, *theirs: str) -> tuple[Rule, ...]:
    """Names of what every block has besides queries, keys and values: output, two norms, up, down."""
    ours = ("attention.o", "norm1", "norm2", "feedforward.up", "feedforward.down")
    return tuple(rule(f"{layer}{t}.{{p}}", f"blocks.{{i}}.{o}.{{p}}") for t, o in zip(theirs, ours, strict=True))


def _patch(cfg: ViTConfig, theirs: str) -> tuple[Rule, ...]:
    """Names of a patch embedding with a bias."""
    weight = rule(f"{theirs}.weight", "patch.weight", reshape=flat_patch(cfg.channels, cfg.patch_size))
    return weight, rule(f"{theirs}.bias", "patch.bias")


def internvl_vision_keys(cfg: ViTConfig) -> KeyMap:
    """InternViT's names in transformers, at the root of the file."""
    layer, block = "encoder.layer.{i}.", "blocks.{i}."
    return KeyMap(
        (
            rule("embeddings.cls_token", "class_token", reshape=leading(2)),
            rule("embeddings.position_embeddings", "positions", reshape=leading(1)),
            *_patch(cfg, "embeddings.patch_embeddings.projection"),
            *(rule(f"{layer}attention.{x}_proj.{{p}}", f"{block}attention.{x}.{{p}}") for x in "qkv"),
            *(rule(f"{layer}attention.{x}_norm.{{p}}", f"{block}attention.{x}_norm.{{p}}") for x in "qk"),
            *_block(layer, "attention.projection_layer", "layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2"),
            *(rule(f"{layer}lambda_{k}", f"{block}scale{k}") for k in (1, 2)),
        ),
        ignore=("embeddings.mask_token",),
    )


def intern_vit_keys(cfg: ViTConfig) -> KeyMap:
    """InternViT's original names, at the root of the encoder's own file, below `vision_model.` in InternVL's."""
    layer, block = "encoder.layers.{i}.", "blocks.{i}."
    return KeyMap(
        (
            rule("embeddings.class_embedding", "class_token", reshape=leading(2)),
            rule("embeddings.position_embedding", "positions", reshape=leading(1)),
            *_patch(cfg, "embeddings.patch_embedding"),
            rule(f"{layer}attn.qkv.{{p}}", *QKV, reshape=stacked(3)),
            *(rule(f"{layer}attn.{x}_norm.{{p}}", f"{block}attention.{x}_norm.{{p}}") for x in "qk"),
            *_block(layer, "attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2"),
            *(rule(f"{layer}ls{k}", f"{block}scale{k}") for k in (1, 2)),
        )
    )


def eva_clip_keys(cfg: ViTConfig) -> KeyMap:
    """At the root of the encoder's own file, below `vision_model.` in BLIP-2's; the keys' bias is there, as zeros."""
    layer = "encoder.layers.{i}."
    return KeyMap(
        (
            rule("embeddings.class_embedding", "class_token", reshape=leading(2)),
            rule("embeddings.position_embedding", "positions", reshape=leading(1)),
            *_patch(cfg, "embeddings.patch_embedding"),
            rule(f"{layer}self_attn.qkv.{{p}}", *QKV, reshape=stacked(3)),
            *_block(layer, "self_attn.projection", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
            rule("post_layernorm.{p}", "norm.{p}"),
        )
    )


def vit_bigg_keys(cfg: ViTConfig) -> KeyMap:
    """Below `transformer.visual.` of Qwen-VL, beside the resampler's names."""
    layer = "transformer.resblocks.{i}."
    return KeyMap(
        (
            rule("conv1.weight", "patch.weight", reshape=flat_patch(cfg.channels, cfg.patch_size)),
            rule("positional_embedding", "positions"),
            rule("ln_pre.{p}", "pre_norm.{p}"),
            rule(f"{layer}attn.in_proj.{{p}}", *QKV, reshape=by_head(cfg.heads, 3)),
            *_block(layer, "attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"),
        )
    )


def eva2_clip_keys(cfg: ViTConfig) -> KeyMap:
    """Below `model.vision.` of CogVLM, beside the adapter's names."""
    layer = "transformer.layers.{i}."
    norms = ("input_layernorm", "post_attention_layernorm")
    return KeyMap(
        (
            rule("patch_embedding.cls_embedding", "class_token", reshape=leading(1)),
            rule("patch_embedding.position_embedding.weight", "positions"),
            *_patch(cfg, "patch_embedding.proj"),
            rule(f"{layer}attention.query_key_value.{{p}}", *QKV, reshape=stacked(3)),
            *_block(layer, "attention.dense", *norms, "mlp.fc1", "mlp.fc2"),
        )
    )


def llama4_vision_keys(cfg: ViTConfig) -> KeyMap:
    """Below `vision_model.`, beside the adapter's names."""
    layer, block = "model.layers.{i}.", "blocks.{i}."
    norms = ("input_layernorm", "post_attention_layernorm")
    turned = half_apart(cfg.width // cfg.heads)
    return KeyMap(
        (
            rule("class_embedding", "class_token"),
            rule("positional_embedding_vlm", "positions", reshape=last_first()),
            rule("patch_embedding.linear.weight", "patch.weight"),
            rule("layernorm_pre.{p}", "pre_norm.{p}"),
            rule("layernorm_post.{p}", "norm.{p}"),
            *(rule(f"{layer}self_attn.{x}_proj.{{p}}", f"{block}attention.{x}.{{p}}", reshape=turned) for x in "qk"),
            rule(f"{layer}self_attn.v_proj.{{p}}", f"{block}attention.v.{{p}}"),
            *_block(layer, "self_attn.o_proj", *norms, "mlp.fc1", "mlp.fc2"),
        )
    )


def whisper_keys(cfg: AudioConfig) -> KeyMap:
    """Below `encoder.` or, in a file that writes text too, `model.encoder.`; the decoder is not read."""
    layer, block = "layers.{i}.", "blocks.{i}."
    norms = ("self_attn_layer_norm", "final_layer_norm")
    return KeyMap(
        (
            *(rule(f"conv{k}.{{p}}", f"conv{k}.{{p}}") for k in (1, 2)),
            rule("embed_positions.weight", "positions"),
            *(rule(f"{layer}self_attn.{x}_proj.{{p}}", f"{block}attention.{x}.{{p}}") for x in "qkv"),
            *_block(layer, "self_attn.out_proj", *norms, "fc1", "fc2"),
            rule("layer_norm.{p}", "norm.{p}"),
        )
    )
