"""PaLI-X (arXiv:2305.18565): ViT-22B, one linear layer, an encoder-decoder of UL2's kind. No weights were published.

The tokens of every picture or frame stand before the words that the encoder reads.
"""

from dataclasses import replace

from ..fusion.projector import ProjectorConfig
from ..model import VLMConfig
from . import t5
from .backbones import vit_22b_config
from .configs import Json
from .family import Family, Row, Stages


def config(c: Json) -> VLMConfig:
    """Settings from sizes: `vision_config` in this project's names over those of ViT-22B, `text_config` in T5's."""
    image = replace(vit_22b_config(c["image_size"]), **c.get("vision_config", {}))
    decoder = t5.config(c["text_config"])
    return VLMConfig(image, ProjectorConfig(inputs=image.width, width=decoder.width, layers=1), decoder)


FAMILIES: dict[str, Family] = {}  # there is no file to read

# UL2's sizes (arXiv:2205.05131) with 50 blocks on either side instead of 32 (section 3.1) and mT5's vocabulary, which
# PaLI's models use (arXiv:2209.06794); this makes the 32 billion parameters that are named
UL2_32B = {
    "d_model": 4096,
    "d_kv": 256,
    "num_heads": 16,
    "d_ff": 16384,
    "num_layers": 50,
    "feed_forward_proj": "gated-silu",
    "vocab_size": 250112,
    "tie_word_embeddings": False,
    "n_positions": 4096,  # the largest pictures are 2916 tokens
}
# section 3.3: the encoder stays as it is, at 224 pixels and then while sides grow to 448, 672 and 756
STAGES: Stages = {"mixture": ("fusion.*", "decoder.*"), "resolution": ("fusion.*", "decoder.*")}

PALI_X = Row(
    name="pali-x-55b",
    family="PaLI-X",
    encoder="ViT-22B/14 224",
    fusion="linear",
    llm="UL2 32B encoder-decoder",
    licence="not published",
    source="arXiv:2305.18565, whose weights were not published",
    read=config,
    config={"image_size": 224, "text_config": UL2_32B},
    stages=STAGES,
    proof="built from its paper: parameters as it counts them, trains and writes at a tiny size",
)

ROWS = (PALI_X,)
