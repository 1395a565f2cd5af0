"""Published language models on their own: settings from `config.json`, names of their tensors.

Defaults are those of the published configuration classes, which leave out of the file whatever equals them.
"""

from collections.abc import Mapping
from typing import Any

from ..core.config import nearest
from ..core.errors import ConfigError
from ..language.decoder import DecoderConfig
from .keymap import KeyMap, rule

Json = Mapping[str, Any]

ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}


def act(name: str) -> str:
    """Our name of a published activation."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rope_theta(c: Json) -> float:
    """The rotary base; scaled variants are refused rather than silently ignored."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"rotary positions of kind {kind!r}, expected 'default'")
    return float(rope.get("rope_theta") or c.get("rope_theta") or 10_000.0)


def _decoder(c: Json, **defaults: Any) -> DecoderConfig:
    """Settings that all three families name alike."""

    def read(name: str, fallback: Any) -> Any:
        value = c.get(name)
        return fallback if value is None else value

    heads = read("num_attention_heads", defaults["heads"])
    return DecoderConfig(
        vocab_size=read("vocab_size", defaults["vocab_size"]),
        width=read("hidden_size", defaults["width"]),
        depth=read("num_hidden_layers", defaults["depth"]),
        heads=heads,
        mlp=read("intermediate_size", defaults["mlp"]),
        kv_heads=read("num_key_value_heads", defaults.get("kv_heads") or heads),
        head_dim=read("head_dim", defaults.get("head_dim")),
        activation=act(read("hidden_activation", read("hidden_act", defaults["activation"]))),
        eps=read("rms_norm_eps", 1e-6),
        norm_offset=defaults.get("norm_offset", False),
        rope_theta=rope_theta(c),
        qkv_bias=read("attention_bias", defaults.get("qkv_bias", False)),
        out_bias=read("attention_bias", False),
        tied=read("tie_word_embeddings", defaults["tied"]),
        scale_embedding=defaults.get("scale_embedding", False),
        max_length=read("max_position_embeddings", defaults["max_length"]),
    )


def llama_config(c: Json) -> DecoderConfig:
    """LLaMA and Vicuna."""
    if c.get("mlp_bias"):
        raise ConfigError("mlp_bias is true, expected a LLaMA without biases in its feed-forward")
    sizes = {"vocab_size": 32_000, "width": 4096, "depth": 32, "heads": 32, "mlp": 11_008}
    return _decoder(c, **sizes, activation="silu", tied=False, max_length=2048)


def qwen2_config(c: Json) -> DecoderConfig:
    """Qwen2 within its trained context (no sliding window)."""
    if c.get("use_sliding_window"):
        raise ConfigError("use_sliding_window is true, expected full attention")
    sizes = {"vocab_size": 151_936, "width": 4096, "depth": 32, "heads": 32, "mlp": 22_016}
    plain = {key: value for key, value in c.items() if key != "attention_bias"}
    return _decoder(plain, **sizes, activation="silu", tied=False, qkv_bias=True, max_length=32_768)


def gemma_config(c: Json) -> DecoderConfig:
    """Gemma 1."""
    sizes = {"vocab_size": 256_000, "width": 3072, "depth": 28, "heads": 16, "mlp": 24_576, "kv_heads": 16}
    gemma = {"head_dim": 256, "norm_offset": True, "scale_embedding": True, "tied": True}
    # the published file says "gelu", the code has always computed its tanh approximation
    plain = {key: value for key, value in c.items() if key not in ("hidden_act", "hidden_activation")}
    return _decoder(plain, **sizes, **gemma, activation="gelu_pytorch_tanh", max_length=8192)


def decoder_keys(cfg: DecoderConfig, root: str = "model.", head: str = "lm_head.") -> KeyMap:
    """LLaMA, Qwen2 and Gemma share their names."""
    layer, block = f"{root}layers.{{i}}.", "blocks.{i}."
    untied = () if cfg.tied else (rule(f"{head}weight", "head.weight"),)
    return KeyMap(
        (
            rule(f"{root}embed_tokens.weight", "embedding.weight"),
            *(rule(f"{layer}self_attn.{x}_proj.{{p}}", f"{block}attention.{x}.{{p}}") for x in "qkvo"),
            *(rule(f"{layer}mlp.{x}_proj.{{p}}", f"{block}feedforward.{x}.{{p}}") for x in ("gate", "up", "down")),
            rule(f"{layer}input_layernorm.{{p}}", f"{block}norm1.{{p}}"),
            rule(f"{layer}post_attention_layernorm.{{p}}", f"{block}norm2.{{p}}"),
            rule(f"{root}norm.{{p}}", "norm.{p}"),
            *untied,
        ),
        ignore=(f"{layer}self_attn.rotary_emb.inv_freq", *((f"{head}weight",) if cfg.tied else ())),
    )


LANGUAGES = {"llama": llama_config, "qwen2": qwen2_config, "gemma": gemma_config}


def language_config(c: Json) -> DecoderConfig:
    """Settings of a language model by its `model_type`."""
    kind = c.get("model_type", "llama")
    if kind not in LANGUAGES:
        raise ConfigError(f"language model of type {kind!r}{nearest(str(kind), LANGUAGES)}")
    return LANGUAGES[kind](c)
