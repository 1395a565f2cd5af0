"""A model like Gemini 1.5: text, pictures, frames of films and sounds in one sequence of a mixture of experts.

Nothing of Gemini is published but statements: it reads all of these interleaved and is a sparse mixture of experts
(arXiv:2403.05530, section 3), frames of a film are pictures in the sequence, sounds are taken at 16 kHz as features of
an encoder (arXiv:2312.11805, section 2), its vocabulary is of 256,000 (arXiv:2403.08295, section 2, which shares it).
Here pictures enter by one linear map, sounds through Whisper's encoder; the sizes are this project's choice.
"""

from ..encoders.audio import AudioConfig
from ..encoders.vit import ViTConfig
from ..fusion.projector import ProjectorConfig
from ..language.decoder import DecoderConfig
from ..layers.experts import ExpertsConfig
from ..model import VLMConfig
from .backbones import whisper_config
from .configs import Json
from .family import Family, Row


def config(c: Json) -> VLMConfig:
    """Settings from sizes written as in a `config.json`."""
    width = c["hidden_size"]
    image = ViTConfig(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        width=width,
        depth=0,
        heads=1,
        mlp=1,
        final_norm=False,
    )
    decoder = DecoderConfig(
        vocab_size=c["vocab_size"],
        width=width,
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        mlp=c["intermediate_size"],
        experts=ExpertsConfig(c["num_local_experts"], c["num_experts_per_tok"], c["intermediate_size"]),
        rope_theta=c["rope_theta"],
        max_length=c["max_position_embeddings"],
    )
    audio: AudioConfig = whisper_config(c["audio_config"])
    return VLMConfig(image, ProjectorConfig(inputs=width, width=width, layers=0), decoder, audio=audio)


FAMILIES: dict[str, Family] = {}  # there are no folders to read

MIXTURE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
MIXTURE |= {"intermediate_size": 14_336, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 256_000}
SOUND = {"d_model": 1024, "encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096}
GEMINI = Row(
    name="gemini-1.5-like",
    family="native",
    encoder="none: 32x32 pixels of 512; sounds by Whisper's",
    fusion="linear map of pixels",
    llm="mixture of 8 experts of 7B",
    licence="no weights",
    source="arXiv:2403.05530, whose weights were not published",
    read=config,
    config={
        **MIXTURE,
        "max_position_embeddings": 1 << 20,
        "rope_theta": 1e7,
        "image_size": 512,
        "patch_size": 32,
        "audio_config": {**SOUND, "num_mel_bins": 128},
    },
    stages={"pretrain": ("*",)},
    proof="built from what its papers say: trains, reads and writes at a tiny size",
)

ROWS = (GEMINI,)
