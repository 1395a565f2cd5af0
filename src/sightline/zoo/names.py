"""What a model is called: the default one, a folder, or a published model whose weights are brought by hand."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..core.config import from_dict, nearest
from ..core.errors import CheckpointError, ConfigError
from ..language.tokenizer import Tokenizer
from ..model import VLM, VLMConfig
from . import own
from .checkpoint import read_json
from .describe import Description, Sight, count, describe, short, sight
from .families import FAMILIES, ROWS, WORDLESS, family_of, kind_of
from .processors import load_pipeline
from .published import build
from .pull import cache as pulled, pullable

ASSETS = Path(__file__).parent.parent / "assets"
DEFAULT = "sightline-mini"
COLUMNS = 100  # of what is listed for people


def shipped() -> list[str]:
    """Names of the models inside this installation."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def locate(name: str | Path | None = None) -> Path:
    """The folder of a model: a shipped one by its name (without a name, the default), or any folder by its path.

    Raises CheckpointError where weights are not here, ConfigError for an unknown name, telling the nearest.
    """
    wanted = str(name or DEFAULT)
    if wanted in shipped():
        return ASSETS / wanted
    if _is_folder(wanted):
        return Path(wanted)
    if wanted in ROWS:
        if is_here(wanted):
            return pulled() / wanted
        source = ROWS[wanted].source
        if not ROWS[wanted].weights:
            raise CheckpointError(f"no weights of {wanted!r} were ever published; it can be described, not loaded")
        how = f", or run: sightline pull {wanted}" if pullable(ROWS[wanted]) else ""
        raise CheckpointError(f"the weights of {wanted!r} are not here; give the folder that holds {source}{how}")
    if wanted == DEFAULT:
        raise CheckpointError(f"the default model is missing from this installation, expected {ASSETS / wanted}")
    raise ConfigError(f"no model and no folder {wanted!r}{nearest(wanted, (*shipped(), DEFAULT, *ROWS))}")


def is_here(name: str) -> bool:
    """Whether the weights of a model by this name are on this machine: inside the installation or pulled."""
    return name in shipped() or (pulled() / name / "config.json").is_file()


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
    wanted = str(name or DEFAULT)
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


@dataclass(frozen=True)
class Listed:
    """An entry of the list of models; proof: how loading it was checked. here: whether its weights are."""

    name: str
    family: str
    encoder: str
    fusion: str
    llm: str
    parameters: int
    licence: str
    source: str
    proof: str
    revision: str = ""
    here: bool = False

    @property
    def made(self) -> str:
        """What it is made of."""
        return f"{self.encoder} → {self.fusion} → {self.llm}"

    def lines(self, room: int) -> list[str]:
        """The entry as people read it, `room` columns for names: what it is, where it is from, how it was proven."""
        at = f" at {self.revision[:12]}" if self.revision else ""
        where = "here" if self.here else "not here"
        rest = (f"{self.family}; licence {self.licence}; {self.source}{at}; {where}", self.proof)
        first = f"{self.name:<{room}}  {short(self.parameters):>6}  "
        wrap = partial(textwrap.wrap, width=COLUMNS, break_on_hyphens=False, break_long_words=False)
        wrapped = [wrap(self.made, initial_indent=first, subsequent_indent=" " * len(first))]
        wrapped += [wrap(text, initial_indent="    ", subsequent_indent="    ") for text in rest]
        return [line for lines in wrapped for line in lines]


@cache
def _parameters(name: str) -> int:
    """Of a published model; counting those of all of them takes seconds."""
    return count(ROWS[name].model)


def listed() -> list[Listed]:
    """Every model by name: those inside this installation, then the published ones that folders are read of."""
    out = []
    for name in shipped():
        config = own.read_card(ASSETS / name).model
        made = (f"ViT of {config.image.depth} blocks", "projector", f"decoder of {config.decoder.depth} blocks")
        where = ("Apache-2.0", "inside this package", "trained and measured by this project")
        out.append(Listed(name, "sightline", *made, count(config), *where, here=True))
    for row in ROWS.values():
        facts = (row.family, row.encoder, row.fusion, row.llm, _parameters(row.name))
        out.append(Listed(row.name, *facts, row.licence, row.source, row.proof, row.revision, is_here(row.name)))
    return out
