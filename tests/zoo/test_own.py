"""This project's own model folders: what is saved is what is loaded, and damage is told in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sightline.core.errors import CheckpointError, ConfigError
from sightline.core.sequence import Image, ask
from sightline.zoo import own


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


def reseal(folder: Path) -> None:
    """Write the true length and sha256 into the card, as someone would who swaps the weights on purpose."""
    card = json.loads((folder / "config.json").read_text())
    card["weights"] = {
        path.name: {"bytes": own._identity(path).bytes, "sha256": own._identity(path).sha256}
        for path in folder.glob("*.safetensors")
    }
    (folder / "config.json").write_text(json.dumps(card))


def test_what_is_saved_is_what_is_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    model = own.load_model(tiny_folder)
    processor = own.load_processor(tiny_folder, model)
    settings = own.ProcessorConfig(processor.pixels, max_length=256)  # type: ignore[arg-type]
    own.save(model, processor.tokenizer, settings, tmp_path / "again", {"align": ("fusion.*",)})
    again = own.load_model(tmp_path / "again")
    assert again.config == model.config
    assert own.read_card(tmp_path / "again").stages == {"align": ("fusion.*",)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_weights_are_bfloat16_in_the_file_and_float32_in_the_model(tiny_folder: Path) -> None:
    assert {tensor.dtype for tensor in load_file(tiny_folder / "model.safetensors").values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in own.load_model(tiny_folder).parameters()} == {torch.float32}


def test_nothing_is_left_on_the_meta_device(tiny_folder: Path) -> None:
    model = own.load_model(tiny_folder)
    assert all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))


def test_a_large_model_comes_in_pieces(tiny_folder: Path, tmp_path: Path) -> None:
    model = own.load_model(tiny_folder)
    processor = own.load_processor(tiny_folder, model)
    settings = own.ProcessorConfig(processor.pixels)  # type: ignore[arg-type]
    own.save(model, processor.tokenizer, settings, tmp_path / "pieces", piece=20_000)
    files = sorted(path.name for path in (tmp_path / "pieces").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "pieces" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    again = own.load_model(tmp_path / "pieces")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    (tmp_path / "pieces" / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{files[1]}: missing"):
        own.load_model(tmp_path / "pieces")


def test_the_door_of_published_models_is_there(tiny_folder: Path) -> None:
    published, processor = own.load(tiny_folder)
    import PIL.Image

    example = processor(ask("how many?", Image(PIL.Image.new("RGB", (40, 30), "red"))))
    inputs = {"input_ids": example.ids[None], "pixel_values": torch.stack(example.pixels)}
    logits = published.logits(**inputs)
    assert logits.shape == (1, example.length, published.model.config.decoder.vocab_size)
    assert logits.dtype == torch.float32
    assert int(published.generate_ids(**inputs, max_new_tokens=1)) == int(logits[0, -1].argmax())


@pytest.mark.parametrize("place", [8, 100, -1000, -1])
def test_one_flipped_bit_is_found(folder: Path, place: int) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="sha256"):
        own.load_model(folder)


@pytest.mark.parametrize("kept", [0, 7, 5000])
def test_cut_off_weights_are_found(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {kept} bytes, expected"):
        own.load_model(folder)


def test_missing_extra_and_misshapen_tensors_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    good = load_file(path)
    name = "fusion.layers.0.weight"
    cases = {
        f"1 tensors are missing, such as {name}": {k: v for k, v in good.items() if k != name},
        "1 tensors too many, such as other": good | {"other": torch.zeros(1)},
        name + r" is \[2, 2\], expected \[32, 32\]": good | {name: torch.zeros(2, 2)},
        f"{name} holds values that are not numbers": good | {name: torch.full((32, 32), torch.nan)},
    }
    for message, tensors in cases.items():
        save_file(tensors, path)
        reseal(folder)
        with pytest.raises(CheckpointError, match=message):
            own.load_model(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "'model_type' is missing"),
    ],
)
def test_a_damaged_card_is_told(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        own.load_model(folder)


def test_an_unknown_key_of_the_card_tells_the_nearest(folder: Path) -> None:
    card = json.loads((folder / "config.json").read_text())
    card["model"]["image"]["widht"] = card["model"]["image"].pop("width")
    (folder / "config.json").write_text(json.dumps(card))
    with pytest.raises(ConfigError, match=r"'model\.image\.widht'; did you mean 'width'"):
        own.load_model(folder)


def test_an_unknown_template_tells_the_nearest(folder: Path) -> None:
    settings = json.loads((folder / "processor.json").read_text()) | {"template": "sihgtline"}
    (folder / "processor.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="'sihgtline'; did you mean 'sightline'"):
        own.load_processor(folder, own.load_model(folder))


FULL_DISK = """
import resource, sys
from pathlib import Path
from sightline.zoo import own
folder = Path(sys.argv[1])
model = own.load_model(folder)
processor = own.load_processor(folder, model)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    own.save(model, processor.tokenizer, own.ProcessorConfig(processor.pixels), folder)
except (OSError, own.CheckpointError) as error:
    sys.exit(f"told: {error}")
"""


@pytest.mark.parametrize("room", [100, 30_000, 110_000])
def test_a_full_disk_while_saving_leaves_the_old_model(folder: Path, room: int) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before["model.safetensors"]) > room
    run = [sys.executable, "-c", FULL_DISK, str(folder), str(room)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("told: "), done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
