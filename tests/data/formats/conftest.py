"""A folder of small pictures that data sets speak of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

COLORS = ("red", "green", "blue", "white")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures `red.png` to `white.png` of 40x20 pixels, one in a folder below, and a film of twelve frames."""
    for color in COLORS:
        PIL.Image.new("RGB", (40, 20), color).save(tmp_path / f"{color}.png")
    (tmp_path / "below").mkdir()
    PIL.Image.new("RGB", (40, 20), "black").save(tmp_path / "below" / "black.png")
    (tmp_path / "film").mkdir()
    for i in range(12):
        PIL.Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(tmp_path / "film" / f"frame{i}.png")
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    """write(name, rows): a file of JSON lines, or of one JSON value where the name ends in .json."""

    def make(name: str, content: Any) -> Path:
        lines = "".join(json.dumps(row) + "\n" for row in content) if name.endswith("l") else json.dumps(content)
        (folder / name).write_text(lines)
        return folder / name

    return make
