"""Folders that cannot be used, as a person meets them: one clear line from the program, exit code 2."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sightline.cli import app
from sightline.language.tokenizer import train_tokenizer
from sightline.model import VLM
from sightline.zoo import llava
from sightline.zoo.checkpoint import write, write_pieces

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 7}
CONFIG: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": 3,
    "vision_config": VISION,
    "text_config": {"model_type": "llama", "max_position_embeddings": 128, **TEXT},
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder that answers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("good") / "llava"
    config = llava.config(CONFIG)
    write(folder, llava.keys(config).save(VLM(config).state_dict()), CONFIG)
    words = ["how many red circles are there?"] * 30
    train_tokenizer(words, 300, ("<unk>", "<s>", "</s>", "<image>"), bos="<s>", eos="</s>").save(folder)
    PIL.Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(good, tmp_path / "llava"))


def asked(folder: Path, question: str = "how many?", pictures: int = 1) -> tuple[int, str, str]:
    """Exit code, what was printed, and the error's line."""
    words = ["ask", *[str(folder / "red.png")] * pictures, question, "--model", str(folder), "--max-tokens", "2"]
    done = CliRunner().invoke(app, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def refused(folder: Path, *more: Any) -> str:
    code, out, told = asked(folder, *more)
    assert (code, out) == (2, ""), told
    assert len(told.splitlines()) == 1 and told.startswith("error: ")
    return told.removeprefix("error: ").strip()


def says(folder: Path, **changes: Any) -> None:
    """Change what `config.json` says; None takes a key away."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def test_the_folder_is_good_to_begin_with(folder: Path) -> None:
    assert asked(folder)[0] == 0


def test_no_checkpoint(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refused(folder) == f"{folder}: no config.json, expected a folder with a published checkpoint"
    (folder / "model").mkdir()
    (folder / "model" / "config.json").touch()  # a run's folder in the place of its model's
    assert refused(folder).endswith(f"; there is one in {folder / 'model'}")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("llavva", "config.json names the model type 'llavva', which is not known; did you mean 'llava'?"),
        ("zzz", "config.json names the model type 'zzz', which is not known; known: "),
        (None, "config.json names no model type, expected that of a published model"),
    ],
)
def test_an_architecture_that_is_not_known(folder: Path, kind: str | None, message: str) -> None:
    says(folder, model_type=kind)
    assert refused(folder).startswith(message)


@pytest.mark.parametrize(
    ("part", "change", "key", "found", "asks"),
    [
        ("text_config", {"hidden_size": 48}, "language_model.model.embed_tokens.weight", [300, 32], [300, 48]),
        ("text_config", {"vocab_size": 320}, "language_model.model.embed_tokens.weight", [300, 32], [320, 32]),
        ("vision_config", {"patch_size": 14}, ".*patch_embedding.weight", [32, 3, 7, 7], [32, 3, 14, 14]),
        ("vision_config", {"intermediate_size": 80}, ".*mlp.fc1.weight", [64, 32], [80, 32]),
    ],
)
def test_a_configuration_that_contradicts_its_weights(
    folder: Path, part: str, change: dict[str, int], key: str, found: list[int], asks: list[int]
) -> None:
    says(folder, **{part: {**CONFIG[part], **change}})
    told = refused(folder)
    assert re.fullmatch(rf"{re.escape(str(folder))}: \S+ is \[[\d, ]+\], its config\.json asks for \[[\d, ]+\]", told)
    if re.search(key, told):  # which of several tensors of that size comes first is the file's to say
        assert told.endswith(f"is {found}, its config.json asks for {asks}")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text_config", {"num_hidden_layers": 3}, "tensors are missing, such as language_model.model.layers.2."),
        ("text_config", {"num_hidden_layers": 1}, "tensors too many, such as language_model.model.layers.1."),
        ("text_config", {"hidden_size": "wide"}, "its values describe no llava model"),
        ("vision_config", {"hidden_size": "wide"}, "no llava model (width = 'wide': input should be a valid integer"),
        ("text_config", {"num_attention_heads": 0}, "a decoder's sizes are at least 1"),
        ("vision_config", {"num_attention_heads": 0}, "heads of an encoder is 0, expected at least 1"),
        ("vision_config", {"patch_size": 0}, "patch_size of an encoder is 0, expected at least 1"),
        ("vision_config", {"image_size": -28}, "image_size of an encoder is -28, expected at least 1"),
        ("text_config", {"num_key_value_heads": 3}, "4 heads cannot share 3 heads of keys alike"),
        ("text_config", {"model_type": "lama"}, "language model of type 'lama'; did you mean 'llama'?"),
        ("vision_config", {"hidden_act": "gelo"}, "unknown activation 'gelo'; did you mean 'gelu'?"),
    ],
)
def test_a_configuration_that_makes_no_sense(folder: Path, part: str, change: dict[str, Any], message: str) -> None:
    says(folder, **{part: {**CONFIG[part], **change}})
    assert message in refused(folder)


def test_missing_files_of_weights_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_pieces(folder, tensors, 60_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3 and asked(folder)[0] == 0
    for name in files[1:3]:
        (folder / name).unlink()
    told = f"{folder}: 2 of {len(files)} files of weights are missing: {files[1]}, {files[2]}"
    assert refused(folder) == told


def test_pickles_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    told = refused(folder)
    assert told.startswith(f"{folder / 'pytorch_model.bin'} is a pickle, which can run code and is not opened; convert")


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refused(folder) == f"{folder}: no model.safetensors"


def test_weights_that_are_quantised(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "language_model.lm_head.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    assert "holds torch.int8, expected weights that are not quantised" in refused(folder)


@pytest.mark.parametrize("count", [0, 2])
def test_places_in_a_template_that_are_not_as_many_as_the_pictures(folder: Path, count: int) -> None:
    words = "{% for c in messages[0]['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text("{{ '<image>' }}" * count + words)
    assert refused(folder) == f"1 images for {count} places in the conversation"


def test_a_prompt_longer_than_the_context(folder: Path) -> None:
    assert refused(folder, "circles " * 200).endswith("(16 of images) for a context of 128; shorten the text")
    assert refused(folder, "how many?", 8).endswith("(128 of images) for a context of 128; hand in fewer pictures")


def test_words_that_the_model_has_no_rows_for(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["Ġmany"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert refused(folder) == f"{folder}: tokenizer.json has words up to id 5000, the model knows 300"


@pytest.mark.parametrize("file", ["tokenizer.json", "preprocessor_config.json", "config.json", "chat_template.jinja"])
@pytest.mark.parametrize("content", ["{", "[]", '{"size": 3, "added_tokens": 7}', "{% for %}"])
def test_small_files_that_are_damaged(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    code, _, told = asked(folder)
    assert (code, len(told.splitlines())) == ((2, 1) if code else (0, len(told.splitlines())))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", "{", "generation_config.json: not readable as JSON"),
        ("chat_template.json", "[", "chat_template.json: not readable as JSON"),
        ("chat_template.jinja", "{% for %}{{ c['type'] }}", "the chat template cannot be read"),
        ("chat_template.jinja", "{% for %}", "the chat template cannot be read"),
        ("tokenizer_config.json", '{"chat_template": 7}', "chat_template is 7, expected"),
    ],
)
def test_files_that_say_how_it_talks_are_not_passed_over(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content)
    assert message in refused(folder)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("image_mean", "half", "image_mean is 'half', expected three numbers"),
        ("image_std", [0.5], "image_std is [0.5], expected three numbers"),
        ("image_std", [0.5, 0, 0.5], "image_std is [0.5, 0, 0.5], expected numbers above 0"),
    ],
)
def test_a_scale_of_pixels_that_is_none(folder: Path, key: str, value: Any, message: str) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({key: value}))
    assert refused(folder) == f"{folder}/preprocessor_config.json: {message}"


@pytest.mark.parametrize("verb", ["show", "convert"])
def test_the_other_verbs_tell_it_too(folder: Path, verb: str) -> None:
    says(folder, model_type="llavva")
    words = [verb, str(folder), *([str(folder.parent / "out")] if verb == "convert" else [])]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and done.stderr.startswith("error: config.json names the model type 'llavva'")


def test_a_name_that_cannot_be_a_folder(good: Path) -> None:
    run: Callable[..., Any] = CliRunner().invoke
    for name in ("x" * 5000, "a\0b", ""):
        done = run(app, ["convert", name, str(good.parent / "out")])
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
