"""Kosmos-2 (arXiv:2306.14824): CLIP, a pool of latents, a Magneto that scales pictures' tokens like its words.

A mask tells which tokens are replaced by a picture's; the ids there are ids of words.
"""

from ..fusion.pooling import LatentPoolConfig
from ..model import VLMConfig
from .backbones import Json, clip_keys, kosmos2_vision_config, language_config
from .keymap import KeyMap, rule
from .language_names import magneto_keys


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`."""
    text = {**(c.get("text_config") or {}), "model_type": "kosmos_2_text_model"}
    return VLMConfig(kosmos2_vision_config(c.get("vision_config") or {}), pool_config(c), language_config(text))


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names."""
    return (
        clip_keys(cfg.image).under("vision_model.model.", "encoder.")
        + pool_keys().under("", "fusion.")
        + magneto_keys(cfg.decoder).under("text_model.", "decoder.")
    )


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
