"""What a person may get wrong with a folder, for families of every design: always one clear line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import sightline
from sightline.cli import app
from sightline.core.errors import InputError
from sightline.language.tokenizer import train_tokenizer
from sightline.zoo.checkpoint import write, write_pieces
from sightline.zoo.families import FAMILIES

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 7}
TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"max_position_embeddings": 256, "vocab_size": 400}
LLAMA = {"model_type": "llama", **TEXT}
QFORMER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
EVA2 = {"hidden_size": 24, "num_hidden_layers": 1, "num_heads": 3, "intermediate_size": 40, "layer_norm_eps": 1e-6}
OPT = {"model_type": "opt", **TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 4, "vocab_size": 400, "max_seq_len": 256}
TOWER = {"vision_config": {"model_type": "clip_vision_model", **VISION}}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava_next": {**TOWER, "text_config": LLAMA, "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]},
    "blip-2": {
        "vision_config": {**VISION, "intermediate_size": 48},
        "qformer_config": QFORMER,
        "num_query_tokens": 5,
        "text_config": OPT,
    },
    "idefics": {**TEXT, "vocab_size": 397, "vision_config": VISION, "additional_vocab_size": 3},
    "otter": {**TOWER, "text_config": MPT},
    "internvl": {"vision_config": VISION, "text_config": {**LLAMA, "model_type": "qwen2"}},
    "qwen2_vl": {
        **TEXT,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "num_key_value_heads": 2,
        "vision_config": {"depth": 1, "num_heads": 2, "patch_size": 7, "embed_dim": 32, "hidden_size": 32},
    },
    "mllama": {
        "vision_config": {**VISION, "num_global_layers": 1, "intermediate_layers_indices": [0, 1]},
        "text_config": {**TEXT, "vocab_size": 392, "num_hidden_layers": 6, "cross_attention_layers": [1, 4]}
        | {"num_key_value_heads": 2},
    },
    "cogvlm": {**TEXT, "vision_config": {**EVA2, "image_size": 28, "patch_size": 7}},
}
IMAGE = {"qwen2_vl": "<|image_pad|>", "mllama": "<|image|>", "internvl": "<IMG_CONTEXT>"}
CONTROLS = ("<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
CONTROLS += ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|begin_of_text|>", "<|eot_id|>")
CONTROLS += ("<|start_header_id|>", "<|end_header_id|>", "<|image|>", "<fake_token_around_image>", "<end_of_utterance>")
CONTROLS += ("<|endofchunk|>", "<answer>", "<video>", "<pad>")
every = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """good(family): a random folder of it that answers."""
    tokenizer = train_tokenizer(["how many red circles are there?"] * 30, 390, CONTROLS, bos="<s>", eos="</s>")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("good") / name
            image = tokenizer.control(IMAGE.get(name, "<image>"))
            c = {"model_type": name, "image_token_index": image, "image_token_id": image, "media_token_id": image}
            c |= CONFIGS[name]
            torch.manual_seed(0)
            model = FAMILIES[name].build(c, folder)
            write(folder, FAMILIES[name].keys(model.config).save(model.state_dict()), c)  # type: ignore[arg-type]
            tokenizer.save(folder)
            made[name] = folder
        return made[name]

    return get


@pytest.fixture
def folder(good: Callable[[str], Path], name: str, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    PIL.Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return Path(shutil.copytree(good(name), tmp_path / "folder"))


def asked(folder: Path, question: str = "how many?") -> tuple[int, str]:
    words = ["ask", str(folder.parent / "red.png"), question, "--model", str(folder), "--max-tokens", "2"]
    done = CliRunner().invoke(app, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stderr


def refused(folder: Path, question: str = "how many?") -> str:
    code, told = asked(folder, question)
    assert code == 2 and len(told.splitlines()) == 1 and told.startswith("error: "), told
    return told.removeprefix("error: ").strip()


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    c = json.loads((folder / "config.json").read_text())
    change(c)
    (folder / "config.json").write_text(json.dumps(c))


def words_of(c: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is about its language model."""
    found: dict[str, Any] = c.get("text_config", c)
    return found


@every
def test_what_is_wrong_is_one_line(folder: Path, name: str) -> None:
    assert asked(folder)[0] == 0
    assert "for a context of 256; shorten the text" in refused(folder, "circles " * 400)
    (folder / "config.json").rename(folder / "config.txt")
    assert refused(folder) == f"{folder}: no config.json, expected a folder with a published checkpoint"


@every
def test_an_architecture_that_is_not_known(folder: Path, name: str) -> None:
    changed(folder, lambda c: c.update(model_type=f"{name}x"))
    assert refused(folder) == f"config.json names the model type '{name}x', which is not known; did you mean '{name}'?"


@every
@pytest.mark.parametrize("deeper", [1, -1])
def test_a_configuration_that_contradicts_its_weights(folder: Path, name: str, deeper: int) -> None:
    text = words_of(CONFIGS[name])
    wide, deep = ("hidden_size", "num_hidden_layers") if "hidden_size" in text else ("d_model", "n_layers")
    changed(folder, lambda c: words_of(c).update({wide: 64}))
    assert re.search("its config.json asks for|expected", refused(folder))
    changed(folder, lambda c: words_of(c).update({wide: 32, deep: text[deep] + deeper}))
    published = set(load_file(folder / "model.safetensors"))
    if name not in ("mllama", "otter") or deeper > 0:
        told = refused(folder)
        assert "tensors are missing, such as" in told if deeper > 0 else told.rpartition("such as ")[2] in published


@every
def test_files_of_weights(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "is a pickle, which can run code and is not opened; convert it to safetensors" in refused(folder)
    (folder / "pytorch_model.bin").unlink()
    write_pieces(folder, tensors, 60_000)
    first, *others = sorted(path.name for path in folder.glob("*.safetensors"))
    assert others and asked(folder)[0] == 0
    (folder / first).unlink()
    assert refused(folder) == f"{folder}: 1 of {len(others) + 1} files of weights are missing: {first}"


@every
def test_pictures_and_their_places(folder: Path, name: str) -> None:
    """A picture's tokens without a picture, at the low-level door."""
    model = sightline.load(folder)
    ids = model.engine.processor(
        sightline.core.sequence.ask("how many?", sightline.Image(PIL.Image.new("RGB", (40, 30))))
    )
    key, more = ("lang_x" if name == "otter" else "input_ids"), {}
    if name == "cogvlm":
        more = {"token_type_ids": torch.zeros_like(ids.ids).index_fill(0, ids.slots, 1)[None]}
    with pytest.raises(InputError, match=r"pixel_values|vision_x"):
        model.logits(**{key: ids.ids[None]}, **more)
