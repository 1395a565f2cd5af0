"""Aria (arXiv:2410.05993): SigLIP with bucketed positions, a pool that has more queries for more patches, experts.

Its files are laid out as llava-hf's, but for `vision_model.`, which is left out.
"""

from dataclasses import replace

from ..fusion.pooling import SizedPoolConfig
from ..model import VLM, VLMConfig
from . import llava
from .backbones import Json, language_config, siglip_config, siglip_keys
from .checkpoint import read_tensors
from .family import LOGITS, Family, Row
from .keymap import KeyMap, rule, stacked
from .language_names import aria_keys
from .languages import expect

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
        siglip_keys(cfg.image).under("vision_tower.", "encoder.")
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
    inner = [f"attention.{x}." for x in "qkv"]
    return KeyMap(
        (
            rule("query", "queries"),
            rule("cross_attn.layer_norm.{p}", "norm_queries.{p}"),
            rule("cross_attn.layer_norm_kv.{p}", "norm_features.{p}"),
            *(rule(f"cross_attn.{x}_proj.{{p}}", f"{x}.{{p}}") for x in "qkv"),
            *(
                rule(f"cross_attn.multihead_attn.in_proj_{p}", *(f"{name}{p}" for name in inner), reshape=stacked(3))
                for p in ("weight", "bias")
            ),
            rule("cross_attn.multihead_attn.out_proj.{p}", "attention.o.{p}"),
            rule("cross_attn.linear.{p}", "mix.{p}"),
            rule("layer_norm.{p}", "norm.{p}"),
            rule("feed_forward.linear_in.{p}", "up.{p}"),
            rule("feed_forward.linear_out.{p}", "down.{p}"),
        )
    )


FAMILIES = {
    "aria": Family(
        lambda c, f: VLM(config(c)), keys, lambda c, f: llava.bare_tower(read_tensors(f)), modules=llava.module_name
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
    proof=LOGITS,
)

ROWS = (ARIA,)
