"""This project's own model folder, complete in itself: what it is, its weights, its tokenizer, how it reads pictures.

config.json            model_type "sightline", the configuration, the stages, length and sha256 of the weights
model.safetensors      bfloat16; a large model comes in pieces beside `model.safetensors.index.json`
tokenizer.json         and tokenizer_config.json
processor.json         template, picture pipeline, convention for places, context
published/             of a model that was published by others: its own small files, which say this instead
"""

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from ..core.config import config, from_dict, nearest, to_dict
from ..core.errors import CheckpointError, ConfigError
from ..data.processor import Processor
from ..data.template import TEMPLATES
from ..data.tiles import Pipeline
from ..grounding.codecs import CODECS
from ..language.tokenizer import Tokenizer
from ..layers.adapted import merged_state
from ..layers.packed import Precision
from ..model import VLM, VLMConfig
from . import processors
from .checkpoint import PIECE, assign, digest, read_file, read_json, whole, write_json, write_pieces
from .families import FAMILIES, ROWS, habits_of
from .family import Habits
from .hollow import hollow
from .prepared import dtype_of
from .published import Published

PUBLISHED = "published"  # where a converted model keeps the small files that it was published with


@config
class ProcessorConfig:
    """How conversations become numbers: names of a template and a codec, the picture pipeline, the context.

    template: one of `data.template`, or the name of a published model, whose conversations and the tokens around its
    pictures are then the same. image_token: fills a picture's places.
    """

    pixels: Pipeline
    template: str = "sightline"
    codec: str | None = "location-tokens"
    image_token: str = "<image>"
    max_length: PositiveInt = 768

    def __post_init__(self) -> None:
        named = (("template", self.template, {**TEMPLATES, **ROWS}), ("codec", self.codec, CODECS))
        for what, name, known in named:
            if name is not None and name not in known:
                raise ConfigError(f"unknown {what} {name!r}{nearest(name, known)}")

    def build(self, tokenizer: Tokenizer, model: VLM) -> Processor:
        """The processor of this model."""
        if self.template in TEMPLATES:
            habits = Habits(TEMPLATES[self.template], self.image_token)
        else:
            habits = habits_of(ROWS[self.template], tokenizer)
            processors.settle(tokenizer, habits)
            if habits.instruct is not None:
                raise ConfigError(
                    f"template {self.template!r} reads questions in a second vocabulary, which is not here"
                )
        habits = replace(habits, codec=self.codec, image=self.image_token)
        instruct = tokenizer.encode if model.config.instruction_length else None
        return processors.processor_for(model, tokenizer, habits, self.pixels, self.max_length, instruct)


@config
class PublishedProcessor:
    """Conversations become numbers as in this published family, by its own files, which lie in `published/`."""

    family: str


@config
class FileIdentity:
    """What a file of weights must be: its length in bytes and the sha256 of its content."""

    bytes: int
    sha256: str


@config
class Card:
    """What `config.json` says: the model's name, its configuration, what each stage of its training taught.

    stages: patterns over parameter names, by stage. weights: the files of weights by name. beside: further files of
    tensors, such as a reward model's head, by their place in the folder.
    """

    model_type: Literal["sightline"]
    name: str
    model: VLMConfig
    stages: dict[str, tuple[str, ...]]
    weights: dict[str, FileIdentity]
    beside: dict[str, FileIdentity] = field(default_factory=dict)


def save(
    model: VLM,
    tokenizer: Tokenizer,
    processor: "ProcessorConfig | PublishedProcessor",
    folder: Path,
    stages: Mapping[str, tuple[str, ...]] | None = None,
    piece: int = PIECE,
    dtype: torch.dtype = torch.bfloat16,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model folder whole or not at all; whatever was there stays until the new one is on the disk.

    Weights are written in `dtype`, adapters merged; tables that are not learned as they are. beside: further files by
    name. OSError (a full disk, say) leaves the old folder as it was.
    """
    with whole(folder) as new:
        fixed = {name for name, _ in model.named_buffers()}  # exact, so that saving changes nothing of them
        state = {name: tensor.cpu() for name, tensor in merged_state(model).items()}
        tensors = {name: tensor if name in fixed else tensor.to(dtype) for name, tensor in state.items()}
        write_pieces(new, tensors, piece)
        tokenizer.save(new)
        for name, content in (beside or {}).items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(content)
        write_json(new / "processor.json", to_dict(processor))
        weights = {path.name: _identity(path) for path in sorted(new.glob("*.safetensors"))}
        others = {name: _identity(new / name) for name in beside or {} if name.endswith(".safetensors")}
        card = Card("sightline", folder.name, model.config, dict(stages or {}), weights, others)
        said = to_dict(card)
        write_json(new / "config.json", said if others else {k: v for k, v in said.items() if k != "beside"})


def read_card(folder: Path) -> Card:
    """What a folder says it is, without its weights; CheckpointError or ConfigError where that is unclear."""
    return from_dict(Card, read_json(folder / "config.json"), f"{folder}/config.json")


def is_own(folder: Path) -> bool:
    """Whether a folder says that it holds a model of this layout."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "sightline"


def load(folder: Path, precision: Precision = "fp32") -> tuple[Published, Processor]:
    """The model of a folder, behind the same door as published ones, and its processor."""
    model = load_model(folder, dtype_of(precision))
    processor = load_processor(folder, model)
    if (folder / PUBLISHED).is_dir():
        family, c = _published(folder)
        return Published(model, c, family, folder, precision), processor
    ids = {"image_token_id": processor.image_id, "eos_token_id": processor.end}
    return Published(model, ids, "sightline", folder, precision), processor


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> VLM:
    """The model of a folder on the CPU; every parameter is read from its file, none is left as it began."""
    card = read_card(folder)
    with hollow():
        model = VLM(card.model)
    return assign(model, read_weights(folder, card), dtype, folder)


def load_processor(folder: Path, model: VLM) -> Processor:
    """The processor of a folder, for its model."""
    if (folder / PUBLISHED).is_dir():
        (family, c), files = _published(folder), folder / PUBLISHED
        found = processors.load_processor(Published(model, c, family, files))
        if found is None:
            raise CheckpointError(f"{files}: no files of a tokenizer, expected those of a {family}")
        return found
    settings = from_dict(ProcessorConfig, read_json(folder / "processor.json"), f"{folder}/processor.json")
    return settings.build(Tokenizer.from_folder(folder), model)


def _published(folder: Path) -> tuple[str, Mapping[str, Any]]:
    """The family of a model that was published by others, and its configuration as it was published."""
    settings = from_dict(PublishedProcessor, read_json(folder / "processor.json"), f"{folder}/processor.json")
    if (name := settings.family) not in FAMILIES:
        raise ConfigError(f"{folder}/processor.json: unknown family {name!r}{nearest(name, FAMILIES)}")
    files = folder / PUBLISHED
    return name, FAMILIES[name].complete(read_json(files / "config.json"), files)


def read_weights(folder: Path, card: Card) -> dict[str, Tensor]:
    """All weights by name, each file checked against the length and sha256 that the card gives."""
    if not card.weights:
        raise CheckpointError(f"{folder}/config.json: no weights are listed")
    found: dict[str, Tensor] = {}
    absent = [name for name in card.weights if not (folder / name).is_file()]
    if len(absent) > 1:
        raise CheckpointError(f"{folder}: {len(absent)} files of weights are missing: {', '.join(absent)}")
    for name, wanted in card.weights.items():
        if (folder / name).name != name:
            raise CheckpointError(f"{folder}/config.json: weights {name!r}, expected the name of a file in it")
        found |= _read(folder / name, wanted)
    return found


def read_beside(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a further file of a folder, checked like its weights."""
    wanted = read_card(folder).beside.get(name)
    if wanted is None:
        raise CheckpointError(f"{folder / name}: its length and sha256 are not in config.json; export the run again")
    return _read(folder / name, wanted)


def _read(path: Path, wanted: FileIdentity) -> dict[str, Tensor]:
    """The tensors of a file that is what it must be."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, the model cannot be loaded without it")
    size = path.stat().st_size
    if size != wanted.bytes:
        raise CheckpointError(f"{path}: {size} bytes, expected {wanted.bytes}; the file is cut off or foreign")
    if _identity(path) != wanted:
        raise CheckpointError(f"{path}: the content differs from its sha256; the file is damaged")
    return read_file(path)


def _identity(path: Path) -> FileIdentity:
    return FileIdentity(path.stat().st_size, digest(path))
