"""Published language models on their own: settings from `config.json`; names of tensors are in `language_names`.

Defaults are those of the published configuration classes, which leave out of the file whatever equals them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..core.config import nearest
from ..core.errors import ConfigError
from ..language.decoder import DecoderConfig
from ..layers.attention import QKNorm
from ..layers.experts import ExpertsConfig
from ..layers.rotary import RopeScaling
from ..layers.scores import Scores
from .configs import Json, act, expect, rope
from .keymap import KeyMap
from .language_names import (
    aria_keys,
    decoder_keys,
    gpt_neox_keys,
    internlm2_keys,
    llama4_keys,
    magneto_keys,
    mixtral_keys,
    mosaic_keys,
    mpt_keys,
    opt_keys,
    persimmon_keys,
    qwen_keys,
)


def _decoder(c: Json, *, theta: float = 10_000.0, **defaults: Any) -> DecoderConfig:
    """Settings by the names that LLaMA gave them; `defaults` are a family's own, those without a name its settings."""

    def read(name: str, ours: str, fallback: Any = None) -> Any:
        value, default = c.get(name), defaults.pop(ours, fallback)
        return default if value is None else value

    heads, max_length = read("num_attention_heads", "heads"), read("max_position_embeddings", "max_length")
    activation = defaults.pop("activation", "silu")
    return DecoderConfig(
        vocab_size=read("vocab_size", "vocab_size"),
        width=read("hidden_size", "width"),
        depth=read("num_hidden_layers", "depth"),
        heads=heads,
        mlp=read("intermediate_size", "mlp"),
        kv_heads=read("num_key_value_heads", "kv_heads", heads),
        head_dim=read("head_dim", "head_dim"),
        activation=act(c.get("hidden_activation") or c.get("hidden_act") or activation),
        eps=read("rms_norm_eps", "eps", 1e-6),
        qkv_bias=read("attention_bias", "qkv_bias", False),
        out_bias=read("attention_bias", "out_bias", False),
        mlp_bias=read("mlp_bias", "mlp_bias", False),
        tied=read("tie_word_embeddings", "tied", False),
        max_length=max_length,
        **rope(c, max_length, theta),
        **defaults,
    )


def llama_config(c: Json) -> DecoderConfig:
    """LLaMA, Vicuna and Llama 3."""
    return _decoder(c, vocab_size=32_000, width=4096, depth=32, heads=32, mlp=11_008, max_length=2048)


def mistral_config(c: Json) -> DecoderConfig:
    """Mistral; early ones look back a window."""
    sizes = {"vocab_size": 32_000, "width": 4096, "depth": 32, "heads": 32, "mlp": 14_336, "kv_heads": 8}
    return _decoder(c, **sizes, max_length=131_072, scores=Scores(window=c.get("sliding_window", 4096)))


def mixtral_config(c: Json) -> DecoderConfig:
    """Mixtral: a softmax over the best experts, two of eight."""
    sizes = {"vocab_size": 32_000, "width": 4096, "depth": 32, "heads": 32, "mlp": 14_336, "kv_heads": 8}
    mlp = c.get("intermediate_size", 14_336)
    experts = ExpertsConfig(c.get("num_local_experts", 8), c.get("num_experts_per_tok", 2), mlp)
    scores = Scores(window=c.get("sliding_window"))
    return _decoder(c, theta=1e6, **sizes, eps=1e-5, max_length=131_072, scores=scores, experts=experts)


def qwen2_config(c: Json) -> DecoderConfig:
    """Qwen2 within its trained context (no sliding window)."""
    expect(c, use_sliding_window=False)
    sizes = {"vocab_size": 151_936, "width": 4096, "depth": 32, "heads": 32, "mlp": 22_016}
    plain = {key: value for key, value in c.items() if key != "attention_bias"}
    return _decoder(plain, **sizes, qkv_bias=True, max_length=32_768)


def qwen3_config(c: Json) -> DecoderConfig:
    """Qwen3 within its trained context: norms of queries and keys instead of biases."""
    expect(c, use_sliding_window=False)
    sizes = {"vocab_size": 151_936, "width": 4096, "depth": 32, "heads": 32, "mlp": 22_016, "kv_heads": 32}
    norm = QKNorm("rms", c.get("rms_norm_eps", 1e-6))
    return _decoder(c, **sizes, head_dim=128, qk_norm=norm, max_length=32_768)


def qwen_config(c: Json) -> DecoderConfig:
    """Qwen; beyond `seq_length` tokens its rotary base and its queries grow."""
    expect(c, no_bias=True, rotary_pct=1.0)
    length = c.get("seq_length", 2048)
    return DecoderConfig(
        vocab_size=c.get("vocab_size", 151_936),
        width=c.get("hidden_size", 4096),
        depth=c.get("num_hidden_layers", 32),
        heads=c.get("num_attention_heads", 32),
        head_dim=c.get("kv_channels", 128),
        mlp=c.get("intermediate_size", 22_016) // 2,
        eps=c.get("layer_norm_epsilon", 1e-6),
        rope_theta=c.get("rotary_emb_base", 10_000.0),
        rope_scaling=RopeScaling("ntk", original=length) if c.get("use_dynamic_ntk", True) else None,
        scores=Scores(logn=length if c.get("use_logn_attn", True) else None),
        qkv_bias=True,
        tied=c.get("tie_word_embeddings", False),
        max_length=c.get("max_position_embeddings", 8192),
    )


def internlm2_config(c: Json) -> DecoderConfig:
    """InternLM2: LLaMA with other names."""
    sizes = {"vocab_size": 103_168, "width": 4096, "depth": 32, "heads": 32, "mlp": 11_008, "max_length": 2048}
    bias = c.get("bias", True)
    return _decoder(c, **sizes, qkv_bias=bias, out_bias=bias)


def gemma_config(c: Json) -> DecoderConfig:
    """Gemma 1."""
    sizes = {"vocab_size": 256_000, "width": 3072, "depth": 28, "heads": 16, "mlp": 24_576, "kv_heads": 16}
    # the published file says "gelu", the code has always computed its tanh approximation
    plain = {key: value for key, value in c.items() if key not in ("hidden_act", "hidden_activation")}
    return _decoder(plain, **sizes, **GEMMA, max_length=8192)


def gemma2_config(c: Json) -> DecoderConfig:
    """Gemma 2; every other block, from the first on, looks back a window."""
    sizes = {"vocab_size": 256_000, "width": 2304, "depth": 26, "heads": 8, "mlp": 9216, "kv_heads": 4}
    depth = c.get("num_hidden_layers", 26)
    expect(c, layer_types=[("full" if layer % 2 else "sliding") + "_attention" for layer in range(depth)])
    expect(c, use_bidirectional_attention=False)
    scores = Scores(
        scale=c.get("query_pre_attn_scalar", 256) ** -0.5,
        softcap=c.get("attn_logit_softcapping", 50.0),
        window=c.get("sliding_window", 4096),
    )
    caps = {"scores": scores, "full_every": 2, "logit_softcap": c.get("final_logit_softcapping", 30.0)}
    return _decoder(c, **sizes, **GEMMA, **caps, norm_at="both", max_length=8192)


GEMMA: dict[str, Any] = {
    "head_dim": 256, "norm_offset": True, "scale_embedding": True, "tied": True, "activation": "gelu_pytorch_tanh"
}  # fmt: skip


def aria_config(c: Json) -> DecoderConfig:
    """The text half of Aria: fine experts, of which some are shared."""
    expect(c, hidden_act="silu", mlp_bias=False)
    sizes = {"vocab_size": 32_000, "width": 4096, "depth": 32, "heads": 32, "mlp": 4096}
    mlp = c.get("intermediate_size", 4096)
    experts = ExpertsConfig(
        c.get("moe_num_experts", 8), c.get("moe_topk", 2), mlp, shared=mlp * c.get("moe_num_shared_experts", 2)
    )
    return _decoder(c, **sizes, max_length=2048, experts=experts)


def llama4_config(c: Json) -> DecoderConfig:
    """The text half of Llama 4."""
    sizes = {"vocab_size": 202_048, "width": 5120, "depth": 48, "heads": 40, "kv_heads": 8, "head_dim": 128}
    mlp, depth = c.get("intermediate_size", 8192), c.get("num_hidden_layers", 48)
    every, full = c.get("interleave_moe_layer_step", 1), c.get("no_rope_layer_interval", 4)
    expect(c, moe_layers=list(range(every - 1, depth, every)))
    expect(
        c, no_rope_layers=[int((layer + 1) % full != 0) for layer in range(depth)] if c.get("no_rope_layers") else []
    )
    tuned = c.get("attn_temperature_tuning", True)
    scores = Scores(
        chunk=c.get("attention_chunk_size", 8192),
        temperature=(c.get("floor_scale", 8192), c.get("attn_scale", 0.1)) if tuned else None,
    )
    eps = c.get("rms_norm_eps", 1e-5)
    routed = c.get("num_local_experts", 16), c.get("num_experts_per_tok", 1), mlp
    return _decoder(
        {**c, "intermediate_size": c.get("intermediate_size_mlp", 16_384)},
        theta=5e5,
        **sizes,
        eps=eps,
        max_length=131_072,
        experts=ExpertsConfig(*routed, shared=mlp, routing="sigmoid", every=every),
        scores=scores,
        full_every=full,
        full_positions=False,
        qk_norm=QKNorm("unit", eps, after_rotary=True) if c.get("use_qk_norm", True) else False,
    )


def chameleon_config(c: Json) -> DecoderConfig:
    """Chameleon; the largest norms what its branches add instead of what they read."""
    sizes = {"vocab_size": 65_536, "width": 4096, "depth": 32, "heads": 32, "mlp": 11_008, "max_length": 4096}
    norm_at = "after" if c.get("swin_norm") else "before"
    return _decoder(c, **sizes, eps=1e-5, qk_norm=QKNorm("layer", 1e-5, own=True), norm_at=norm_at)


def persimmon_config(c: Json) -> DecoderConfig:
    """Persimmon, Fuyu's text half."""
    width, heads, eps = c.get("hidden_size", 4096), c.get("num_attention_heads", 64), c.get("layer_norm_eps", 1e-5)
    length = c.get("max_position_embeddings", 16_384)
    return DecoderConfig(
        vocab_size=c.get("vocab_size", 262_144),
        width=width,
        depth=c.get("num_hidden_layers", 36),
        heads=heads,
        mlp=c.get("intermediate_size", 16_384),
        activation=act(c.get("hidden_act", "relu2")),
        eps=eps,
        qk_norm=QKNorm("layer", eps) if c.get("qk_layernorm", True) else False,
        tied=c.get("tie_word_embeddings", False),
        max_length=length,
        **rope(c, length, fraction=0.5),
        **PLAIN,
    )


# layer norms, and biases in every map
PLAIN: dict[str, Any] = {"norm": "layer", "gated": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True}


def opt_config(c: Json) -> DecoderConfig:
    """OPT, but for the 350 million one, whose embeddings are narrower and whose norms come last."""
    width = c.get("hidden_size", 768)
    expect(c, word_embed_proj_dim=width, do_layer_norm_before=True, _remove_final_layer_norm=False, enable_bias=True)
    return DecoderConfig(
        vocab_size=c.get("vocab_size", 50_272),
        width=width,
        depth=c.get("num_hidden_layers", 12),
        heads=c.get("num_attention_heads", 12),
        mlp=c.get("ffn_dim", 3072),
        activation=act(c.get("activation_function", "relu")),
        eps=1e-5,
        positions="learned",
        position_offset=2,
        tied=c.get("tie_word_embeddings", True),
        max_length=c.get("max_position_embeddings", 2048),
        **PLAIN,
    )


def magneto_config(c: Json) -> DecoderConfig:
    """The text half of Kosmos-2; positions begin after that of padding."""
    return DecoderConfig(
        vocab_size=c.get("vocab_size", 65_037),
        width=c.get("embed_dim", 2048),
        depth=c.get("layers", 24),
        heads=c.get("attention_heads", 32),
        mlp=c.get("ffn_dim", 8192),
        activation=act(c.get("activation_function", "gelu")),
        eps=c.get("layer_norm_eps", 1e-5),
        inner_norm=True,
        positions="sinusoidal",
        position_offset=c.get("pad_token_id", 1) + 1,
        scale_inputs=c.get("scale_embedding", True),
        tied=c.get("tie_word_embeddings", True),
        max_length=c.get("max_position_embeddings", 2048),
        **PLAIN,
    )


def mpt_config(c: Json) -> DecoderConfig:
    """MPT with ALiBi."""
    attention = c.get("attn_config") or {}
    expect(c, no_bias=True)
    expect(attention, alibi=True, alibi_bias_max=8, qk_ln=False, prefix_lm=False, attn_type="multihead_attention")
    expect(attention, clip_qkv=0)
    width = c.get("d_model", 2048)
    return DecoderConfig(
        vocab_size=c.get("vocab_size", 50_368),
        width=width,
        depth=c.get("n_layers", 24),
        heads=c.get("n_heads", 16),
        mlp=c.get("expansion_ratio", 4) * width,
        activation="gelu",
        gated=False,
        norm="layer",
        norm_bias=False,
        eps=c.get("layer_norm_epsilon", 1e-5),
        positions="none",
        scores=Scores(alibi=True, scale=attention.get("softmax_scale")),
        tied=c.get("tie_word_embeddings", True),
        max_length=c.get("max_seq_len", 2048),
    )


def mosaic_config(c: Json) -> DecoderConfig:
    """MosaicGPT, MPT's first form, as OpenFlamingo-3B uses it: queries and keys are normed across their heads."""
    expect(c, no_bias=True, alibi=True, alibi_bias_max=8, prefix_lm=False, attn_clip_qkv=0, logit_scale=0)
    attention = {"softmax_scale": c.get("softmax_scale")}
    sizes = {"n_layers": c["n_layers"], "n_heads": c["n_heads"], "expansion_ratio": c.get("mlp_ratio", 4)}
    plain = mpt_config({**c, **sizes, "attn_config": attention, "tie_word_embeddings": True})
    return replace(plain, qk_norm=QKNorm("layer", plain.eps, across=True) if c.get("attn_qk_ln") else False)


def gpt_neox_config(c: Json) -> DecoderConfig:
    """GPT-NeoX whose branches follow each other (RedPajama); those of Pythia, side by side, are refused."""
    expect({"use_parallel_residual": True, **c}, use_parallel_residual=False, attention_bias=True)
    length = c.get("max_position_embeddings", 2048)
    fractions = {"partial_rotary_factor": c["rotary_pct"]} if "rotary_pct" in c else {}
    return DecoderConfig(
        vocab_size=c.get("vocab_size", 50_432),
        width=c.get("hidden_size", 6144),
        depth=c.get("num_hidden_layers", 44),
        heads=c.get("num_attention_heads", 64),
        mlp=c.get("intermediate_size", 24_576),
        activation=act(c.get("hidden_act", "gelu")),
        eps=c.get("layer_norm_eps", 1e-5),
        tied=c.get("tie_word_embeddings", False),
        max_length=length,
        **rope({**fractions, **c}, length, c.get("rotary_emb_base", 10_000.0), fraction=0.25),
        **PLAIN,
    )


# -------------------------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Language:
    """How one family's configuration becomes settings, and the map of its names."""

    config: Callable[[Json], DecoderConfig]
    keys: Callable[[DecoderConfig], KeyMap] = decoder_keys


LANGUAGES: dict[str, Language] = {
    "llama": Language(llama_config),
    "mistral": Language(mistral_config),
    "mixtral": Language(mixtral_config, mixtral_keys),
    "qwen2": Language(qwen2_config),
    "qwen3": Language(qwen3_config),
    "qwen": Language(qwen_config, qwen_keys),
    "internlm2": Language(internlm2_config, internlm2_keys),
    "gemma": Language(gemma_config),
    "gemma2": Language(gemma2_config),
    "aria_text": Language(aria_config, aria_keys),
    "llama4_text": Language(llama4_config, llama4_keys),
    "chameleon": Language(chameleon_config),
    "persimmon": Language(persimmon_config, persimmon_keys),
    "opt": Language(opt_config, opt_keys),
    "kosmos_2_text_model": Language(magneto_config, magneto_keys),
    "mpt": Language(mpt_config, mpt_keys),
    "mosaic_gpt": Language(mosaic_config, mosaic_keys),
    "gpt_neox": Language(gpt_neox_config, gpt_neox_keys),
}


def language(c: Json) -> Language:
    """A family by its `model_type`; ConfigError tells the nearest known one."""
    kind = c.get("model_type", "llama")
    if kind not in LANGUAGES:
        raise ConfigError(f"language model of type {kind!r}{nearest(str(kind), LANGUAGES)}")
    return LANGUAGES[kind]


def language_config(c: Json) -> DecoderConfig:
    """Settings of a language model by its `model_type`."""
    return language(c).config(c)
