"""Imports run strictly downwards: from a module only to its own package or to packages of a lower rank."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sightline

SOURCE = Path(sightline.__file__).parent
RANKS = {
    "train": 10,
    "cli": 9,
    "recipes": 8,
    "evaluation": 7,
    "training": 6,
    "serving": 6,
    "zoo": 5,
    "model": 4,
    "fusion": 3,
    "data": 3,
    "worlds": 3,
    "encoders": 2,
    "language": 2,
    "grounding": 2,
    "layers": 1,
    "core": 0,
}
DOORS = (SOURCE / "__init__.py", SOURCE / "__main__.py")  # the public door may look anywhere
MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path not in DOORS]


def package_of(path: Path) -> str:
    """The ranked name that a module belongs to: its folder below `sightline`, or its own name there."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """(line, ranked name) of everything of this project that a module imports, inside functions as well."""
    inside = ("sightline", *path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level + 1]) if node.level else ""
            start = ".".join(part for part in (base, node.module) if part)
            names = [f"{start}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "sightline" and len(parts) > 1:
                yield node.lineno, parts[1]


def wrong_ways(path: Path, source: str) -> list[str]:
    """Every import of a module that does not run downwards."""
    own = package_of(path)
    return [
        f"{path.relative_to(SOURCE)}:{line}: {own} (rank {RANKS[own]}) imports {target} (rank {RANKS[target]})"
        for line, target in imported(path, source)
        if target in RANKS and target != own and RANKS[target] >= RANKS[own]
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_downwards(path: Path) -> None:
    assert package_of(path) in RANKS, "a new package needs its rank here and in the README"
    assert wrong_ways(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "place, source",
    [
        ("core/layout.py", "from ..layers.norms import RMSNorm"),
        ("fusion/projector.py", "def f():\n    from ..data import batch"),
        ("grounding/codecs.py", "import sightline.language.tokenizer"),
        ("training/trainer.py", "from sightline.serving import engine"),
        ("model.py", "from .zoo.keymap import KeyMap"),
        ("core/layout.py", "from .. import model"),
    ],
)
def test_an_import_the_wrong_way_is_seen(place: str, source: str) -> None:
    assert len(wrong_ways(SOURCE / place, source)) == 1
