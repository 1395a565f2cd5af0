"""The public names: exactly these, each to be had, and none of them paid for before it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sightline

NAMES = {
    "__version__",
    # a conversation as values
    "Audio", "Conversation", "Image", "Message", "Region", "Text", "Video",
    # places
    "Box", "Frame", "Point",
    # models
    "VLM", "VLMConfig", "load", "reach",
    # asking and being answered
    "Answer", "Assistant", "Sampling",
    # what can go wrong
    "CapacityError", "CheckpointError", "ConfigError", "DataError", "InputError", "RemoteError", "SightlineError",
}  # fmt: skip


def test_the_list_is_exactly_this() -> None:
    assert set(sightline.__all__) == NAMES
    assert set(dir(sightline)) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_there(name: str) -> None:
    assert getattr(sightline, name) is not None


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(sightline.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    aliases = [a for block in blocks for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names]
    assert {alias.asname for alias in aliases} | {"__version__"} == NAMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = sightline.lod


def test_import_and_values_do_without_torch() -> None:
    code = "import sys, sightline; sightline.Box, sightline.Message, dir(sightline); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
