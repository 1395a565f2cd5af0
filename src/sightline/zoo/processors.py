"""The processor of a published checkpoint, from the files that lie beside its weights."""

from pathlib import Path

from ..core.errors import CheckpointError
from ..data.chat_template import ChatTemplate
from ..data.processor import ImagePipeline, Processor
from ..data.template import Template
from ..grounding.codecs import CODECS
from ..language.tokenizer import Tokenizer
from ..model import VLM
from .checkpoint import read_json
from .families import FAMILIES
from .family import Habits
from .published import Published


def load_processor(published: Published) -> Processor | None:
    """The processor of a loaded folder; None for a bare part, without a tokenizer, or of a family not listed."""
    folder, model = published.folder, published.model
    known = FAMILIES[published.family].habits
    habits = known(folder) if callable(known) else known
    tokenizer = None if habits is None else habits.tokenizer(folder)
    if not isinstance(model, VLM) or habits is None or tokenizer is None:
        return None
    tokenizer.bos, tokenizer.eos = tokenizer.bos or habits.bos, habits.end or tokenizer.eos or habits.eos
    return Processor(
        tokenizer=tokenizer,
        template=load_template(folder, tokenizer, habits),
        pixels=load_pipeline(folder, habits, model.config.image.image_size),
        num_tokens=model.num_tokens,
        patch=model.config.image.patch_size,
        image_token=habits.image,
        codec=None if habits.codec is None else CODECS[habits.codec],
        look=model.config.look,
        framed=model.config.framed,
        expand=habits.expand,
        max_length=model.config.decoder.max_length,
    )


def load_template(folder: Path, tokenizer: Tokenizer, habits: Habits) -> Template:
    """The folder's own chat template, or without one as the family always lays out a conversation."""
    source = chat_template(folder)
    if source is None:
        return habits.template
    return ChatTemplate(source, tuple(tokenizer.controls), habits.image, tokenizer.bos, tokenizer.eos)


def chat_template(folder: Path) -> str | None:
    """The Jinja source that a folder brings; None where there is none, or several by name and none said to be it."""
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.exists() else None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if source is None and (folder / name).exists():
            source = read_json(folder / name).get("chat_template")
    return source if isinstance(source, str) else None


def load_pipeline(folder: Path, habits: Habits, side: int) -> ImagePipeline:
    """How pictures are prepared, from `preprocessor_config.json` or, without it, as the family always does."""
    path = folder / "preprocessor_config.json"
    try:
        return habits.pixels(read_json(path) if path.exists() else {}, side)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: sizes of pictures are not as expected ({error})") from None
