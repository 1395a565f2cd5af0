"""Published vision-language models by name: what they are made of, where they come from, how loading them is proven.

Sizes are written as in the published `config.json`, so that a row is read by the same code as a folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..model import VLMConfig
from . import aria, blip2, idefics, internvl, kosmos2, llava, paligemma

Stages = Mapping[str, tuple[str, ...]]

LOGITS = "logits and greedy tokens equal transformers' on a random checkpoint of this layout"
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


# EVA-CLIP g without its last block; the published configuration class has the same sizes by default
EVA_G = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16}
BLIP_STAGES: Stages = {"represent": ("fusion.*",), "generate": ("fusion.*",)}  # arXiv:2301.12597 section 3


def _blip_2(size: str) -> Row:
    width, depth, mlp = {"2.7b": (2560, 32, 10240), "6.7b": (4096, 32, 16384)}[size]
    text = {"model_type": "opt", "hidden_size": width, "num_hidden_layers": depth, "ffn_dim": mlp}
    text |= {"num_attention_heads": 32, "vocab_size": 50304, "max_position_embeddings": 2048}
    return Row(
        name=f"blip2-opt-{size}",
        family="BLIP-2",
        encoder="EVA-CLIP g/14 224",
        fusion="Q-Former of 32 queries",
        llm=f"OPT {size.upper()}",
        licence="MIT",
        source=f"Salesforce/blip2-opt-{size}",
        read=blip2.config,
        config={"model_type": "blip-2", "vision_config": EVA_G, "text_config": text, "image_token_index": 50265},
        stages=BLIP_STAGES,
        proof=LOGITS,
    )


def _instructblip(size: str) -> Row:
    text = _llama(size, vocab_size=32001, rms_norm_eps=1e-6, max_position_embeddings=2048)
    config = {"vision_config": EVA_G, "qformer_config": {"vocab_size": 30523}, "text_config": text}
    return Row(
        name=f"instructblip-vicuna-{size}",
        family="InstructBLIP",
        encoder="EVA-CLIP g/14 224",
        fusion="Q-Former of 32 queries that read the question",
        llm=f"Vicuna {size.upper()} v1.1",
        licence="LLaMA, not for commerce",
        source=f"Salesforce/instructblip-vicuna-{size}",
        read=blip2.config,
        config={"model_type": "instructblip", "image_token_index": 32000, **config},
        stages={"instruct": ("fusion.*",)},
        proof=LOGITS,
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

# the 6B without its last three blocks; arXiv:2404.16821 sections 3 and 4.1
INTERN_VIT_6B = {"hidden_size": 3200, "intermediate_size": 12_800, "num_hidden_layers": 45, "num_attention_heads": 25}
INTERN_VIT_6B |= {"image_size": 448}
INTERNLM2_20B = {"model_type": "internlm2", "hidden_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 48}
INTERNLM2_20B |= {"num_key_value_heads": 8, "intermediate_size": 16_384, "vocab_size": 92_553, "bias": False}
INTERNLM2_20B |= {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-5, "rope_theta": 1e6}

INTERNVL_15 = Row(
    name="internvl-chat-v1-5",
    family="InternVL-1.5",
    encoder="InternViT-6B/14 448",
    fusion="2x2 patches folded into one, MLP of 2 layers",
    llm="InternLM2 20B",
    licence="MIT",
    source="OpenGVLab/InternVL-Chat-V1-5",
    read=internvl.original_config,
    config={"vision_config": INTERN_VIT_6B, "llm_config": INTERNLM2_20B, "ps_version": "v2"},
    stages={"align": ("encoder.*", "fusion.*"), "instruct": ("*",)},
    proof="logits equal transformers' on a random checkpoint, its LLaMA half renamed and packed as InternLM2",
)

# arXiv:2504.10479; Qwen2.5's head is kept apart from its table here
INTERN_VIT_300M = {"image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True}
QWEN2_HALF = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN2_HALF |= {"num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151_674, "rope_theta": 1e6}

INTERNVL_3 = Row(
    name="internvl3-1b-hf",
    family="InternVL3",
    encoder="InternViT-300M/14 448",
    fusion="2x2 patches folded into one, MLP of 2 layers",
    llm="Qwen2.5 0.5B",
    licence="MIT, Apache-2.0",
    source="OpenGVLab/InternVL3-1B-hf",
    read=internvl.config,
    config={"vision_config": INTERN_VIT_300M, "text_config": QWEN2_HALF, "image_token_id": 151_667},
    stages={"pretrain": ("*",), "instruct": ("*",)},
    proof=LOGITS,
)

KOSMOS_2 = Row(
    name="kosmos-2-patch14-224",
    family="Kosmos-2",
    encoder="CLIP ViT-L/14 224",
    fusion="pool of 64 latents",
    llm="Magneto 1.3B",
    licence="MIT",
    source="microsoft/kosmos-2-patch14-224",
    read=kosmos2.config,
    config={"latent_query_num": 64, "vision_config": _clip(224), "text_config": {"embed_dim": 2048, "layers": 24}},
    stages={"pretrain": ("encoder.blocks.23.*", "fusion.*", "decoder.*")},
    proof=LOGITS,
)

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
    read=aria.config,
    config={
        "vision_config": {**ARIA_VISION, "patch_size": 14, "image_size": 980},
        "text_config": {**ARIA_TEXT, "max_position_embeddings": 65536, "rope_theta": 5e6},
    },
    proof=LOGITS,
)

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        LLAVA_LINEAR,
        _llava_15("7b"),
        _llava_15("13b"),
        _blip_2("2.7b"),
        _blip_2("6.7b"),
        _instructblip("7b"),
        _instructblip("13b"),
        INTERNVL_15,
        INTERNVL_3,
        KOSMOS_2,
        ARIA,
        _idefics("9b"),
        _idefics("80b"),
        *(_paligemma_2(size, 224) for size in ("3b", "10b")),
        *(_paligemma(side, mix) for mix, side in ((False, 224), (False, 448), (False, 896), (True, 224), (True, 448))),
    )
}
