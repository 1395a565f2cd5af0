"""Kosmos-2 (arXiv:2306.14824): CLIP, a pool of latents, a Magneto that scales pictures' tokens like its words.

A mask tells which tokens are replaced by a picture's; the ids there are ids of words.
"""

import torch
from torch import Tensor

from ..core.sequence import Conversation, Text
from ..data.batch import Batch
from ..data.processor import tagged
from ..data.template import End, Segment, Writer, spoken
from ..fusion.pooling import LatentPoolConfig
from ..model import VLM, VLMConfig
from .backbones import kosmos2_vision_config
from .configs import Json
from .encoder_names import clip_keys
from .family import Family, Habits, Row, stretched
from .inputs import checked, cut, filled
from .keymap import KeyMap, rule
from .language_names import magneto_keys
from .languages import language_config
from .llava import clip_l


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`."""
    text = {**(c.get("text_config") or {}), "model_type": "kosmos_2_text_model"}
    return VLMConfig(kosmos2_vision_config(c.get("vision_config") or {}), pool_config(c), language_config(text))


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names."""
    return (
        clip_keys(cfg.vit).under("vision_model.model.", "encoder.")
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


def inputs(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_embeds_position_mask: Tensor | None = None,
) -> Batch:
    """Pictures [n, 3, height, width]; the mask [batch, length] is 1 where a token is a picture's."""
    ids = checked(input_ids, attention_mask=attention_mask, image_embeds_position_mask=image_embeds_position_mask)
    slots = torch.zeros_like(ids) if image_embeds_position_mask is None else image_embeds_position_mask
    patches = None if pixel_values is None else cut(model, pixel_values)
    told = "image tokens in image_embeds_position_mask"
    return filled(model, ids, slots.bool(), patches, attention_mask, told=told)


def template(conversation: Conversation) -> list[Segment]:
    """`<s>`, the picture, `<grounding>`, then the words, which the model goes on with and names places in.

    It was not taught to talk: a question is asked as "Question: ... Answer:" (microsoft/unilm, kosmos-2).
    """
    out = Writer()
    out.control("<s>")
    for message in spoken(conversation):
        if message.role == "user":
            words = out.shown(message)
            out.control("<grounding>")
            out.parts(words, before=" " if words.parts and isinstance(words.parts[0], Text) else "")
        else:
            out.parts(message, learned=True, before=" ")
            out.segments.append(End("</s>"))
    return out.segments


FAMILIES = {
    "kosmos-2": Family(
        lambda c, f: VLM(config(c)),
        keys,
        inputs=inputs,
        habits=Habits(template, "<image>", "kosmos-2", pixels=stretched, expand=tagged("<image>", "</image>")),
    )
}

KOSMOS_2 = Row(
    name="kosmos-2-patch14-224",
    family="Kosmos-2",
    encoder="CLIP ViT-L/14 224",
    fusion="pool of 64 latents",
    llm="Magneto 1.3B",
    licence="MIT",
    source="microsoft/kosmos-2-patch14-224",
    read=config,
    config={"latent_query_num": 64, "vision_config": clip_l(224), "text_config": {"embed_dim": 2048, "layers": 24}},
    stages={"pretrain": ("encoder.blocks.23.*", "fusion.*", "decoder.*")},
)

ROWS = (KOSMOS_2,)
