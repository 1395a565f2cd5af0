"""Kosmos-2's pool of latents (arXiv:2306.14824): settings and names."""

from ..fusion.pooling import LatentPoolConfig
from .backbones import Json
from .keymap import KeyMap, rule


def pool_config(c: Json) -> LatentPoolConfig:
    """From its `config.json`."""
    text = c.get("text_config") or {}
    return LatentPoolConfig(
        inputs=(c.get("vision_config") or {}).get("hidden_size", 1024),
        width=text.get("embed_dim", 2048),
        heads=text.get("attention_heads", 32),
        queries=c.get("latent_query_num", 64),
    )


def pool_keys() -> KeyMap:
    """The published names."""
    theirs = "image_to_text_projection."
    return KeyMap(
        (
            rule(f"{theirs}latent_query", "queries"),
            rule(f"{theirs}dense.{{p}}", "project.{p}"),
            *(rule(f"{theirs}x_attn.{x}_proj.{{p}}", f"attention.{x}.{{p}}") for x in "qkv"),
            rule(f"{theirs}x_attn.out_proj.{{p}}", "attention.o.{p}"),
        )
    )
