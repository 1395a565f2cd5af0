"""What a model is called: the default one, a folder, or a published model whose weights are brought by hand."""

from dataclasses import dataclass
from pathlib import Path

from ..core.config import nearest
from ..core.errors import CheckpointError, ConfigError
from ..model import VLM
from . import own
from .checkpoint import read_json
from .describe import Description, count, describe
from .families import ROWS, family_of
from .published import build

ASSETS = Path(__file__).parent.parent / "assets"
DEFAULT = "sightline-mini"


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
        source = ROWS[wanted].source
        raise CheckpointError(f"the weights of {wanted!r} are not here; give the folder that holds {source}")
    if wanted == DEFAULT:
        raise CheckpointError(f"the default model is missing from this installation, expected {ASSETS / wanted}")
    raise ConfigError(f"no model and no folder {wanted!r}{nearest(wanted, (*shipped(), DEFAULT, *ROWS))}")


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # longer than a file system allows, or not ours to look into
        return False


def describe_named(name: str | Path | None = None) -> Description:
    """The description of a model by its name or folder; no weights are read, so published ones need not be here."""
    wanted = str(name or DEFAULT)
    if wanted in ROWS and not _is_folder(wanted):
        row = ROWS[wanted]
        return describe(wanted, row.model, row.stages)
    folder = locate(name)
    if own.is_own(folder):
        card = own.read_card(folder)
        return describe(card.name, card.model, card.stages)
    config = read_json(folder / "config.json")
    family = family_of(config)
    model = build(family, config, folder)
    if not isinstance(model, VLM):
        raise ConfigError(f"{folder} is a {family} alone; expected a model that reads pictures and writes text")
    return describe(folder.name, model.config)


@dataclass(frozen=True)
class Listed:
    """A line of the list of models; `proof` tells how loading it was checked."""

    name: str
    family: str
    encoder: str
    fusion: str
    llm: str
    parameters: int
    licence: str
    source: str
    proof: str

    @property
    def made(self) -> str:
        """What it is made of."""
        return f"{self.encoder} → {self.fusion} → {self.llm}"


def listed() -> list[Listed]:
    """Every model by name: those inside this installation, then the published ones that folders are read of."""
    out = []
    for name in shipped():
        config = own.read_card(ASSETS / name).model
        made = (f"ViT of {config.image.depth} blocks", "projector", f"decoder of {config.decoder.depth} blocks")
        where = ("Apache-2.0", "inside this package", "trained and measured by this project")
        out.append(Listed(name, "sightline", *made, count(config), *where))
    for row in ROWS.values():
        facts = (row.family, row.encoder, row.fusion, row.llm, count(row.model))
        out.append(Listed(row.name, *facts, row.licence, row.source, row.proof))
    return out
