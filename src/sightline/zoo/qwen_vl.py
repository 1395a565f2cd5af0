"""Qwen-VL's resampler (arXiv:2308.12966): settings and names."""

from ..fusion.pooling import PositionPoolConfig
from .backbones import Json
from .keymap import KeyMap, flipped, rule, stacked


def pool_config(c: Json) -> PositionPoolConfig:
    """From the `visual` part of its `config.json`; a head has 128 numbers, queries fill a square."""
    visual = c["visual"]
    width, queries = int(visual["output_dim"]), int(visual.get("n_queries", 256))
    return PositionPoolConfig(inputs=visual["width"], width=width, heads=max(width // 128, 1), side=round(queries**0.5))


def pool_keys() -> KeyMap:
    """The published names, below `transformer.visual.`."""
    pool, inner = "attn_pool.", [f"attention.{x}." for x in "qkv"]
    return KeyMap(
        (
            rule(f"{pool}query", "queries"),
            rule(f"{pool}pos_embed", "positions"),
            rule(f"{pool}kv_proj.{{p}}", "project.{p}"),
            rule(f"{pool}ln_q.{{p}}", "norm_queries.{p}"),
            rule(f"{pool}ln_kv.{{p}}", "norm_features.{p}"),
            *(
                rule(f"{pool}attn.in_proj_{p}", *(f"{name}{p}" for name in inner), reshape=stacked(3))
                for p in ("weight", "bias")
            ),
            rule(f"{pool}attn.out_proj.{{p}}", "attention.o.{p}"),
            rule("ln_post.{p}", "norm.{p}"),
            rule("proj", "out.weight", reshape=flipped()),
        )
    )
