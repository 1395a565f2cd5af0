"""What a model is called: the default one, a folder, or a published model whose weights are brought by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.config import from_dict, nearest
from ..core.errors import CheckpointError, ConfigError
from ..core.folders import user_cache
from ..language.tokenizer import Tokenizer
from ..model import VLM, VLMConfig
from . import own
from .catalogue import ASSETS, is_here, shipped
from .checkpoint import read_json
from .describe import Description, Sight, describe, sight
from .families import FAMILIES, ROWS, WORDLESS, family_of, kind_of
from .processors import load_pipeline
from .published import build
from .pull import pullable

DEFAULT = "sightline-mini"


def locate(name: str | Path | None = None) -> Path:
    """The folder of a model: a shipped one by its name (without a name, the default), or any folder by its path.

    Raises CheckpointError where weights are not here, ConfigError for an unknown name, telling the nearest.
    """
    wanted = DEFAULT if name is None else str(name)
    if not wanted:
        raise ConfigError("the name of the model is empty, expected one that `sightline models` lists, or a folder")
    if wanted in shipped():
        return shipped()[wanted]
    if _is_folder(wanted):
        return Path(wanted)
    if wanted in ROWS:
        if is_here(wanted):
            return user_cache() / wanted
        source = ROWS[wanted].source
        if not ROWS[wanted].weights:
            raise CheckpointError(f"no weights of {wanted!r} were ever published; it can be described, not loaded")
        how = f", or run: sightline pull {wanted}" if pullable(ROWS[wanted]) else ""
        raise CheckpointError(f"the weights of {wanted!r} are not here; give the folder that holds {source}{how}")
    if wanted == DEFAULT:
        raise CheckpointError(f"the default model is missing from this installation, expected {ASSETS / wanted}")
    raise ConfigError(f"no model and no folder {wanted!r}{nearest(wanted, (*shipped(), DEFAULT, *ROWS))}")


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # longer than a file system allows, or not ours to look into
        return False


def describe_named(name: str | Path | None = None, size: tuple[int, int] | None = None) -> Description:
    """The description of a model by its name or folder; no weights are read, so published ones need not be here.

    size: width and height of a picture, which then goes the way that the model's own processor sends it; without it
    the model sees one view of its published size.
    """
    wanted = DEFAULT if name is None else str(name)
    if wanted in ROWS and not _is_folder(wanted):
        row = ROWS[wanted]
        seen = None if size is None else _published_sight(wanted, kind_of(row), row.config, Path(), row.model, size)
        return describe(wanted, row.model, row.stages, seen)
    folder = locate(name)
    if own.is_own(folder):
        card, files = own.read_card(folder), folder / own.PUBLISHED
        seen = None
        if size is not None and files.is_dir():
            c = read_json(files / "config.json")
            seen = _published_sight(str(folder), family_of(c), c, files, card.model, size)
        elif size is not None:
            settings = from_dict(own.ProcessorConfig, read_json(folder / "processor.json"), f"{folder}/processor.json")
            seen = sight(card.model, settings.pixels, size)
        return describe(card.name, card.model, card.stages, seen)
    config = read_json(folder / "config.json")
    family = family_of(config)
    model = build(family, config, folder)
    if not isinstance(model, VLM):
        raise ConfigError(f"{folder} is a {family} alone; expected a model that reads pictures and writes text")
    seen = None if size is None else _published_sight(str(folder), family, config, folder, model.config, size)
    return describe(folder.name, model.config, None, seen)


def _published_sight(
    name: str, family: str, c: Mapping[str, Any], folder: Path, model: VLMConfig, size: tuple[int, int]
) -> Sight:
    """How a published model sees a picture of this size, by its family's habits and the files of its folder."""
    found = FAMILIES[family].habits if family in FAMILIES else None
    habits = found(c, folder, Tokenizer(WORDLESS)) if callable(found) else found
    if habits is None:
        raise ConfigError(f"how {name} prepares pictures is not known here, expected no size")
    return sight(model, load_pipeline(folder, habits, model.image.image_size), size, habits.expand)
