"""InternVL (arXiv:2404.16821): InternViT, squares of patches folded into one, an MLP, a language model.

A picture is cut into tiles, each of which is an item of its own. Two layouts are read: transformers', with a Qwen2 or
LLaMA text half, and that of the original code, whose text half is an InternLM2 or a Qwen2.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError
from ..core.sequence import Image, Message, Video
from ..data.images import IMAGENET_MEAN, IMAGENET_STD, Scaling, Square
from ..data.processor import ImagePipeline, tagged
from ..data.template import Writer, chatml
from ..data.tiles import Tiles
from ..fusion.projector import ProjectorConfig
from ..model import VLM, VLMConfig
from . import llava
from .backbones import intern_vit_config, internvl_vision_config
from .checkpoint import read_json, read_tensors
from .configs import Json, act
from .encoder_names import intern_vit_keys, internvl_vision_keys
from .family import Family, Habits, Row, scaling, side_of
from .keymap import KeyMap, rule
from .language_names import decoder_keys, internlm2_keys
from .languages import language_config


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json` of transformers."""
    if (strategy := c.get("vision_feature_select_strategy", "default")) != "default":
        raise ConfigError(f"vision_feature_select_strategy {strategy!r}, expected 'default': only patches are folded")
    image = internvl_vision_config(c["vision_config"], _layer(c, "vision_feature_layer"))
    decoder = language_config(c["text_config"])
    return VLMConfig(image, projector_config(c, image.width, decoder.width), decoder)


def _layer(c: Json, name: str) -> int:
    """The layer that features are taken from."""
    found: Any = c.get(name, -1)
    if not isinstance(found, int) or found >= 0:
        raise ConfigError(f"{name} {found!r}, expected one layer counted from the end, such as -1")
    return found


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names of transformers' layout."""
    return (
        internvl_vision_keys(cfg.vit).under("vision_tower.", "encoder.")
        + projector_keys().under("multi_modal_projector.", "fusion.")
        + decoder_keys(cfg.decoder).under("language_model.", "decoder.")
    )


def tensors(c: Json, folder: Path) -> dict[str, Tensor]:
    """Tensors of any layout that transformers writes, under the published names: LLaVA's, the tower's one level up.

    A file of tied words holds them once, though the text half may say that they are not tied: the outer settings count.
    """
    found = llava.bare_tower(read_tensors(folder))
    head, table = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    if c.get("tie_word_embeddings") and head not in found and table in found:
        found[head] = found[table].clone()
    return found


def projector_config(c: Json, inputs: int, width: int) -> ProjectorConfig:
    """From a `config.json` of either layout; inputs, width: the encoder's and the decoder's."""
    ratio, order = c.get("downsample_ratio", 0.5), c.get("ps_version", "v2")
    if order not in ("v1", "v2"):
        raise ConfigError(f"ps_version {order!r}, expected 'v1' or 'v2'")
    return ProjectorConfig(
        inputs=inputs,
        width=width,
        activation=act(c.get("projector_hidden_act", "gelu")),
        shuffle=round(1 / ratio),
        norm=True,
        transposed=order == "v1",
    )


def projector_keys() -> KeyMap:
    """The names that transformers writes, below `multi_modal_projector.`."""
    return KeyMap(
        (
            rule("layer_norm.{p}", "norm.{p}"),
            rule("linear_1.{p}", "layers.0.{p}"),
            rule("linear_2.{p}", "layers.1.{p}"),
        )
    )


# -------------------------------------------------------------------------------------------------- original layout


def original_config(c: Json) -> VLMConfig:
    """Settings from a `config.json` of the original code; where it names no `ps_version`, it means the first."""
    text = c["llm_config"]
    if (kind := text.get("model_type")) not in ("internlm2", "qwen2"):
        raise ConfigError(f"llm_config of type {kind!r}, expected 'internlm2' or 'qwen2'")
    image = intern_vit_config(c["vision_config"], _layer(c, "select_layer"))
    decoder = language_config(text)
    return VLMConfig(image, projector_config({"ps_version": "v1", **c}, image.width, decoder.width), decoder)


def original_keys(cfg: VLMConfig) -> KeyMap:
    """The names of OpenGVLab/InternVL."""
    qwen2 = cfg.decoder.qkv_bias and not cfg.decoder.out_bias  # InternLM2 has both biases or neither
    words = decoder_keys if qwen2 else internlm2_keys
    return (
        intern_vit_keys(cfg.vit).under("vision_model.", "encoder.")
        + original_projector_keys().under("mlp1.", "fusion.")
        + words(cfg.decoder).under("language_model.", "decoder.")
    )


def original_projector_keys() -> KeyMap:
    """The names of OpenGVLab/InternVL, below `mlp1.`."""
    return KeyMap((rule("0.{p}", "norm.{p}"), rule("1.{p}", "layers.0.{p}"), rule("3.{p}", "layers.1.{p}")))


# ------------------------------------------------------------------------------------------------------- processors

SLOT = "<IMG_CONTEXT>"
TAGGED = tagged("<img>", "</img>")  # all tokens of a picture's tiles

# what the original code says before a conversation, and between its turns, by the name that `config.json` has for it
# (OpenGVLab/InternVL, internvl_chat/internvl/conversation.py)
FIRST = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
LATER = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
CHATS = {"internlm2-chat": (FIRST, ""), "Hermes-2": (FIRST, ""), "internvl2_5": (LATER, "\n")}


def frames(out: Writer, count: int) -> None:
    """A film's frames, numbered, each in a line of its own."""
    for number in range(1, count + 1):
        out.words(("\n" if number > 1 else "") + f"Frame{number}: ")
        out.image()


def said(out: Writer, message: Message) -> None:
    """What a user says: a line for each picture and for each frame of a film."""
    for part in message.parts:
        if isinstance(part, Video):
            frames(out, len(part.frames))
        else:
            out.parts(Message("user", (part,)))
        if isinstance(part, (Image, Video)):
            out.words("\n")


def _tiles(c: Json, side: int) -> ImagePipeline:
    """By a `preprocessor_config.json` of transformers, whose processor always cuts pictures."""
    return Tiles(
        size=side_of(c.get("size", side)),
        min_tiles=c.get("min_patches", 1),
        max_tiles=c.get("max_patches", 12),
        scaling=scaling(c, Scaling(IMAGENET_MEAN, IMAGENET_STD)),
    )


def _original_tiles(model: Json, c: Json, side: int) -> ImagePipeline:
    """By a `config.json` of the original code, which says how pictures are cut, if they are."""
    size = model.get("force_image_size") or side
    ways = scaling(c, Scaling(IMAGENET_MEAN, IMAGENET_STD))
    if not model.get("dynamic_image_size", False):
        return Square(size, ways)
    least, most = model.get("min_dynamic_patch", 1), model.get("max_dynamic_patch", 6)
    return Tiles(size, least, most, model.get("use_thumbnail", False), ways)


def original_habits(c: Json) -> Habits:
    """By a `config.json` of the original code; InternLM2 begins with a token of its own."""
    name = c.get("template", "internlm2-chat")
    if name not in CHATS:
        raise ConfigError(f"template {name!r}, expected one of {', '.join(CHATS)}")
    bos = "<s>" if c["llm_config"].get("model_type") == "internlm2" else ""
    system, after = CHATS[name]
    return Habits(
        template=chatml(said, system, after, bos),
        image=SLOT,
        codec="internvl",
        bos=bos,
        end="<|im_end|>",
        pixels=partial(_original_tiles, c),
        expand=TAGGED,
    )


def with_slot(c: Json, folder: Path) -> Json:
    """The original configuration with the id of its image token, which only the files of a tokenizer tell."""
    names: dict[str, Any] = {}
    if (path := folder / "added_tokens.json").exists():
        names = dict(read_json(path))
    if (path := folder / "tokenizer.json").exists():
        names |= {token["content"]: token["id"] for token in read_json(path).get("added_tokens") or []}
    return {**c, "image_token_id": names[SLOT]} if SLOT in names else c


# ------------------------------------------------------------------------------------------------- families and rows

FAMILIES = {
    "internvl": Family(
        lambda c, f: VLM(config(c)),
        keys,
        tensors,
        habits=Habits(
            template=chatml(said),
            image=SLOT,
            codec="internvl",
            bos="",
            end="<|im_end|>",
            pixels=_tiles,
            expand=TAGGED,
            films={"<video>": frames},
        ),
        modules=llava.module_name,
    ),
    "internvl_chat": Family(
        lambda c, f: VLM(original_config(c)),
        original_keys,
        habits=lambda c, f, t: original_habits(c),
        complete=with_slot,
    ),
}

# the 6B without its last three blocks; arXiv:2404.16821 sections 3 and 4.1
INTERN_VIT_6B = {"hidden_size": 3200, "intermediate_size": 12_800, "num_hidden_layers": 45, "num_attention_heads": 25}
INTERN_VIT_6B |= {"image_size": 448}
INTERNLM2_20B = {"model_type": "internlm2", "hidden_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 48}
INTERNLM2_20B |= {"num_key_value_heads": 8, "intermediate_size": 16_384, "vocab_size": 92_553, "bias": False}
INTERNLM2_20B |= {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
INTERNLM2_20B["rope_scaling"] = {"type": "dynamic", "factor": 3.0}

PICTURES_15 = {"ps_version": "v2", "template": "internlm2-chat", "dynamic_image_size": True, "use_thumbnail": True}
PICTURES_15 |= {"max_dynamic_patch": 12}

INTERNVL_15 = Row(
    name="internvl-chat-v1-5",
    family="InternVL-1.5",
    encoder="InternViT-6B/14 448",
    fusion="2x2 patches folded into one, MLP of 2 layers",
    llm="InternLM2 20B",
    licence="MIT",
    source="OpenGVLab/InternVL-Chat-V1-5",
    read=original_config,
    config={"model_type": "internvl_chat", "vision_config": INTERN_VIT_6B, "llm_config": INTERNLM2_20B, **PICTURES_15},
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
    read=config,
    config={"vision_config": INTERN_VIT_300M, "text_config": QWEN2_HALF, "image_token_id": 151_667},
    stages={"pretrain": ("*",), "instruct": ("*",)},
)

ROWS = (INTERNVL_15, INTERNVL_3)
