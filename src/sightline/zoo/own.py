"""This project's own model folder, complete in itself: what it is, its weights, its tokenizer, how it reads pictures.

config.json            model_type "sightline", the configuration, the stages, length and sha256 of the weights
model.safetensors      bfloat16; a large model comes in pieces beside `model.safetensors.index.json`
tokenizer.json         and tokenizer_config.json
processor.json         template, picture pipeline, convention for places, context
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
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
from .checkpoint import INDEX, WEIGHTS, assign, digest, flush, read_file, read_json, write_tensors
from .hollow import hollow
from .prepared import dtype_of
from .published import Published

PIECE = 4 << 30  # bytes of weights in one file


@config
class ProcessorConfig:
    """How conversations become numbers: names of a template and a codec, the picture pipeline, the context."""

    pixels: Pipeline
    template: str = "sightline"
    codec: str | None = "location-tokens"
    image_token: str = "<image>"
    max_length: int = 768

    def build(self, tokenizer: Tokenizer, model: VLM) -> Processor:
        """The processor of this model; ConfigError tells the nearest name of an unknown template or codec."""
        for name, known in ((self.template, TEMPLATES), (self.codec, CODECS)):
            if name is not None and name not in known:
                raise ConfigError(f"processor.json: unknown name {name!r}{nearest(name, known)}")
        return Processor(
            tokenizer=tokenizer,
            template=TEMPLATES[self.template],
            pixels=self.pixels,
            num_tokens=model.num_tokens,
            patch=model.config.image.patch_size,
            image_token=self.image_token,
            codec=None if self.codec is None else CODECS[self.codec],
            look=model.config.look,
            framed=model.config.framed,
            start=model.config.start,
            instruct=tokenizer.encode if model.config.instruction_length else None,
            instruction_length=model.config.instruction_length,
            axes=model.config.axes,
            audio=model.config.audio,
            regions=model.config.regions,
            box_head=model.config.box_head is not None,
            max_length=self.max_length,
        )


@config
class FileIdentity:
    """What a file of weights must be: its length in bytes and the sha256 of its content."""

    bytes: int
    sha256: str


@config
class Card:
    """What `config.json` says: the model's name, its configuration, what each stage of its training taught.

    stages: patterns over parameter names, by stage. weights: the files of weights by name.
    """

    model_type: Literal["sightline"]
    name: str
    model: VLMConfig
    stages: dict[str, tuple[str, ...]]
    weights: dict[str, FileIdentity]


def save(
    model: VLM,
    tokenizer: Tokenizer,
    processor: ProcessorConfig,
    folder: Path,
    stages: Mapping[str, tuple[str, ...]] | None = None,
    piece: int = PIECE,
) -> None:
    """Write a model folder whole or not at all; whatever was there stays until the new one is on the disk.

    Floating-point weights are written as bfloat16. OSError (a full disk, say) leaves the old folder as it was.
    """
    temporary, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write_weights(model, temporary, piece)
        tokenizer.save(temporary)
        _write_json(temporary / "processor.json", to_dict(processor))
        weights = {path.name: _identity(path) for path in sorted(temporary.glob("*.safetensors"))}
        card = Card("sightline", folder.name, model.config, dict(stages or {}), weights)
        _write_json(temporary / "config.json", to_dict(card))
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors' files are for their owner alone, which an installed package cannot use
            flush(path)
        flush(temporary)
        _swap(temporary, folder, old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap(new: Path, folder: Path, old: Path) -> None:
    """Put a finished folder in the place of another, which comes back if that fails."""
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
    tokenizer = processor.tokenizer
    ids = {"image_token_id": processor.image_id, "eos_token_id": tokenizer.control(tokenizer.eos)}
    return Published(model, ids, "sightline", folder, precision), processor


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> VLM:
    """The model of a folder on the CPU; every parameter is read from its file, none is left as it began."""
    card = read_card(folder)
    with hollow():
        model = VLM(card.model)
    return assign(model, read_weights(folder, card), dtype, folder)


def load_processor(folder: Path, model: VLM) -> Processor:
    """The processor of a folder, for its model."""
    settings = from_dict(ProcessorConfig, read_json(folder / "processor.json"), f"{folder}/processor.json")
    return settings.build(Tokenizer.from_folder(folder), model)


def read_weights(folder: Path, card: Card) -> dict[str, Tensor]:
    """All weights by name, each file checked against the length and sha256 that the card gives."""
    if not card.weights:
        raise CheckpointError(f"{folder}/config.json: no weights are listed")
    found: dict[str, Tensor] = {}
    for name, wanted in card.weights.items():
        path = folder / name
        if path.name != name or not path.is_file():
            raise CheckpointError(f"{path}: missing, the model cannot be loaded without it")
        size = path.stat().st_size
        if size != wanted.bytes:
            raise CheckpointError(f"{path}: {size} bytes, expected {wanted.bytes}; the file is cut off or foreign")
        if _identity(path) != wanted:
            raise CheckpointError(f"{path}: the content differs from its sha256; the file is damaged")
        found |= read_file(path)
    return found


def _write_weights(model: VLM, folder: Path, piece: int) -> None:
    """Weights in bfloat16, adapters merged, in as many files as pieces of at most `piece` bytes take."""
    tensors = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in merged_state(model).items()}
    pieces: list[dict[str, Tensor]] = [{}]
    room = piece
    for name, tensor in tensors.items():
        if tensor.nbytes > room and pieces[-1]:
            pieces.append({})
            room = piece
        pieces[-1][name] = tensor
        room -= tensor.nbytes
    if len(pieces) == 1:
        write_tensors(folder / WEIGHTS, pieces[0])
        return
    where: dict[str, str] = {}
    for i, content in enumerate(pieces, 1):
        file = f"model-{i:05d}-of-{len(pieces):05d}.safetensors"
        write_tensors(folder / file, content)
        where |= dict.fromkeys(content, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _identity(path: Path) -> FileIdentity:
    return FileIdentity(path.stat().st_size, digest(path))
