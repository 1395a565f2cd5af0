"""Folders of weights under every kind of damage: each is one clear line, and no pickle is ever opened."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sightline.core.errors import CheckpointError
from sightline.zoo.checkpoint import INDEX, WEIGHTS, assign, read_json, read_tensors, write

TENSORS = {"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.ones(3)}


def told(call: Callable[[], object]) -> str:
    """The message of the one kind of error there may be; it is one line that names the place."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


def linear() -> nn.Linear:
    with torch.device("meta"):
        return nn.Linear(2, 3)


def with_header(folder: Path, header: bytes, body: bytes = b"\0" * 4) -> Path:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + body)
    return folder


def sharded(folder: Path, **where: Any) -> Path:
    """Two files and an index; `where` overrides what the index says."""
    save_file({"weight": TENSORS["weight"]}, folder / "a.safetensors")
    save_file({"bias": TENSORS["bias"]}, folder / "b.safetensors")
    index = {"weight": "a.safetensors", "bias": "b.safetensors"} | where
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


# ------------------------------------------------------------------------------------------------------------- reading


def test_what_is_written_is_read(tmp_path: Path) -> None:
    columns = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    write(tmp_path / "new", {**TENSORS, "columns": columns, "half": torch.ones(2).bfloat16()}, {"model_type": "x"})
    found = read_tensors(tmp_path / "new")
    assert torch.equal(found["columns"], columns) and found["half"].dtype == torch.bfloat16
    assert read_json(tmp_path / "new" / "config.json") == {"model_type": "x"}


def test_several_files_are_one(tmp_path: Path) -> None:
    found = read_tensors(sharded(tmp_path))
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("kept", [0, 5, 8, 40, -1])
def test_a_cut_off_file_is_told(tmp_path: Path, kept: int) -> None:
    save_file(TENSORS, tmp_path / WEIGHTS)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:kept])
    size = len(whole[:kept])
    assert f"{WEIGHTS}: {size} bytes" in told(lambda: read_tensors(tmp_path))


def test_a_file_that_is_too_long_is_told(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / WEIGHTS)
    size = (tmp_path / WEIGHTS).stat().st_size
    with (tmp_path / WEIGHTS).open("ab") as file:
        file.write(b"more")
    message = told(lambda: read_tensors(tmp_path))
    assert f"{size + 4} bytes, its header says {size}; the file is cut off or damaged" in message


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"a": 5}',
        b'{"a": {}}',
        b'{"a": {"data_offsets": []}}',
        b'{"a": {"data_offsets": null}}',
        b'{"a": {"data_offsets": [0, "four"]}}',
        b'{"a": {"data_offsets": [0, Infinity]}}',
        b'{"a": {"data_offsets": [0, NaN]}}',
        b"[" * 100_000,
    ],
)
def test_a_header_that_is_none_is_told(tmp_path: Path, header: bytes) -> None:
    size = 12 + len(header)
    assert f"{WEIGHTS}: {size} bytes that are no safetensors file" in told(
        lambda: read_tensors(with_header(tmp_path, header))
    )


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F77", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "data_offsets": [0, 4]},
    ],
)
def test_a_header_that_contradicts_itself_is_told(tmp_path: Path, entry: dict[str, Any]) -> None:
    folder = with_header(tmp_path, json.dumps({"a": entry}).encode())
    assert f"{WEIGHTS}: damaged (" in told(lambda: read_tensors(folder))


def test_a_header_longer_than_its_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "10 bytes that are no safetensors file" in told(lambda: read_tensors(tmp_path))


def test_a_missing_file_of_several_is_told(tmp_path: Path) -> None:
    (sharded(tmp_path) / "b.safetensors").unlink()
    assert told(lambda: read_tensors(tmp_path)) == f"{tmp_path}: 1 of 2 files of weights are missing: b.safetensors"


def test_tensors_that_only_the_index_knows_are_told(tmp_path: Path) -> None:
    folder = sharded(tmp_path, scale="a.safetensors")
    assert told(lambda: read_tensors(folder)) == f"{folder}: 1 tensors of the index are in no file, such as scale"


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "..", "", 5, None, {"x": 1}, ["a"], "a\0b.safetensors", "a\nb", "a.bin"]
)
def test_an_index_leads_to_safetensors_of_its_own_folder_alone(tmp_path: Path, name: Any) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / "inner").mkdir()
    folder = sharded(tmp_path / "inner", weight=name)
    assert "is not a safetensors file of this folder" in told(lambda: read_tensors(folder))


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_a_map_is_told(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    assert told(lambda: read_tensors(tmp_path)) == f"{tmp_path / INDEX}: no weight_map"


@pytest.mark.parametrize("text", ["", "{", "\udcff", "[" * 100_000])
def test_what_is_no_json_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "config.json: not readable as JSON" in told(lambda: read_json(tmp_path / "config.json"))


def test_json_that_is_no_object_and_json_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    assert "expected a JSON object, found list" in told(lambda: read_json(tmp_path / "config.json"))
    assert "no config.json, expected a folder" in told(lambda: read_json(tmp_path / "none" / "config.json"))


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    assert told(lambda: read_tensors(tmp_path)) == f"{tmp_path}: no {WEIGHTS}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    message = told(lambda: read_tensors(tmp_path))
    assert f"{name} is a pickle, which can run code and is not opened" in message
    (tmp_path / name).rename(tmp_path / WEIGHTS)  # nor under a better name
    assert "no safetensors file" in told(lambda: read_tensors(tmp_path))
    assert not (tmp_path / "sprung").exists()
    pickle.loads((tmp_path / WEIGHTS).read_bytes())
    assert (tmp_path / "sprung").exists()  # the trap was a real one


# ----------------------------------------------------------------------------------------------------------- assigning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "1 tensors are missing, such as bias"),
        ({"scale": torch.ones(1)}, "1 tensors too many, such as scale"),
        ({"bias": torch.ones(3, 1)}, "bias is [3, 1], expected [3]"),
        ({"bias": torch.tensor([0, torch.nan, 0])}, "bias holds values that are not numbers"),
        ({"bias": torch.tensor([0, -torch.inf, 0])}, "bias holds values that are not numbers"),
        ({"bias": torch.ones(3, dtype=torch.int8)}, "bias holds torch.int8, expected weights that are not quantised"),
    ],
)
def test_weights_of_another_model_are_told(change: dict[str, Tensor | None], message: str) -> None:
    tensors = {name: value for name, value in {**TENSORS, **change}.items() if value is not None}
    found = told(lambda: assign(linear(), tensors, torch.float32, Path("folder")))
    assert found == f"folder: {message}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_is_the_file_s_in_the_precision_asked_for(dtype: torch.dtype) -> None:
    model = assign(linear(), TENSORS, dtype, Path("folder"))
    assert not model.training
    for name, value in model.state_dict().items():
        assert value.dtype == dtype and not value.is_meta
        assert torch.equal(value, TENSORS[name].to(dtype))


def test_numbers_too_large_for_the_precision_asked_for_are_told() -> None:
    large = TENSORS | {"bias": torch.tensor([1e6, 0, 0]).bfloat16()}
    assign(linear(), large, torch.float32, Path("folder"))
    assert "bias holds values that are not numbers" in told(
        lambda: assign(linear(), large, torch.float16, Path("folder"))
    )
