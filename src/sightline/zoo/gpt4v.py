"""GPT-4V as it is guessed to be: a language model of experts that looks at pictures by gated cross-attention.

No weights exist and OpenAI tells no architecture (arXiv:2303.08774, section 2). What is here is an unconfirmed report
of July 2023 (SemiAnalysis, "GPT-4 Architecture"): 120 blocks, 16 experts of 111 billion parameters of which 2 serve a
token, 55 billion shared in attention, pictures by a separate encoder and cross-attention as in Flamingo. The width
follows from these numbers. What they leave open is taken from what OpenAI published (CLIP, a tokenizer of 100,277 ids)
and from the largest Flamingo (arXiv:2204.14198).
"""

from typing import Any

from ..fusion.cross_attention import CrossAttentionConfig
from ..language.decoder import DecoderConfig
from ..layers.experts import ExpertsConfig
from ..model import VLMConfig
from .backbones import clip_config
from .configs import Json
from .family import Family, Row
from .llava import clip_l
from .perceivers import flamingo_config


def config(c: Json) -> VLMConfig:
    """Settings from sizes by the names that a LLaMA-like `config.json` has."""
    image, width, mlp = clip_config(c["vision_config"]), c["hidden_size"], c["intermediate_size"]
    decoder = DecoderConfig(
        vocab_size=c["vocab_size"],
        width=width,
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp=mlp,
        experts=ExpertsConfig(c["num_local_experts"], c["num_experts_per_tok"], mlp),
        max_length=c["max_position_embeddings"],
    )
    fusion = CrossAttentionConfig(
        inputs=image.width,
        width=width,
        heads=decoder.heads,
        mlp=4 * width,
        resampler=flamingo_config(image.width),
        interval=c["cross_attn_every_n_layers"],
    )
    return VLMConfig(image, fusion, decoder)


FAMILIES: dict[str, Family] = {}

SIZES: dict[str, Any] = {"hidden_size": 10_752, "num_hidden_layers": 120, "num_attention_heads": 84}
SIZES |= {"intermediate_size": 28_672, "num_local_experts": 16, "num_experts_per_tok": 2, "vocab_size": 100_277}
SIZES |= {"max_position_embeddings": 8192, "cross_attn_every_n_layers": 7}
GPT_4V = Row(
    name="gpt-4v",
    family="GPT-4V",
    encoder="CLIP ViT-L/14 336 (a guess)",
    fusion="Perceiver, gated cross-attention before every 7. block (a guess)",
    llm="GPT-4, 16 experts (an unconfirmed report)",
    licence="closed, no weights exist",
    source="an unconfirmed report (SemiAnalysis, July 2023)",
    read=config,
    config={**SIZES, "vision_config": clip_l(336)},
    stages={"pretrain": ("fusion.*", "decoder.blocks.*.cross_*")},
    proof="none: built and run at a tiny size, there is nothing to compare it with",
    weights=False,
)

ROWS = (GPT_4V,)
