"""Chameleon (arXiv:2405.09818): a VQGAN's codes are words of one decoder that reads pictures and text alike.

A `config.json` without a vocabulary map names no words of pictures; then its decoder is read alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import ConfigError, InputError
from ..core.sequence import Conversation, Image, Message
from ..data.batch import Batch
from ..data.images import CenterCrop, Scaling
from ..data.processor import ImagePipeline, tagged
from ..data.template import Control, End, Segment, Writer, turns
from ..encoders.vq import VQConfig
from ..fusion.vocabulary import VocabularyConfig
from ..language.decoder import Decoder, DecoderConfig
from ..model import VLM, VLMConfig
from .checkpoint import read_tensors
from .configs import Json
from .family import EQUAL, Family, Habits, Row
from .inputs import pictures, words
from .keymap import KeyMap, Reshape, Rule, rule
from .language_names import decoder_keys
from .languages import language_config

IMAGE, BEGIN, STOP, TURN = "<image>", "<racm3:break>", "<eoss>", "<reserved08706>"


def build(c: Json, folder: Path) -> nn.Module:
    """The whole model, or its decoder where nothing says which words are codes."""
    return VLM(config(c)) if c.get("vocabulary_map") else Decoder(_text(c))


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`; words of pictures are read and never written, as published."""
    v = c.get("vq_config") or {}
    for name, wanted in (("double_latent", False), ("attn_type", "vanilla")):
        if v.get(name, wanted) != wanted:
            raise ConfigError(f"{name} is {v[name]!r}, expected {wanted!r}")
    multipliers, side = tuple(v.get("channel_multiplier", (1, 1, 2, 2, 4))), v.get("resolution", 512)
    sides = [side // 2**level for level in range(len(multipliers))]
    image = VQConfig(
        image_size=side,
        width=v.get("base_channels", 128),
        multipliers=multipliers,
        depth=v.get("num_res_blocks", 2),
        attention=tuple(level for level, at in enumerate(sides) if at in (v.get("attn_resolutions") or ())),
        latent=v.get("latent_channels", 256),
        codes=v.get("num_embeddings", 8192),
        code_width=v.get("embed_dim", 256),
        channels=v.get("in_channels", 3),
    )
    ids = codes(c["vocabulary_map"])
    if sorted(ids) != list(range(image.codes)):
        raise ConfigError(f"vocabulary_map names {len(ids)} codes, expected one name for each of {image.codes}")
    decoder = replace(_text(c), unwritten=tuple(sorted(ids.values())))
    return VLMConfig(image, VocabularyConfig(tuple(ids[code] for code in range(image.codes))), decoder)


def _text(c: Json) -> DecoderConfig:
    return language_config({**c, "model_type": "chameleon"})


def codes(vocabulary: Mapping[str, int]) -> dict[int, int]:
    """The id of each code, whose number is spelled A for 0 to J for 9 between IMGIMG and Z."""
    found = {name.removeprefix("IMGIMG"): index for name, index in vocabulary.items() if name.startswith("IMGIMG")}
    try:
        return {int(name[:-1].translate(_DIGITS)): index for name, index in found.items()}
    except ValueError:
        raise ConfigError("vocabulary_map: a name after IMGIMG is no number in letters from A to J") from None


_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


def keys(cfg: VLMConfig | DecoderConfig) -> KeyMap:
    """The published names; what turns codes back into pictures is left out."""
    if isinstance(cfg, DecoderConfig):
        return decoder_keys(cfg)
    encoder = KeyMap(encoder_rules(), ("post_quant_conv.{p}",)).under("model.vqmodel.", "encoder.")
    return decoder_keys(cfg.decoder).under("", "decoder.") + encoder


def encoder_rules() -> tuple[Rule, ...]:
    """The names of the encoder, below `model.vqmodel.`; convolutions of one place are linear maps."""

    def residual(theirs: str, ours: str) -> tuple[Rule, ...]:
        names = {**{name: name for name in ("norm1", "conv1", "norm2", "conv2")}, "nin_shortcut": "shortcut"}
        return tuple(rule(f"{theirs}.{a}.{{p}}", f"{ours}.{b}.{{p}}") for a, b in names.items())

    def attention(theirs: str, ours: str) -> tuple[Rule, ...]:
        maps = {"q": "q", "k": "k", "v": "v", "proj_out": "o"}
        return (
            rule(f"{theirs}.norm.{{p}}", f"{ours}.norm.{{p}}"),
            *(rule(f"{theirs}.{a}.weight", f"{ours}.attention.{b}.weight", reshape=PLACE) for a, b in maps.items()),
            *(rule(f"{theirs}.{a}.bias", f"{ours}.attention.{b}.bias") for a, b in maps.items()),
        )

    level, mine = "encoder.down.{i}", "levels.{i}"
    return (
        rule("encoder.conv_in.{p}", "conv_in.{p}"),
        *residual(f"{level}.block.{{j}}", f"{mine}.blocks.{{j}}"),
        *attention(f"{level}.attn.{{j}}", f"{mine}.attentions.{{j}}"),
        rule(f"{level}.downsample.conv.{{p}}", f"{mine}.down.{{p}}"),
        *residual("encoder.mid.block_1", "middle.0"),
        *attention("encoder.mid.attn_1", "middle.1"),
        *residual("encoder.mid.block_2", "middle.2"),
        rule("encoder.norm_out.{p}", "norm.{p}"),
        rule("encoder.conv_out.{p}", "conv_out.{p}"),
        rule("quant_conv.weight", "project.weight", reshape=PLACE),
        rule("quant_conv.bias", "project.bias"),
        rule("quantize.embedding.weight", "codebook.weight"),
    )


PLACE = Reshape(there=lambda x: [x.flatten(1)], back=lambda xs: xs[0][..., None, None])


def tensors(c: Json, folder: Path) -> dict[str, Tensor]:
    """Tensors of a folder; of a decoder alone without those of pictures."""
    found = read_tensors(folder)
    alone = not c.get("vocabulary_map")
    return {key: value for key, value in found.items() if not (alone and key.startswith("model.vqmodel."))}


def inputs(
    model: nn.Module,
    c: Json,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Batch:
    """Ids among which that of `<image>` stands for every word of a picture, and pictures [n, 3, height, width]."""
    if isinstance(model, VLM):
        named = {"image_token_id": c["vocabulary_map"].get(IMAGE, -1)}
        return pictures(model, named, input_ids, pixel_values, attention_mask)
    if pixel_values is not None:
        raise InputError("config.json has no vocabulary_map, without which pictures have no words")
    return words(model, c, input_ids, attention_mask)


# -------------------------------------------------------------------------------------------------------- processor


def template(conversation: Conversation) -> list[Segment]:
    """`<s>`, a question with its pictures where they stand, the token that ends a turn; then the answer."""
    talk = turns(conversation)
    if len(talk) > 2 or any(message.role == "system" for message in conversation):
        raise InputError("this model's form of a conversation is one question, expected no other messages")
    out = Writer()
    out.control("<s>")
    for part in talk[0].parts:
        if isinstance(part, Image):
            out.image()
        else:
            out.parts(Message("user", (part,)))
    out.segments.append(Control(TURN))
    if len(talk) == 2:
        out.parts(talk[1], learned=True)
        out.segments.append(End("</s>"))
    return out.segments


def pixels(c: Json, side: int) -> ImagePipeline:
    """From a `preprocessor_config.json`; levels are multiplied by 0.0078, not by two 255ths, as published."""
    crop, size = c.get("crop_size", {"height": side}), c.get("size", {"shortest_edge": side})
    factor, mean, std = c.get("rescale_factor", 0.0078), c.get("image_mean", [1.0] * 3), c.get("image_std", [1.0] * 3)
    # (level * factor - mean) / std, written as (level / 255 - mean) / std
    scaling = Scaling(
        mean=tuple(m / (255 * factor) for m in mean),
        std=tuple(s / (255 * factor) for s in std),
        resample="lanczos" if c.get("resample", 1) == 1 else "bicubic",
        exact=True,
    )
    return CenterCrop(size["shortest_edge"], crop["height"], scaling)


HABITS = Habits(template, IMAGE, pixels=pixels, expand=tagged(BEGIN, STOP), controls=(IMAGE, BEGIN, STOP, TURN))

FAMILIES = {"chameleon": Family(build, keys, tensors, inputs, habits=HABITS)}

SPELLED = str.maketrans("0123456789", "ABCDEFGHIJ")
# which word is which code is in each file's own map; here they follow one another
WORDS = {f"IMGIMG{str(code).translate(SPELLED)}Z": 4 + code for code in range(8192)} | {IMAGE: 8711}
SIZES: dict[str, dict[str, Any]] = {
    "7b": {},
    "30b": {"hidden_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 8}
    | {"intermediate_size": 22_016, "swin_norm": True},
}


def _row(size: str) -> Row:
    return Row(
        name=f"chameleon-{size}",
        family="Chameleon",
        encoder="VQGAN of 8192 codes, 512",
        fusion="codes are words",
        llm=f"Chameleon {size.upper()}",
        licence="Chameleon Research",
        source=f"facebook/chameleon-{size}",
        read=config,
        config={**SIZES[size], "vocabulary_map": WORDS},
        stages={"pretrain": ("decoder.*",), "instruct": ("decoder.*",)},
        proof=EQUAL,
    )


ROWS = (_row("7b"), _row("30b"))
