"""The processor of a published checkpoint, from the files that lie beside its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError
from ..data.chat_template import ChatTemplate
from ..data.images import CenterCrop, PadSquare, Pipeline, Scaling, Square
from ..data.processor import Processor
from ..data.template import TEMPLATES, Template
from ..grounding.codecs import CODECS
from ..language.tokenizer import Tokenizer
from ..model import VLM
from .checkpoint import read_json
from .published import Published

_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which the files use


@dataclass(frozen=True)
class _Habits:
    """What a family's files leave unsaid: its template, its convention for places, its image token, its end.

    end: what ends an answer, where that is not the tokenizer's own end.
    """

    template: str
    codec: str | None
    image: str
    bos: str
    eos: str
    end: str = ""


# the original LLaVA has no image token of its own; the unknown token stands in its slots, which the model replaces
FAMILIES = {
    "llava": _Habits("llava-hf", "decimals", "<image>", "<s>", "</s>"),
    "llava_llama": _Habits("llava-v1", "decimals", "<unk>", "<s>", "</s>"),
    "paligemma": _Habits("paligemma", "paligemma", "<image>", "<bos>", "<eos>"),
    "idefics": _Habits("idefics", None, "<image>", "<s>", "</s>", end="<end_of_utterance>"),
}


def load_processor(published: Published) -> Processor | None:
    """The processor of a loaded folder; None for a bare part, without `tokenizer.json`, or of a family not listed."""
    folder, model = published.folder, published.model
    habits = FAMILIES.get(published.family)
    if not isinstance(model, VLM) or not (folder / "tokenizer.json").exists() or habits is None:
        return None
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.bos, tokenizer.eos = tokenizer.bos or habits.bos, habits.end or tokenizer.eos or habits.eos
    return Processor(
        tokenizer=tokenizer,
        template=load_template(folder, tokenizer, habits),
        pixels=load_pipeline(folder, published.family, model.config.image.image_size),
        num_tokens=model.num_tokens,
        patch=model.config.image.patch_size,
        image_token=habits.image,
        codec=None if habits.codec is None else CODECS[habits.codec],
        look=model.config.look,
        framed=model.config.framed,
        max_length=model.config.decoder.max_length,
    )


def load_template(folder: Path, tokenizer: Tokenizer, habits: _Habits) -> Template:
    """The folder's own chat template, or without one as the family always lays out a conversation."""
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.exists() else None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if source is None and (folder / name).exists():
            source = read_json(folder / name).get("chat_template")
    if not isinstance(source, str):  # none, or several by name, of which none is said to be the one to use
        return TEMPLATES[habits.template]
    return ChatTemplate(source, tuple(tokenizer.controls), habits.image, tokenizer.bos, tokenizer.eos)


def load_pipeline(folder: Path, family: str, side: int) -> Pipeline:
    """How pictures are prepared, from `preprocessor_config.json` or, without it, as the family always does."""
    path = folder / "preprocessor_config.json"
    c = read_json(path) if path.exists() else {}
    try:
        if family == "paligemma":
            height = c.get("size", {}).get("height", side)
            return Square(height, _scaling(c, Scaling()))
        if family == "idefics":
            return Square(c.get("image_size", side), _scaling(c, CenterCrop(side, side).scaling))
        if family == "llava_llama":
            return PadSquare(side, _scaling(c, PadSquare(side).scaling))
        crop = c.get("crop_size", side)
        crop = crop if isinstance(crop, int) else crop["height"]
        size = c.get("size", side)
        shortest = size if isinstance(size, int) else size["shortest_edge"]
        return CenterCrop(shortest, crop, _scaling(c, CenterCrop(side, side).scaling))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: sizes of pictures are not as expected ({error})") from None


def _scaling(c: dict[str, Any], default: Scaling) -> Scaling:
    """Mean, deviation and filter, where the file names them; Pillow's own filters, as the published processors use."""
    mean, std = c.get("image_mean", default.mean), c.get("image_std", default.std)
    resample = _FILTERS.get(c.get("resample", 3), default.resample)
    return Scaling(tuple(mean), tuple(std), resample, exact=True)  # type: ignore[arg-type]
