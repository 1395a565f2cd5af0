"""What is known of every model, read from a file: `sightline models` answers at once, without torch.

`models.json` says what the rows of the families say, with their parameters counted; `make catalogue` writes it anew,
and a test holds it to the rows.
"""

import json
import re
import textwrap
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..core.folders import user_cache
from .numbers import short

ASSETS = Path(__file__).parent.parent / "assets"
LIST = Path(__file__).with_name("models.json")
COLUMNS = 100  # of what is listed for people
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # of the hub


def shipped() -> dict[str, Path]:
    """The folders of the models inside this installation, by name."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*/config.json"))}


def is_here(name: str) -> bool:
    """Whether the weights of a model by this name are on this machine: inside the installation or pulled."""
    return name in shipped() or (user_cache() / name / "config.json").is_file()


@dataclass(frozen=True)
class Listed:
    """An entry of the list of models.

    revision: the commit of the source that is pulled; "" where none is pinned. proof: how loading it was checked.
    """

    name: str
    family: str
    encoder: str
    fusion: str
    llm: str
    parameters: int
    licence: str
    source: str
    revision: str
    proof: str

    @property
    def here(self) -> bool:
        """Whether its weights are on this machine."""
        return is_here(self.name)

    @property
    def made(self) -> str:
        """What it is made of."""
        return f"{self.encoder} → {self.fusion} → {self.llm}"

    @property
    def origin(self) -> str:
        """Where it is from: of a repository the commit as well, or that none is pinned."""
        if self.revision:
            return f"{self.source} at {self.revision[:12]}"
        return f"{self.source}, not pinned" if REPOSITORY.fullmatch(self.source) else self.source

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON knows it."""
        return {**asdict(self), "here": self.here}

    def lines(self, room: int) -> list[str]:
        """The entry as people read it, `room` columns for names: what it is, where it is from, how it was proven."""
        where = "here" if self.here else "not here"
        rest = (f"{self.family}; licence {self.licence}; {self.origin}; {where}", self.proof)
        first = f"{self.name:<{room}}  {short(self.parameters):>6}  "
        wrap = partial(textwrap.wrap, width=COLUMNS, break_on_hyphens=False, break_long_words=False)
        wrapped = [wrap(self.made, initial_indent=first, subsequent_indent=" " * len(first))]
        wrapped += [wrap(text, initial_indent="    ", subsequent_indent="    ") for text in rest]
        return [line for lines in wrapped for line in lines]


def listed() -> list[Listed]:
    """Every model by name: those inside this installation, then the published ones that folders are read of."""
    return [Listed(**entry) for entry in json.loads(LIST.read_text(encoding="utf-8"))]


def counted() -> list[Listed]:
    """The same from the rows themselves, every design built and counted, which takes seconds."""
    from . import own
    from .describe import count
    from .families import ROWS

    out = []
    for name, folder in shipped().items():
        config = own.read_card(folder).model
        made = (f"ViT of {config.image.depth} blocks", "projector", f"decoder of {config.decoder.depth} blocks")
        where = ("Apache-2.0", "inside this package", "", "trained and measured by this project")
        out.append(Listed(name, "sightline", *made, count(config), *where))
    for row in ROWS.values():
        made = (row.encoder, row.fusion, row.llm)
        where = (row.licence, row.source, row.revision, row.proof)
        out.append(Listed(row.name, row.family, *made, count(row.model), *where))
    return out


if __name__ == "__main__":
    entries = [json.dumps(asdict(entry), ensure_ascii=False) for entry in counted()]
    LIST.write_text("[\n  " + ",\n  ".join(entries) + "\n]\n", encoding="utf-8")
