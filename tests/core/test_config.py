"""Configuration values: frozen, strict, and clear about what is wrong."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from sightline.core.config import config, from_dict, load_yaml, nearest, override, save_yaml, to_dict
from sightline.core.errors import ConfigError


@config
class Linear:
    """A way to join, named by `kind`."""

    width: int
    kind: Literal["linear"] = "linear"


@config
class Mlp:
    """Another way to join."""

    width: int
    hidden: int = 8
    kind: Literal["mlp"] = "mlp"


@config
class Phase:
    """Part of a run."""

    name: str
    steps: int = 100
    rates: dict[str, float] = dataclasses.field(default_factory=dict)


@config
class Run:
    """A whole run: nested values, a union and a tuple of values."""

    fusion: Linear | Mlp
    stages: tuple[Phase, ...] = ()
    seed: int = 0
    note: str | None = None
    take: str | int = ""


RUN = Run(fusion=Mlp(width=4), stages=(Phase("align", rates={"fusion.*": 1e-3}), Phase("instruct", steps=7)))


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RUN.seed = 1  # type: ignore[misc]


def test_round_trip_through_dicts_keeps_types() -> None:
    plain = to_dict(RUN)
    assert plain["stages"][1] == {"name": "instruct", "steps": 7, "rates": {}}
    back = from_dict(Run, plain)
    assert back == RUN and isinstance(back.fusion, Mlp) and isinstance(back.stages, tuple)


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    save_yaml(RUN, tmp_path / "run.yaml")
    assert load_yaml(Run, tmp_path / "run.yaml") == RUN
    assert (tmp_path / "run.yaml").read_text().startswith("fusion:")  # declared order, not the alphabet's


@pytest.mark.parametrize("kind, expected", [("linear", Linear), ("mlp", Mlp)])
def test_kind_chooses_the_member_of_a_union(kind: str, expected: type) -> None:
    assert type(from_dict(Run, {"fusion": {"kind": kind, "width": 3}}).fusion) is expected


def test_override_reads_values_as_yaml_and_leaves_the_original() -> None:
    changed = override(RUN, ["stages.1.steps=20", "fusion.hidden=16", "note=null", "stages.0.rates={}"])
    assert changed.stages[1].steps == 20 and changed.note is None and changed.stages[0].rates == {}
    assert isinstance(changed.fusion, Mlp) and changed.fusion.hidden == 16
    assert RUN.stages[1].steps == 7


@pytest.mark.parametrize(
    "data, said",
    [
        ({"fusion": {"kind": "mlp", "width": 3}, "sed": 1}, "unknown key 'sed'; did you mean 'seed'?"),
        ({}, "key 'fusion' is missing from Run"),
        ({"fusion": {"kind": "mlp", "width": 3}, "seed": "many"}, "seed = 'many'"),
        ({"fusion": "mlp"}, "fusion = 'mlp': expected keys and values"),
        ({"fusion": {"kind": "mlp", "width": 3}, "stages": {}}, "stages = {}: expected a list"),
        ({"fusion": {"kind": "mlp", "width": 3}, "stages": "x" * 200}, "xxx…: expected a list"),
        (
            {"fusion": {"kind": "mlp", "width": 3}, "stages": [{"name": "a", "rates": [1]}]},
            "stages.0.rates = [1]: expected keys and values",
        ),
        ({"fusion": {"kind": "mlp", "width": 3}, "take": [1]}, "take = [1]: input should be a valid"),
        ({"fusion": {"kind": "mlp", "width": "x"}}, "run.yaml: fusion.width = 'x': "),
        ({"fusion": {"kind": "mlp"}}, "key 'fusion.width' is missing from Run"),
    ],
)
def test_wrong_data_is_one_clear_line(data: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Run, data, "run.yaml")
    message = str(caught.value)
    assert message.startswith("run.yaml: ") and said in message and "\n" not in message


def test_unknown_key_of_a_nested_value_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'stages.0.stpes'; did you mean 'steps'\?"):
        from_dict(Run, {"fusion": {"kind": "linear", "width": 3}, "stages": [{"name": "align", "stpes": 3}]})


def test_unknown_key_inside_a_union_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"hiden.*did you mean 'hidden'\?"):
        from_dict(Run, {"fusion": {"kind": "mlp", "width": 3, "hiden": 3}})


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"fusion.*'mpl'.*did you mean 'mlp'\?"):
        from_dict(Run, {"fusion": {"kind": "mpl", "width": 3}})


@pytest.mark.parametrize(
    "setting, said",
    [
        ("seed", "expected KEY=VALUE"),
        ("sed=1", "did you mean 'seed'"),
        ("stages.5.steps=1", "'5' is not an index below 2"),
        ("stages.0.stpes=1", "did you mean 'steps'"),
        ("seed.deeper=1", "'seed' is a single value"),
        ("seed=[", "seed"),
    ],
)
def test_wrong_overrides_are_one_clear_line(setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(RUN, [setting])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"- 1\n", ": expected keys and values, found [1]"),
        (b"a: 1\nb: [", ":2: expected the node content, but found '<stream end>'"),
        (b"", ": expected keys and values, found nothing"),
        (b"\xff\xfe\x00", ": not a text in UTF-8, expected YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_yaml(Run, path)
    assert str(caught.value) == f"{path}{said}"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_yaml(Run, tmp_path / "absent.yaml")
    assert str(caught.value) == f"{tmp_path / 'absent.yaml'}: no such file or directory"


def test_nearest_lists_all_when_none_is_near() -> None:
    assert nearest("zzz", ["align", "instruct"]) == "; known: align, instruct"
    assert nearest("zzz", []) == ""


def test_does_not_import_torch() -> None:
    code = "import sightline.core.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
