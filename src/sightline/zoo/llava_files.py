"""The files beside the weights of a LLaVA folder: picture pipeline, tokenizer, chat template."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..data.images import CenterCrop, PadSquare, Scaling, Square
from ..data.processor import Processor
from ..data.template import TEMPLATES, VICUNA_SYSTEM
from ..encoders.vit import ViTConfig
from ..language.decoder import DecoderConfig
from ..language.tokenizer import Tokenizer


def pixels_config(found: object) -> dict[str, Any]:
    """A `preprocessor_config.json` for a picture pipeline that transformers has too."""
    sizes: dict[str, Any]
    if isinstance(found, Square):
        kind, sizes = "SiglipImageProcessor", {"size": {"height": found.size, "width": found.size}}
    elif isinstance(found, CenterCrop):
        crop: dict[str, Any] = {"crop_size": {"height": found.crop, "width": found.crop}, "do_center_crop": True}
        kind, sizes = "CLIPImageProcessor", {"size": {"shortest_edge": found.shortest}, **crop}
    elif isinstance(found, PadSquare):
        crop = {"crop_size": {"height": found.size, "width": found.size}, "do_center_crop": True}
        kind, sizes = "LlavaImageProcessor", {"size": {"shortest_edge": found.size}, **crop, "do_pad": True}
    else:
        name = getattr(found, "kind", type(found).__name__)
        raise ConfigError(f"it does not fit LLaVA's layout: pixels is {name!r}, expected one view of a picture")
    scaling: Scaling = found.scaling
    return {
        "image_processor_type": kind,
        "processor_class": "LlavaProcessor",
        **sizes,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": {"bilinear": 2, "bicubic": 3}[scaling.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(scaling.mean),
        "image_std": list(scaling.std),
    }


def processor_config(c: Mapping[str, Any], name: str, image: ViTConfig) -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor",
        "image_token": name,
        "patch_size": image.patch_size,
        "num_additional_image_tokens": image.prefix,
        "vision_feature_select_strategy": c["vision_feature_select_strategy"],
    }


def tokenizer_config(tokenizer: Tokenizer, processor: Processor) -> dict[str, Any]:
    names = {f"{key}_token": getattr(tokenizer, key) for key in ("bos", "eos", "pad", "unk") if getattr(tokenizer, key)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "clean_up_tokenization_spaces": False,
        "model_max_length": processor.max_length,
        **names,
    }


def image_token(processor: Processor) -> tuple[str, Tokenizer]:
    """The token that fills a picture's places, and the tokenizer that has it.

    Where a model borrows the one that words unknown to it become, engines that look for ids could not tell a picture
    from such a word: there a token is added.
    """
    tokenizer = processor.tokenizer
    name = next(name for name, index in tokenizer.controls.items() if index == processor.image_id)
    if name not in (tokenizer.unk, tokenizer.spec["model"].get("unk_token"), "<unk>"):
        return name, tokenizer
    if "<image>" in tokenizer.controls:
        return "<image>", tokenizer
    return "<image>", tokenizer.extended(("<image>",))


def with_row(
    tensors: dict[str, Tensor], image: int, tokenizer: Tokenizer, cfg: DecoderConfig
) -> tuple[dict[str, Tensor], int]:
    """Tables that reach to the image token; a new row is that of the unknown word, so that it is never likelier."""
    missing = image + 1 - cfg.vocab_size
    if missing <= 0:
        return tensors, cfg.vocab_size
    row = tokenizer.controls.get(tokenizer.unk or "<unk>", 0)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors:
            table = tensors[name]
            tensors[name] = torch.cat((table, table[row : row + 1].expand(missing, -1)))
    return tensors, cfg.vocab_size + missing


_WORDS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
)
_OURS = (
    "{{ '<bos>' }}{% for message in messages %}{% if message['content'] is not string %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ 'IMAGE' }}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% for message in messages if message['role'] == 'system' %}" + _WORDS + "{% endfor %}"
    "{% for message in messages if message['role'] != 'system' %}{% if message['role'] == 'user' %}"
    "{{ '<user>' }}" + _WORDS + "{% else %}"
    "{{ '<assistant>' }}{% generation %}{{ ' ' }}" + _WORDS + "{{ '<eos>' }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def _vicuna(system: str) -> str:
    """LLaVA's "v1", as `vicuna_template` writes it."""
    said = "{% for message in messages if message['role'] == 'system' %}" + _WORDS + "{{ ' ' }}{% endfor %}"
    default = "{% if messages | selectattr('role', 'equalto', 'system') | list | length == 0 %}"
    parts = (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
        "{% if not loop.last %}{{ '\\n' }}{% endif %}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    )
    return (
        "{{ '<s>' }}" + said + default + '{{ "' + system + '" }}{% endif %}'
        "{% for message in messages if message['role'] != 'system' %}{% if message['role'] == 'user' %}"
        "{{ 'USER: ' }}" + parts + "{{ ' ASSISTANT:' }}{% else %}"
        "{% generation %}{{ ' ' }}" + _WORDS + "{{ '</s>' }}{% endgeneration %}{% endif %}{% endfor %}"
    )


# IMAGE stands for the name of the image token
JINJA = {"sightline": _OURS, "llava-v1": _vicuna(VICUNA_SYSTEM), "llava-hf": _vicuna("")}


def jinja_of(processor: Processor, image: str) -> str:
    """The chat template of a model that came without one, given the name of its image token."""
    name = next((name for name, template in TEMPLATES.items() if template is processor.template), None)
    if name not in JINJA:
        raise ConfigError(f"it does not fit LLaVA's layout: template is {name!r}, expected one of {', '.join(JINJA)}")
    return JINJA[name].replace("IMAGE", image)
