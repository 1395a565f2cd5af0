"""Aria's projector (arXiv:2410.05993): settings and names."""

from ..fusion.pooling import SizedPoolConfig
from .backbones import Json
from .keymap import KeyMap, rule, stacked


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
