"""Models by name: what is here, what must be brought, and which name was meant."""

from pathlib import Path

import pytest

from sightline.core.errors import CheckpointError, ConfigError
from sightline.zoo import catalogue, names
from sightline.zoo.catalogue import shipped
from sightline.zoo.checkpoint import write
from sightline.zoo.families import ROWS
from sightline.zoo.names import describe_named, locate
from sightline.zoo.pull import pullable


@pytest.fixture
def assets(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Path:
    """An installation whose only model inside is called `tiny`."""
    monkeypatch.setattr(catalogue, "ASSETS", tiny_folder.parent)
    return tiny_folder.parent


def test_models_inside_the_installation_go_by_their_names(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped() == {"tiny": assets / "tiny"}
    assert locate("tiny") == assets / "tiny"
    monkeypatch.setattr(names, "DEFAULT", "tiny")
    assert locate() == locate(None) == assets / "tiny"
    assert describe_named().name == "tiny"


def test_any_folder_is_a_model_by_its_path(tiny_folder: Path, tmp_path: Path) -> None:
    assert locate(str(tiny_folder)) == locate(tiny_folder) == tiny_folder
    assert locate(tmp_path) == tmp_path  # what is in it is told when it is read
    with pytest.raises(CheckpointError, match=r"no config\.json, expected a folder with a published checkpoint"):
        describe_named(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tniy", "no model and no folder 'tniy'; did you mean 'tiny'?"),
        ("sightline-mni", "no model and no folder 'sightline-mni'; did you mean 'sightline-mini'?"),
        ("llava15-7b", "no model and no folder 'llava15-7b'; did you mean 'llava-1.5-7b'?"),
        ("paligemma-3b-mix-223", "did you mean 'paligemma-3b-mix-224'?"),
        ("zzz", "no model and no folder 'zzz'; known: "),
        ("", "the name of the model is empty, expected one that `sightline models` lists, or a folder"),
        ("x" * 5000, "no model and no folder 'xxx"),  # longer than a file system allows
        ("a\0b", "no model and no folder "),
    ],
)
def test_an_unknown_name_tells_the_nearest(assets: Path, name: str, message: str) -> None:
    for look in (locate, describe_named):
        with pytest.raises(ConfigError) as caught:
            look(name)
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ROWS)
def test_published_models_are_known_but_not_here(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    wanted = f"the weights of {name!r} are not here; give the folder that holds {ROWS[name].source}"
    wanted += f", or run: sightline pull {name}" if pullable(ROWS[name]) else ""
    if not ROWS[name].weights:
        wanted = f"no weights of {name!r} were ever published; it can be described, not loaded"
    assert str(caught.value) == wanted


def test_a_broken_installation_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(catalogue, "ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match="the default model is missing from this installation"):
        locate()


def test_a_part_alone_is_not_described_as_a_model(tmp_path: Path) -> None:
    write(tmp_path, {}, {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    with pytest.raises(ConfigError, match="is a llama alone; expected a model that reads pictures and writes text"):
        describe_named(tmp_path)
