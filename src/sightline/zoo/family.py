"""What a published family says of itself: how a folder of it becomes a model, what its processor does, its sizes.

Each family's file holds one `Family` per model type that a `config.json` may name, and a `Row` per published model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import ConfigError
from ..data.batch import Batch
from ..data.images import CLIP_MEAN, CLIP_STD, CenterCrop, Scaling, Square
from ..data.processor import Expand, ImagePipeline, whole
from ..data.template import Films, Template
from ..language.tokenizer import Tokenizer
from ..model import VLMConfig
from .checkpoint import read_tensors
from .configs import Json
from .inputs import pictures
from .keymap import KeyMap
from .revisions import REVISIONS

Stages = Mapping[str, tuple[str, ...]]

LOGITS = "logits and greedy tokens equal transformers' on a random checkpoint of this layout"
EQUAL = "logits, greedy tokens and pixels equal transformers' on a random checkpoint of this layout"

CLIP = Scaling(CLIP_MEAN, CLIP_STD)
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which the files use


def as_read(c: Json, folder: Path) -> Json:
    """A configuration that says all by itself."""
    return c


def as_written(c: Json, folder: Path) -> Mapping[str, Tensor]:
    """Tensors of a folder under the names they have there."""
    return read_tensors(folder)


def scaling(c: Json, default: Scaling) -> Scaling:
    """Mean, deviation and filter, where a file names them; Pillow's own filters, as the published processors use."""
    mean, std = c.get("image_mean", default.mean), c.get("image_std", default.std)
    for name, three in (("image_mean", mean), ("image_std", std)):
        if not isinstance(three, list | tuple) or len(three) != 3 or not all(isinstance(x, int | float) for x in three):
            raise ConfigError(f"{name} is {three!r}, expected three numbers")
    if min(std) <= 0:
        raise ConfigError(f"image_std is {std!r}, expected numbers above 0")
    resample = _FILTERS.get(c.get("resample", 3), default.resample)
    return Scaling(tuple(mean), tuple(std), resample, exact=True)  # type: ignore[arg-type]


def clip_crop(c: Json, side: int) -> ImagePipeline:
    """CLIP's pictures, from a `preprocessor_config.json`: the shorter side resized, the middle cut out."""
    crop, size = c.get("crop_size", side), c.get("size", side)
    shortest = size if isinstance(size, int) else size["shortest_edge"]
    return CenterCrop(shortest, crop if isinstance(crop, int) else crop["height"], scaling(c, CLIP))


def side_of(size: Any) -> int:
    """The side of a square that a `preprocessor_config.json` writes in any of three ways."""
    return int(size if isinstance(size, int) else size["height"] if "height" in size else size["shortest_edge"])


def stretched(c: Json, side: int, usual: Scaling = CLIP) -> ImagePipeline:
    """A square, from a `preprocessor_config.json`, also where it names its side as that of the shorter edge."""
    return Square(side_of(c.get("size", c.get("image_size", side))), scaling(c, usual))


def stretched_for_encoder(c: Json, side: int) -> ImagePipeline:
    """The same, its side the encoder's whatever the file says, which may be of a smaller one."""
    return Square(side, scaling(c, CLIP))


def tokenizer_json(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder that has a `tokenizer.json`."""
    return Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None


@dataclass(frozen=True)
class Habits:
    """What the files beside the weights leave unsaid of how a conversation becomes numbers.

    template: how a conversation is laid out, unless the folder has a chat template. image: the token that fills a
    picture's places. codec: the name of its convention for places. end: what ends an answer, where that is not the
    tokenizer's own end. pixels: the picture pipeline from a `preprocessor_config.json`, {} without one, and the
    encoder's side. expand: what stands in the place of a picture, as `data.processor.Expand`. picture: the name
    that stands for a picture in the folder's chat template, if not `image`. video: the token that fills a film's
    places, where a film is one item; films: as `data.template.Films`, where its frames are so many pictures.
    instruct: from the folder what turns a question into the ids that a fusion reads with each picture. controls:
    control tokens that the tokenizer's file may have among its words.
    """

    template: Template
    image: str
    codec: str | None = None
    bos: str = "<s>"
    eos: str = "</s>"
    end: str = ""
    pixels: Callable[[Json, int], ImagePipeline] = clip_crop
    expand: Expand = whole
    picture: str = ""
    video: str | None = None
    films: Films = field(default_factory=dict)
    instruct: Callable[[Path], Callable[[str], list[int]]] | None = None
    controls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """How one family's folder becomes a model that answers its published inputs.

    build: a configuration and its folder to a model without weights. keys: the map of its names, for that model's
    settings. tensors: those of a folder in the map's layout. inputs: its published keyword inputs as a batch, given the
    model and its configuration first (`zoo.inputs`); None for a part that reads no text. tokenizer: that of a folder,
    or None where it lies without one. habits: of its processor, or what tells them from configuration, folder and
    tokenizer. complete: a configuration with what only the files beside it say. modules: what transformers calls a
    module in memory, by its name in any layout that it reads.
    """

    build: Callable[[Json, Path], nn.Module]
    keys: Callable[[Any], KeyMap]
    tensors: Callable[[Json, Path], Mapping[str, Tensor]] = as_written
    inputs: Callable[..., Batch] | None = pictures
    tokenizer: Callable[[Path], Tokenizer | None] = tokenizer_json
    habits: Habits | Callable[[Json, Path, Tokenizer], Habits] | None = None
    complete: Callable[[Json, Path], Json] = as_read
    modules: Callable[[str], str] = str


@dataclass(frozen=True)
class Row:
    """A published model: what it is made of, where it comes from, how loading it is proven.

    `config` are the sizes of its configuration, written as in its `config.json`; `read` makes them settings of ours.
    weights: whether any were published; without them it can be described and built, not loaded.
    habits: of its processor, where files beside its configuration tell which of its family's they are.
    """

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
    weights: bool = True
    habits: Habits | None = None

    @property
    def model(self) -> VLMConfig:
        """The settings at the real size."""
        return self.read(self.config)

    @property
    def revision(self) -> str:
        """The commit of the source that is pulled; "" where none is pinned."""
        return REVISIONS.get(self.source, "")


def llama(size: str, **more: Any) -> dict[str, Any]:
    """LLaMA-2's sizes (arXiv:2307.09288)."""
    width, depth, heads, mlp = {"7b": (4096, 32, 32, 11008), "13b": (5120, 40, 40, 13824)}[size]
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": mlp}
    return {"model_type": "llama", **sizes, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, **more}
