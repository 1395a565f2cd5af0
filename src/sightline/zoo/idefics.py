"""IDEFICS (arXiv:2306.16527): OpenCLIP's ViT-H, a Perceiver, LLaMA with gated cross-attention among its blocks.

Ids above LLaMA's have embeddings and a head of their own; pictures come with a mask over tokens and pictures.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.sequence import Conversation, Image, Message, Video
from ..data.batch import Batch
from ..data.template import Control, End, Segment, Writer, spoken
from ..fusion.cross_attention import CrossAttentionConfig
from ..fusion.resampler import ResamplerConfig
from ..model import VLM, VLMConfig
from .backbones import idefics_vision_config
from .configs import Json, act
from .encoder_names import clip_keys
from .family import Family, Habits, Row, Stages, stretched
from .inputs import checked, cut, filled, is_image, pictures
from .keymap import KeyMap, leading, rule
from .language_names import decoder_keys
from .languages import language_config
from .perceivers import idefics_config, idefics_keys


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`."""
    if (kind := c.get("alpha_type", "float")) not in ("float", "vector"):
        raise ConfigError(f"alpha_type {kind!r}, expected 'float' or 'vector'")
    image = idefics_vision_config(c.get("vision_config") or {})
    decoder = replace(language_config({**c, "model_type": "llama"}), extra_vocab=c.get("additional_vocab_size", 0))
    fusion = CrossAttentionConfig(
        inputs=image.width,
        width=decoder.width,
        heads=decoder.heads,
        mlp=decoder.mlp,
        resampler=idefics_config(c) if c.get("use_resampler") else None,
        interval=c.get("cross_layer_interval", 1),
        start=0,
        norm="rms",
        eps=decoder.eps,
        activation=act(c.get("hidden_act", "silu")),
        gated_mlp=True,
        qk_norm=c.get("qk_layer_norms", False),
        gate="vector" if kind == "vector" else "scalar",
    )
    return VLMConfig(image, fusion, decoder)


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names, in which blocks of cross-attention are counted apart from the decoder's own."""
    assert isinstance(cfg.fusion, CrossAttentionConfig)
    places = cfg.fusion.places(cfg.decoder.depth)
    before = [sum(place <= i for place in places) for i in range(cfg.decoder.depth)]
    return (
        clip_keys(cfg.vit).under("model.vision_model.", "encoder.")
        + decoder_keys(cfg.decoder).numbered({i: i + n for i, n in enumerate(before)}).under("", "decoder.")
        + cross_keys(cfg.fusion).numbered({k: i + k for k, i in enumerate(places)}).under("model.", "decoder.")
        + resampler_keys(cfg.fusion).under("model.perceiver_resampler.", "fusion.resampler.")
        + extra_keys(cfg).under("", "decoder.")
    )


def resampler_keys(cfg: CrossAttentionConfig) -> KeyMap:
    """Names of its Perceiver, if it has one."""
    return idefics_keys(cfg.resampler) if isinstance(cfg.resampler, ResamplerConfig) else KeyMap(())


def cross_keys(cfg: CrossAttentionConfig) -> KeyMap:
    """Names of its cross-attention blocks, below `model.`."""
    layer, block = "gated_cross_attn_layers.{i}.", "blocks.{i}."
    gate = leading(2 if cfg.gate == "vector" else 0)
    norms = (
        rule(f"{layer}cross_attn.{x}_layer_norm.{{p}}", f"{block}cross_attention.{x}_norm.{{p}}")
        for x in "qk"
        if cfg.qk_norm
    )
    return KeyMap(
        (
            *(rule(f"{layer}cross_attn.{x}_proj.{{p}}", f"{block}cross_attention.{x}.{{p}}") for x in "qkvo"),
            *norms,
            rule(f"{layer}alpha_cross_attn", f"{block}cross_gate1", reshape=gate),
            rule(f"{layer}alpha_dense", f"{block}cross_gate2", reshape=gate),
            rule(f"{layer}input_layernorm.{{p}}", f"{block}cross_norm1.{{p}}"),
            rule(f"{layer}post_attention_layernorm.{{p}}", f"{block}cross_norm2.{{p}}"),
            *(
                rule(f"{layer}mlp.{x}_proj.{{p}}", f"{block}cross_feedforward.{x}.{{p}}")
                for x in ("gate", "up", "down")
            ),
        ),
        ignore=(f"{layer}cross_attn.rotary_emb.inv_freq",),
    )


def extra_keys(cfg: VLMConfig) -> KeyMap:
    """Names of the rows of embedding and head that belong to ids above the language model's."""
    if not cfg.decoder.extra_vocab:
        return KeyMap(())
    table = rule("model.embed_tokens.additional_embedding.weight", "extra_embedding.weight")
    head = "lm_head.additional_fc.weight"
    if cfg.decoder.tied:
        return KeyMap((table,), ignore=(head,))
    return KeyMap((table, rule(head, "extra_head.weight")))


def inputs(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_attention_mask: Tensor | None = None,
) -> Batch:
    """Pictures [batch, pictures, 3, height, width], each row filled up to the one with most, with a mask over them.

    image_attention_mask: [batch, length, pictures]. Without one, pictures [n, 3, height, width] are told by their ids.
    """
    if image_attention_mask is None:
        return pictures(model, c, input_ids, pixel_values, attention_mask)
    ids = checked(input_ids, attention_mask=attention_mask)
    if pixel_values is None or pixel_values.dim() != 5 or len(pixel_values) != len(ids):
        found = "none" if pixel_values is None else list(pixel_values.shape)
        raise InputError(f"pixel_values: found {found}, expected [{len(ids)}, pictures, 3, height, width]")
    wanted = [*ids.shape, pixel_values.shape[1]]
    if list(image_attention_mask.shape) != wanted:
        raise InputError(f"image_attention_mask is {list(image_attention_mask.shape)}, expected {wanted}")
    batch = filled(model, ids, torch.zeros_like(ids).bool(), None, attention_mask)
    batch = replace(batch, layout=replace(batch.layout, item=is_image(c, ids).cumsum(1)))
    seen = image_attention_mask.bool()
    row, number = seen.any(dim=1).nonzero().unbind(1)  # what only fills a row up is not computed
    if not len(row):
        return batch
    owners = torch.stack((row, torch.zeros_like(row), number + 1), dim=1)
    return replace(batch, patches=cut(model, pixel_values[row, number]), owners=owners, looks=seen)


FAKE = "<fake_token_around_image>"  # before and after pictures, once between two of them


def template(conversation: Conversation) -> list[Segment]:
    """By its model card: "User:" and "Assistant:" in lines of their own."""
    talk, out = spoken(conversation), Writer()
    out.control("<s>")
    for i, message in enumerate(talk):
        user = message.role == "user"
        out.words(("\n" if i else "") + ("User:" if user else "Assistant:"))
        for part in message.parts:
            if isinstance(part, (Image, Video)):
                for _ in range(len(part.frames) if isinstance(part, Video) else 1):
                    if out.segments[-1] != Control(FAKE):
                        out.control(FAKE)
                    out.image()
                    out.control(FAKE)
            else:
                spaced = "" if out.segments[-1] == Control(FAKE) else " "
                out.parts(Message(message.role, (part,)), learned=not user, before=spaced)
        out.segments.append(Control("<end_of_utterance>") if user else End("<end_of_utterance>"))
    if talk[-1].role == "user":
        out.words("\nAssistant:")
    return out.segments


FAMILIES = {
    "idefics": Family(
        lambda c, f: VLM(config(c)),
        keys,
        inputs=inputs,
        habits=Habits(template, "<image>", end="<end_of_utterance>", pixels=stretched),
    )
}

# its model card
STAGES: Stages = {"pretrain": ("fusion.*", "decoder.blocks.*.cross_*", "decoder.extra_*"), "instruct": ("*",)}


def _row(size: str) -> Row:
    width, depth, heads, mlp, eps = {"9b": (4096, 32, 32, 11008, 1e-6), "80b": (8192, 80, 64, 22016, 1e-5)}[size]
    text = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": mlp}
    text |= {"vocab_size": 32000, "additional_vocab_size": 3, "cross_layer_interval": 4}
    vision = {"embed_dim": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
    perceiver = {"resampler_n_latents": 64, "resampler_depth": 6, "resampler_n_heads": 16, "resampler_head_dim": 96}
    perceiver |= {"qk_layer_norms_perceiver": True}
    more = {"rms_norm_eps": eps, "use_resampler": True, "qk_layer_norms": True, "alpha_type": "float"}
    return Row(
        name=f"idefics-{size}-instruct",
        family="IDEFICS",
        encoder="OpenCLIP ViT-H/14 224",
        fusion="Perceiver, gated cross-attention",
        llm={"9b": "LLaMA 7B", "80b": "LLaMA 65B"}[size],
        licence="LLaMA 1",
        source=f"HuggingFaceM4/idefics-{size}-instruct",
        read=config,
        config={**text, **more, "vision_config": vision, "perceiver_config": perceiver},
        stages=STAGES,
        proof="logits and greedy tokens equal transformers' on random checkpoints of this layout",
    )


ROWS = (_row("9b"), _row("80b"))
