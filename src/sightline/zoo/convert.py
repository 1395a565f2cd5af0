"""A model in another layout: this project's own, or that of LLaVA in transformers, which other engines read as well.

What does not fit a layout is told by its settings. Nothing is rounded: weights are written in the smallest format that
holds each of them exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.config import nearest
from ..core.errors import ConfigError, InputError
from ..data.processor import Processor, whole as all_in_a_row
from ..encoders.vit import ViTConfig
from ..model import VLM
from . import own
from .checkpoint import INDEX, whole, write_json, write_pieces
from .llava_files import image_token, jinja_of, pixels_config, processor_config, tokenizer_config, with_row
from .llava_settings import fitted
from .processors import chat_template, load_processor
from .published import Published, load_published

LAYOUTS = ("sightline", "llava")
SMALL = (".json", ".jinja", ".tiktoken", ".txt", ".model")  # what lies beside weights and says how to use them


@dataclass(frozen=True)
class Opened:
    """A loaded model with its processor; jinja: the chat template that came with it, if one did."""

    published: Published
    model: VLM
    processor: Processor
    jinja: str | None
    stages: Mapping[str, tuple[str, ...]]


def convert(source: Path, folder: Path, layout: str | None = None, force: bool = False) -> str:
    """Write the model of one folder into another and tell what was written.

    layout: "sightline" or "llava"; without it our own models become LLaVA's and all others ours. force: whether a
    model that is in the other folder may be replaced. The folder is written whole or not at all.
    Raises InputError for a folder that may not be written, ConfigError for a model that does not fit the layout.
    """
    ours = own.is_own(source)
    layout = layout or ("llava" if ours else "sightline")
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}{nearest(layout, LAYOUTS)}")
    if ours and layout == "sightline":
        raise InputError(f"{source} is in this project's own layout already")
    _free(source, folder, force)
    opened = _open(source, ours)
    if layout == "llava":
        return _to_llava(opened, folder)
    return _to_own(opened, folder)


def _free(source: Path, folder: Path, force: bool) -> None:
    """Refuse a folder whose content would be lost."""
    here, there = source.resolve(), folder.resolve()
    if here == there or there in here.parents:
        raise InputError(f"{folder} holds the model that is read, expected another folder to write into")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not force:
        raise InputError(f"{folder} is there already; --force replaces it")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model, which alone is replaced; expected another folder")


def _open(source: Path, ours: bool) -> Opened:
    """The model of a folder and all that says how it is used."""
    if ours:
        published, processor = own.load(source)
        files = source / own.PUBLISHED if (source / own.PUBLISHED).is_dir() else source
        stages = own.read_card(source).stages
    else:
        published, files, stages = load_published(source), source, {}
        found = load_processor(published)
        if not isinstance(published.model, VLM) or found is None:
            raise InputError(f"{source}: a {published.family} without a tokenizer or pictures, expected a whole model")
        processor = found
    assert isinstance(published.model, VLM)
    return Opened(published, published.model, processor, chat_template(files), stages)


def exact(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The smallest format of floating-point numbers that holds all of these exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)) for tensor in tensors.values()):
            return dtype
    return torch.float32


# ---------------------------------------------------------------------------------------------- this project's layout


def _to_own(opened: Opened, folder: Path) -> str:
    """Write our layout; the small files that the model came with are kept as they are, and used."""
    published, source = opened.published, opened.published.folder
    files = [*sorted(source.glob("*")), *sorted(source.glob("*/*"))]  # a second tokenizer has a folder of its own
    small = [path for path in files if path.is_file() and path.suffix in SMALL and path.name != INDEX]
    beside = {f"{own.PUBLISHED}/{path.relative_to(source)}": path.read_bytes() for path in small}
    if (source / "generation_config.json").exists():
        beside["generation_config.json"] = (source / "generation_config.json").read_bytes()
    dtype = exact(opened.model.state_dict())
    settings = own.PublishedProcessor(published.family)
    own.save(opened.model, opened.processor.tokenizer, settings, folder, dtype=dtype, beside=beside)
    return f"{folder}: a {published.family} model in this project's layout, {_name(dtype)}"


# ------------------------------------------------------------------------------------------- LLaVA's, of transformers


def _to_llava(opened: Opened, folder: Path) -> str:
    """Write `LlavaForConditionalGeneration`, its tokenizer, its picture pipeline and its chat template."""
    processor, tokenizer = opened.processor, opened.processor.tokenizer
    c, model, tensors = fitted(opened.model.config, opened.model.state_dict())
    if processor.expand is not all_in_a_row:
        raise ConfigError("it does not fit LLaVA's layout: tokens stand around a picture's own, expected none")
    assert isinstance(model.image, ViTConfig)
    name, spec = image_token(processor)
    pixels, jinja, image = (
        pixels_config(processor.pixels),
        opened.jinja or jinja_of(processor, name),
        spec.control(name),
    )
    tensors, c["text_config"]["vocab_size"] = with_row(tensors, image, tokenizer, model.decoder)
    ends = {key: spec.controls.get(getattr(spec, key)) for key in ("bos", "eos", "pad")}
    ids: dict[str, Any] = {f"{key}_token_id": index for key, index in ends.items() if index is not None}
    if said := opened.published.ends():  # which may be several, and need not be the tokenizer's
        ids["eos_token_id"] = said if len(said) > 1 else said[0]
    dtype = exact(tensors)
    c |= {
        "image_token_index": image,
        "image_seq_length": opened.model.num_tokens((1, model.image.grid, model.image.grid)),
    }
    c["dtype"] = c["text_config"]["dtype"] = c["vision_config"]["dtype"] = _name(dtype)
    c["text_config"] |= {key: value for key, value in ids.items() if key != "pad_token_id"}
    with whole(folder) as new:
        write_pieces(new, {key: value.to(dtype) for key, value in tensors.items()})
        write_json(new / "config.json", c)
        write_json(new / "generation_config.json", ids)
        spec.save(new)
        write_json(new / "tokenizer_config.json", tokenizer_config(spec, processor))
        write_json(new / "preprocessor_config.json", pixels)
        write_json(new / "processor_config.json", processor_config(c, name, model.image))
        (new / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    text, vision = c["text_config"]["model_type"], c["vision_config"]["model_type"]
    return f"{folder}: LlavaForConditionalGeneration of {vision} and {text}, {_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
