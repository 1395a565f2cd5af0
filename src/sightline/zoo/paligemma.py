"""PaliGemma (arXiv:2407.07726) and PaliGemma 2 (arXiv:2412.03555): SigLIP, one linear layer, Gemma or Gemma 2.

The image and the question see themselves whole.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from ..core.errors import ConfigError, InputError
from ..core.sequence import Conversation
from ..data.images import Scaling
from ..data.template import End, Segment, Writer, spoken
from ..fusion.projector import ProjectorConfig
from ..model import VLM, VLMConfig
from .backbones import siglip_config
from .configs import Json
from .encoder_names import siglip_keys
from .family import Family, Habits, Row, Stages, stretched
from .keymap import KeyMap, rule
from .language_names import decoder_keys
from .languages import language_config
from .llava import module_name, published_tensors


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`."""
    text = c["text_config"]
    if (kind := text.get("model_type", "gemma")) not in ("gemma", "gemma2"):
        raise ConfigError(f"text_config of type {kind!r}, expected 'gemma' or 'gemma2'")
    image = siglip_config(c["vision_config"])
    decoder = language_config({**text, "model_type": kind, "use_bidirectional_attention": False})  # the layout's matter
    return VLMConfig(image, ProjectorConfig(inputs=image.width, width=decoder.width, layers=1), decoder, look="prefix")


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names, which are laid out as llava-hf's."""
    return (
        siglip_keys(cfg.vit).under("vision_tower.vision_model.", "encoder.")
        + decoder_keys(cfg.decoder, "language_model.model.", "language_model.lm_head.").under("", "decoder.")
        + KeyMap((rule("multi_modal_projector.linear.{p}", "fusion.layers.0.{p}"),))
    )


def template(conversation: Conversation) -> list[Segment]:
    """Images, `<bos>`, prefix, a line break; then the suffix and `<eos>`."""
    talk, out = spoken(conversation), Writer()
    if len(talk) > 2:
        raise InputError(f"this model answers one question, the conversation has {len(talk)} messages")
    question = out.shown(talk[0])
    out.control("<bos>")
    out.parts(question)
    out.words("\n")
    if len(talk) == 2:
        out.parts(talk[1], learned=True)
        out.segments.append(End("<eos>"))
    return out.segments


PIXELS = partial(stretched, usual=Scaling())
FAMILIES = {
    "paligemma": Family(
        lambda c, f: VLM(config(c)),
        keys,
        published_tensors,
        habits=Habits(template, "<image>", "paligemma", "<bos>", "<eos>", pixels=PIXELS),
        modules=module_name,
    )
}

# arXiv:2407.07726 section 3.2
STAGES: Stages = {"pretrain": ("*",), "resolution": ("*",), "transfer": ("*",)}


def _paligemma(side: int, mix: bool) -> Row:
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27, "patch_size": 14}
    vision |= {"num_attention_heads": 16, "intermediate_size": 4304, "image_size": side}
    text = {"model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 16384, "vocab_size": 257216}
    kind = "mix" if mix else "pt"
    return Row(
        name=f"paligemma-3b-{kind}-{side}",
        family="PaliGemma",
        encoder=f"SigLIP So400m/14 {side}",
        fusion="linear",
        llm="Gemma 2B",
        licence="Gemma",
        source=f"google/paligemma-3b-{kind}-{side}",
        read=config,
        config={"vision_config": vision, "text_config": text},
        stages=STAGES,
    )


def _gemma_2(size: str) -> dict[str, Any]:
    """Gemma 2's sizes (arXiv:2408.00118, table 1)."""
    width, depth, heads, kv_heads, mlp = {"3b": (2304, 26, 8, 4, 9216), "10b": (3584, 42, 16, 8, 14336)}[size]
    text = {"model_type": "gemma2", "hidden_size": width, "num_hidden_layers": depth, "intermediate_size": mlp}
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 256, "vocab_size": 257216}
    return text | {"query_pre_attn_scalar": 256, "sliding_window": 4096}


def _paligemma_2(size: str, side: int) -> Row:
    first = _paligemma(side, mix=False)
    return replace(
        first,
        name=f"paligemma2-{size}-pt-{side}",
        family="PaliGemma 2",
        llm=f"Gemma 2 {'2B' if size == '3b' else '9B'}",
        source=f"google/paligemma2-{size}-pt-{side}",
        config={"vision_config": first.config["vision_config"], "text_config": _gemma_2(size)},
    )


_SIZES = ((False, 224), (False, 448), (False, 896), (True, 224), (True, 448))
ROWS = (*(_paligemma_2(size, 224) for size in ("3b", "10b")), *(_paligemma(side, mix) for mix, side in _SIZES))
