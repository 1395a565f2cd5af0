"""Published vision encoders on their own: settings from `config.json`, names of their tensors.

Defaults are those of the published configuration classes, which leave out of the file whatever equals them. Language
models are in `languages`; what a family of both needs of them can be had from here.
"""

from ..encoders.vit import ViTConfig
from .keymap import KeyMap, flat_patch, halves, leading, rule
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


ENCODERS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "dinov2", "dinov2_with_registers")
