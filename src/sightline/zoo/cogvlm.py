"""CogVLM (arXiv:2311.03079) and CogVLM2 (arXiv:2408.16500): EVA2-CLIP, a gated adapter, a decoder with a visual expert.

A picture stands right after the first token: a learned token, its patches, which share one position, another learned
token. CogVLM's folder has no tokenizer; `tokenizer.json` of Vicuna 7B v1.5 is the one that it is used with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.sequence import Conversation, Image, Message, Video, images_of
from ..data.batch import Batch
from ..data.template import End, Segment, Template, Writer, spoken
from ..fusion.glu import GLUConfig
from ..fusion.visual_expert import VisualExpertConfig
from ..language.decoder import DecoderConfig
from ..language.tokenizer import Tokenizer
from ..model import VLM, VLMConfig
from .backbones import eva2_clip_config
from .configs import Json, expect
from .encoder_names import eva2_clip_keys
from .family import Family, Habits, Row, Stages, llama, stretched_for_encoder
from .inputs import checked, cut, filled
from .keymap import KeyMap, Reshape, leading, rule
from .language_names import ends, renames
from .languages import llama_config


def newer(c: Json) -> bool:
    """Whether a configuration is CogVLM2's, the only one to name its heads of keys."""
    return "num_multi_query_heads" in c


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`; the rotary base of CogVLM2 is that of Llama 3, though its file does not say so."""
    expect(c, hidden_act="silu")
    text = {**c, "num_key_value_heads": c["num_multi_query_heads"], "rope_theta": 500_000.0} if newer(c) else c
    fusion = VisualExpertConfig(adapter_config(c), qkv_bias=newer(c))
    return VLMConfig(eva2_clip_config(c["vision_config"]), fusion, llama_config(text))


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names."""
    return (
        eva2_clip_keys(cfg.vit).under("model.vision.", "encoder.")
        + adapter_keys().under("model.vision.", "fusion.adapter.")
        + expert_keys(cfg.decoder).under("", "decoder.")
    )


def adapter_config(c: Json) -> GLUConfig:
    """From its `config.json`; the adapter is as wide inside as the decoder's feed-forward."""
    sizes = {"inputs": c["vision_config"]["hidden_size"], "width": c["hidden_size"], "hidden": c["intermediate_size"]}
    return GLUConfig(**sizes, stride=2 if newer(c) else 1)


def adapter_keys() -> KeyMap:
    """The published names, below `model.vision.`."""
    return KeyMap(
        (
            rule("boi", "begin", reshape=leading(2)),
            rule("eoi", "end", reshape=leading(2)),
            rule("conv.weight", "conv.weight", reshape=convolution()),
            rule("conv.bias", "conv.bias"),
            rule("linear_proj.linear_proj.{p}", "project.{p}"),
            rule("linear_proj.norm1.{p}", "norm.{p}"),
            rule("linear_proj.gate_proj.{p}", "feedforward.gate.{p}"),
            rule("linear_proj.dense_h_to_4h.{p}", "feedforward.up.{p}"),
            rule("linear_proj.dense_4h_to_h.{p}", "feedforward.down.{p}"),
        )
    )


def convolution() -> Reshape:
    """A convolution [width, width, side, side] as the linear map of a square's vectors, row by row, that it is."""

    def back(xs: list[Tensor]) -> Tensor:
        width, inputs = xs[0].shape
        side = round((inputs / width) ** 0.5)
        kernel: Tensor = xs[0].unflatten(1, (side, side, width)).permute(0, 3, 1, 2)
        return kernel

    return Reshape(lambda x: [x.permute(0, 2, 3, 1).flatten(1)], back)


def expert_keys(cfg: DecoderConfig) -> KeyMap:
    """The decoder's names: every block has two sets of maps, queries, keys and values below each other, and norms."""
    layer, block = "model.layers.{i}.", "blocks.{i}."
    narrow = (cfg.kv_heads or cfg.heads) * cfg.rotary_dim
    sizes = [cfg.heads * cfg.rotary_dim, narrow, narrow]
    below = Reshape(lambda x: list(x.split(sizes)), torch.cat)
    rules = list(renames(layer, block, {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}))
    for kind, maps, mlp in (
        ("language", "attention.", "feedforward."),
        ("vision", "vision.", "vision.feedforward."),
    ):
        ours = (f"{block}{maps}{x}.{{p}}" for x in "qkv")
        rules += [
            rule(f"{layer}self_attn.{kind}_expert_query_key_value.{{p}}", *ours, reshape=below),
            rule(f"{layer}self_attn.{kind}_expert_dense.{{p}}", f"{block}{maps}o.{{p}}"),
            *renames(f"{layer}mlp.{kind}_mlp.", f"{block}{mlp}", {f"{x}_proj": x for x in ("gate", "up", "down")}),
        ]
    inner = KeyMap(tuple(rules), ignore=(f"{layer}self_attn.rotary_emb.inv_freq",))
    return ends(cfg, "model.embed_tokens", "model.norm") + inner


def inputs(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    images: Sequence[Sequence[Tensor]] | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
) -> Batch:
    """Pictures [3, height, width] as a list of at most one for each row; a picture's tokens are those of type 1."""
    ids = checked(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
    rows = [list(row) for row in images or ()]
    if images is not None and (len(rows) != len(ids) or any(len(row) > 1 for row in rows)):
        raise InputError(f"images: found {[len(row) for row in rows]} a row, expected at most 1 in {len(ids)} rows")
    found = [picture for row in rows for picture in row]
    if len({picture.shape for picture in found}) > 1:
        raise InputError("images: found pictures of several sizes, expected one")
    kinds = torch.zeros_like(ids) if token_type_ids is None else token_type_ids
    patches = cut(model, torch.stack(found)) if found else None
    return filled(model, ids, kinds == 1, patches, attention_mask, told="tokens of type 1 in token_type_ids")


# ----------------------------------------------------------------------------------------------------- conversations

FORMS = {"chat": ("Question: ", " Answer:"), "vqa": ("Question: ", " Short answer:"), "base": ("", "")}


def template(form: str, bos: str, eos: str) -> Template:
    """The form that a `template_version` names; earlier answers are read like questions, the last one is learned."""
    if form not in FORMS:
        raise ConfigError(f"template_version {form!r}, expected one of {', '.join(map(repr, FORMS))}")
    before, after = FORMS[form]

    def written(conversation: Conversation) -> list[Segment]:
        talk, pictures = spoken(conversation), len(images_of(conversation))
        if pictures > 1:
            raise InputError(f"this model reads one picture, the conversation has {pictures}")
        if form == "base" and len(talk) > 2:
            raise InputError(f"this model answers one question, the conversation has {len(talk)} messages")
        out = Writer()
        out.control(bos)
        for _ in range(pictures):
            out.image()
        for i, message in enumerate(talk):
            said = Message(message.role, tuple(part for part in message.parts if not isinstance(part, (Image, Video))))
            if message.role == "user":
                out.words(before)
                out.parts(said)
                out.words(after)
            elif i + 1 < len(talk):
                out.words(" ")
                out.parts(said)
                out.words("\n")
            else:
                out.parts(said, learned=True)
                out.segments.append(End(eos))
        return out.segments

    return written


def habits(c: Json, folder: Path, tokenizer: Tokenizer) -> Habits:
    """As its `config.json` says; the words are Vicuna's, or Llama 3's in CogVLM2."""
    image, bos, eos = "<unk>", "<s>", "</s>"
    if newer(c):
        image, bos, eos = "<|reserved_special_token_0|>", "<|begin_of_text|>", "<|end_of_text|>"
    form = str(c.get("template_version", "chat"))
    return Habits(template(form, bos, eos), image, "cogvlm", bos, eos, pixels=stretched_for_encoder)


# ------------------------------------------------------------------------------------------------- families and rows

FAMILIES = {"cogvlm": Family(lambda c, f: VLM(config(c)), keys, inputs=inputs, habits=habits)}

# arXiv:2311.03079 section 2.2, where the encoder learns a tenth as fast
EXPERT = ("fusion.*", "decoder.blocks.*.vision.*")
STAGES: Stages = {"pretrain": EXPERT, "ground": EXPERT, "instruct": ("encoder.*", *EXPERT)}


def _vision(side: int) -> dict[str, Any]:
    """EVA2-CLIP E without its last block."""
    sizes = {"hidden_size": 1792, "num_hidden_layers": 63, "num_heads": 16, "intermediate_size": 15_360}
    return {**sizes, "image_size": side, "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}


def _row(name: str, form: str) -> Row:
    words = {"vocab_size": 32_000, "max_position_embeddings": 2048}
    return Row(
        name=name,
        family="CogVLM",
        encoder="EVA2-CLIP E/14 490",
        fusion="gated adapter, visual expert",
        llm="Vicuna 7B v1.5",
        licence="CogVLM",
        source=f"THUDM/{name}-hf",
        read=config,
        config={**llama("7b", **words, template_version=form), "vision_config": _vision(490)},
        stages=STAGES,
        proof="logits and greedy tokens equal golden values of the public code on random weights",
    )


LLAMA_3: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_multi_query_heads": 8,
}
LLAMA_3 |= {"intermediate_size": 14_336, "vocab_size": 128_256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
COGVLM_2 = Row(
    name="cogvlm2-llama3-chat-19b",
    family="CogVLM2",
    encoder="EVA2-CLIP E/14 1344",
    fusion="2x2 patches convolved into one, gated adapter, visual expert",
    llm="Llama 3 8B Instruct",
    licence="CogVLM2, Llama 3",
    source="THUDM/cogvlm2-llama3-chat-19B",
    read=config,
    config={**LLAMA_3, "vision_config": _vision(1344)},
    proof="logits and greedy tokens equal golden values of the published code on random weights",
)

ROWS = (_row("cogvlm-chat", "chat"), _row("cogvlm-grounding-generalist", "base"), COGVLM_2)
