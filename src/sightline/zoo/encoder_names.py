"""Names of tensors of vision and sound encoders in their published files; their settings are in `backbones`."""

from ..encoders.audio import AudioConfig
from ..encoders.vit import ViTConfig
from .keymap import KeyMap, Rule, by_head, flat_patch, half_apart, halves, last_first, leading, rule, stacked

QKV = tuple(f"blocks.{{i}}.attention.{x}.{{p}}" for x in "qkv")


def _block(layer: str, *theirs: str) -> tuple[Rule, ...]:
    """Names of what every block has besides queries, keys and values: output, two norms, up, down."""
    ours = ("attention.o", "norm1", "norm2", "feedforward.up", "feedforward.down")
    return tuple(rule(f"{layer}{t}.{{p}}", f"blocks.{{i}}.{o}.{{p}}") for t, o in zip(theirs, ours, strict=True))


def _patch(cfg: ViTConfig, theirs: str) -> tuple[Rule, ...]:
    """Names of a patch embedding with a bias."""
    weight = rule(f"{theirs}.weight", "patch.weight", reshape=flat_patch(cfg.channels, cfg.patch_size))
    return weight, rule(f"{theirs}.bias", "patch.bias")


def _tower(cfg: ViTConfig) -> KeyMap:
    """Names that CLIP and SigLIP share, below `vision_model.`."""
    layer, block = "encoder.layers.{i}.", "blocks.{i}."
    return KeyMap(
        (
            rule("embeddings.patch_embedding.weight", "patch.weight", reshape=flat_patch(cfg.channels, cfg.patch_size)),
            rule("embeddings.position_embedding.weight", "positions"),
            *(rule(f"{layer}self_attn.{x}_proj.{{p}}", f"{block}attention.{x}.{{p}}") for x in "qkv"),
            *_block(layer, "self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
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
    rest = _block(layer, "attention.output.dense", "norm1", "norm2", "mlp.fc1", "mlp.fc2")
    if cfg.gated:  # the gate and the way up are one map there
        both = (f"{block}feedforward.{x}.{{p}}" for x in ("gate", "up"))
        down = rule(f"{layer}mlp.weights_out.{{p}}", f"{block}feedforward.down.{{p}}")
        rest = (*rest[:3], rule(f"{layer}mlp.weights_in.{{p}}", *both, reshape=halves()), down)
    registers = (rule("embeddings.register_tokens", "registers", reshape=leading(1)),) if cfg.registers else ()
    return KeyMap(
        (
            rule("embeddings.cls_token", "class_token", reshape=leading(2)),
            rule("embeddings.position_embeddings", "positions", reshape=leading(1)),
            *_patch(cfg, "embeddings.patch_embeddings.projection"),
            *registers,
            *(rule(f"{layer}attention.attention.{t}.{{p}}", f"{block}attention.{o}.{{p}}") for t, o in names),
            *rest,
            *(rule(f"{layer}layer_scale{k}.lambda1", f"{block}scale{k}") for k in (1, 2)),
            rule("layernorm.{p}", "norm.{p}"),
        ),
        ignore=("embeddings.mask_token",),
    )


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
