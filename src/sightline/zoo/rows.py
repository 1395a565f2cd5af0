"""Published vision-language models by name: what they are made of, where they come from, how loading them is proven.

Sizes are written as in the published `config.json`, so that a row is read by the same code as a folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..model import VLMConfig
from . import idefics, llava, paligemma

Stages = Mapping[str, tuple[str, ...]]

EQUAL = "logits, greedy tokens and pixels equal transformers' on a random checkpoint of this layout"

# LLaVA's stages: arXiv:2304.08485 section 4.2; PaliGemma's: arXiv:2407.07726 section 3.2
LLAVA_STAGES: Stages = {"align": ("fusion.*",), "instruct": ("fusion.*", "decoder.*")}
PALIGEMMA_STAGES: Stages = {"pretrain": ("*",), "resolution": ("*",), "transfer": ("*",)}
# IDEFICS': arXiv:2306.16527, its model card
IDEFICS_STAGES: Stages = {"pretrain": ("fusion.*", "decoder.blocks.*.cross_*", "decoder.extra_*"), "instruct": ("*",)}


@dataclass(frozen=True)
class Row:
    """A published model. `config` are the sizes of its configuration, `read` what makes them settings of ours."""

    name: str
    family: str
    encoder: str
    fusion: str
    llm: str
    licence: str
    source: str
    read: Callable[[Mapping[str, Any]], VLMConfig]
    config: Mapping[str, Any]
    stages: Stages = field(default_factory=dict)
    proof: str = EQUAL

    @property
    def model(self) -> VLMConfig:
        """The settings at the real size."""
        return self.read(self.config)


def _clip(side: int) -> dict[str, Any]:
    return {**llava.CLIP_L, "model_type": "clip_vision_model", "image_size": side, "patch_size": 14}


def _llama(size: str, **more: Any) -> dict[str, Any]:
    """LLaMA-2's sizes (arXiv:2307.09288)."""
    width, depth, heads, mlp = {"7b": (4096, 32, 32, 11008), "13b": (5120, 40, 40, 13824)}[size]
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": mlp}
    return {"model_type": "llama", **sizes, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, **more}


def _llava_15(size: str) -> Row:
    config = {"vision_config": _clip(336), "text_config": _llama(size, vocab_size=32064)}
    return Row(
        name=f"llava-1.5-{size}",
        family="LLaVA-1.5",
        encoder="CLIP ViT-L/14 336",
        fusion="MLP of 2 layers",
        llm=f"Vicuna {size.upper()} v1.5",
        licence="Llama 2",
        source=f"llava-hf/llava-1.5-{size}-hf",
        read=llava.config,
        config=config,
        stages=LLAVA_STAGES,
    )


def _original_linear(config: Mapping[str, Any]) -> VLMConfig:
    return llava.original_config(config, Path())


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
        read=paligemma.config,
        config={"vision_config": vision, "text_config": text},
        stages=PALIGEMMA_STAGES,
    )


def _idefics(size: str) -> Row:
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
        read=idefics.config,
        config={**text, **more, "vision_config": vision, "perceiver_config": perceiver},
        stages=IDEFICS_STAGES,
        proof="logits and greedy tokens equal transformers' on random checkpoints of this layout",
    )


LLAVA_LINEAR = Row(
    name="llava-llama-2-13b",
    family="LLaVA",
    encoder="CLIP ViT-L/14 224",
    fusion="linear",
    llm="LLaMA-2 13B Chat",
    licence="Llama 2",
    source="liuhaotian/llava-llama-2-13b-chat-lightning-preview",
    read=_original_linear,
    config=_llama("13b", vocab_size=32000, mm_vision_tower="openai/clip-vit-large-patch14", mm_vision_select_layer=-2),
    stages=LLAVA_STAGES,
    proof="logits equal transformers' on a random checkpoint, its second layer set to the identity",
)

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        LLAVA_LINEAR,
        _llava_15("7b"),
        _llava_15("13b"),
        _idefics("9b"),
        _idefics("80b"),
        *(_paligemma(side, mix) for mix, side in ((False, 224), (False, 448), (False, 896), (True, 224), (True, 448))),
    )
}
