"""The processor of a published checkpoint, from the files that lie beside its weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError, ConfigError
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

GENERATION = "generation_config.json"  # of little use here, but a damaged one tells that the folder is damaged


def load_processor(published: Published) -> Processor | None:
    """The processor of a loaded folder; None for a bare part, without a tokenizer, or of a family not listed."""
    folder, model = published.folder, published.model
    family = FAMILIES[published.family]
    if not isinstance(model, VLM) or family.habits is None or (tokenizer := family.tokenizer(folder)) is None:
        return None
    if (folder / GENERATION).exists():
        read_json(folder / GENERATION)
    habits = family.habits
    if not isinstance(habits, Habits):
        habits = habits(published.config, folder, tokenizer)
    if (rows := model.config.decoder.total_vocab) < tokenizer.words:
        raise CheckpointError(
            f"{folder}: tokenizer.json has words up to id {tokenizer.words - 1}, the model knows {rows}"
        )
    settle(tokenizer, habits)
    return processor_for(
        model,
        tokenizer,
        replace(habits, template=load_template(folder, tokenizer, habits)),
        load_pipeline(folder, habits, model.config.image.image_size),
        model.config.decoder.max_length,
        None if habits.instruct is None else habits.instruct(folder),
    )


def settle(tokenizer: Tokenizer, habits: Habits) -> None:
    """Tell a tokenizer what of its control tokens only the habits say: which they are, what begins and ends."""
    tokenizer.reserve(habits.controls)
    tokenizer.bos, tokenizer.eos = tokenizer.bos or habits.bos, habits.end or tokenizer.eos or habits.eos


def processor_for(
    model: VLM,
    tokenizer: Tokenizer,
    habits: Habits,
    pixels: ImagePipeline,
    max_length: int,
    instruct: Callable[[str], Sequence[int]] | None = None,
) -> Processor:
    """The processor of a model with these habits; instruct: the ids of what its fusion reads with a picture."""
    return Processor(
        tokenizer=tokenizer,
        template=habits.template,
        pixels=pixels,
        image_token=habits.image,
        codec=None if habits.codec is None else CODECS[habits.codec],
        expand=habits.expand,
        instruct=instruct,
        video_token=habits.video,
        max_length=max_length,
        **of_model(model),
    )


def of_model(model: VLM) -> dict[str, Any]:
    """What a processor takes over from the model that it writes for, by the names of its settings."""
    c = model.config
    return {
        "num_tokens": model.num_tokens,
        "patch": c.image.patch_size,
        "look": c.look,
        "framed": c.framed,
        "start": c.start,
        "instruction_length": c.instruction_length,
        "axes": c.axes,
        "audio": c.audio,
        "regions": c.regions,
        "box_head": c.box_head is not None,
    }


def load_template(folder: Path, tokenizer: Tokenizer, habits: Habits) -> Template:
    """The folder's own chat template, or without one as the family always lays out a conversation.

    A template that has no place for pictures came with the language model and is not the one to use.
    """
    source = chat_template(folder)
    if source is None:
        return habits.template
    path = folder / "tokenizer_config.json"
    template = ChatTemplate(
        source,
        controls=tuple(tokenizer.controls),
        image=habits.picture or habits.image,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        video=habits.video,
        films=habits.films,
        begins=not path.exists() or read_json(path).get("add_bos_token") is not False,
    )
    return template if template.in_parts else habits.template


def chat_template(folder: Path) -> str | None:
    """The Jinja source that a folder brings; None where there is none, or several by name and none said to be it."""
    path = folder / "chat_template.jinja"
    try:
        source = path.read_text(encoding="utf-8") if path.exists() else None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not a text in UTF-8, expected a template") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if source is None and (folder / name).exists():
            source = read_json(folder / name).get("chat_template")
            if source is not None and not isinstance(source, str | list):
                raise CheckpointError(f"{folder / name}: chat_template is {str(source)[:60]}, expected a text")
    return source if isinstance(source, str) else None


def load_pipeline(folder: Path, habits: Habits, side: int) -> ImagePipeline:
    """How pictures are prepared, from `preprocessor_config.json` or, without it, as the family always does."""
    path = folder / "preprocessor_config.json"
    try:
        return habits.pixels(read_json(path) if path.exists() else {}, side)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: sizes of pictures are not as expected ({error})") from None
