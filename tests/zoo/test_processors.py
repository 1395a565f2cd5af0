"""Processors of published folders: read from the files beside the weights, so that a folder answers questions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import sightline
from sightline.core.errors import CheckpointError, InputError
from sightline.core.sequence import Image, Message, Text, ask
from sightline.data.batch import collate
from sightline.data.images import CLIP_MEAN, CLIP_STD, CenterCrop, PadSquare, Scaling, Square
from sightline.data.tiles import Canvas
from sightline.language.tokenizer import train_tokenizer
from sightline.model import VLM
from sightline.zoo import idefics, llava, mllama, paligemma
from sightline.zoo.checkpoint import write
from sightline.zoo.families import FAMILIES
from sightline.zoo.processors import load_pipeline

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 7}
CLIP_FILE = {
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "resample": 3,
}


def published(folder: Path, family: Any, c: dict[str, Any], controls: tuple[str, ...]) -> Path:
    """A random checkpoint in a family's published layout, with a tokenizer."""
    torch.manual_seed(0)
    config = family.config(c)
    write(folder, family.keys(config).save(VLM(config).state_dict()), c)
    train_tokenizer(["how many red circles are there?"] * 30, 500, controls).save(folder)
    return folder


@pytest.fixture
def llava_folder(tmp_path: Path) -> Path:
    c = {"model_type": "llava", "image_token_index": 3}
    c |= {"vision_config": VISION, "text_config": {"model_type": "llama", **TEXT}}
    folder = published(tmp_path / "llava", llava, c, ("<unk>", "<s>", "</s>", "<image>"))
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP_FILE))
    return folder


def test_a_published_folder_answers_questions(llava_folder: Path) -> None:
    model = sightline.load(llava_folder)
    answer = model.ask(PIL.Image.new("RGB", (50, 40), "red"), "how many?", max_new_tokens=5)
    assert answer.usage["image_tokens"] == 16
    assert answer.usage["completion_tokens"] <= 5
    processor = model.engine.processor
    assert processor.pixels == CenterCrop(28, 28, Scaling((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), exact=True))
    assert processor.tokenizer.eos == "</s>"


def test_a_prefix_model_answers_too(tmp_path: Path) -> None:
    c = {"model_type": "paligemma", "vision_config": VISION, "image_token_index": 3}
    c |= {"text_config": {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8, **TEXT}}
    folder = published(tmp_path / "pali", paligemma, c, ("<pad>", "<bos>", "<eos>", "<image>"))
    model = sightline.load(folder)
    assert model.engine.processor.look == "prefix"
    assert model.engine.processor.pixels == Square(28, Scaling(exact=True))
    assert model.ask(PIL.Image.new("RGB", (50, 40)), "how many?", max_new_tokens=3).usage["image_tokens"] == 16


def test_a_model_that_looks_at_pictures_answers_too(tmp_path: Path) -> None:
    """IDEFICS: a picture has one token among the words, and its turns end with a token of their own."""
    c = {"model_type": "idefics", "vision_config": VISION, "additional_vocab_size": 3, **TEXT, "vocab_size": 497}
    controls = ("<unk>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<end_of_utterance>")
    folder = published(tmp_path / "idefics", idefics, c, controls)
    model = sightline.load(folder)
    processor = model.engine.processor
    assert processor.pixels == Square(28, replace(CenterCrop(28, 28).scaling, exact=True))
    assert processor.tokenizer.eos == "<end_of_utterance>"
    answer = model.ask(PIL.Image.new("RGB", (50, 40)), "how many?", max_new_tokens=3)
    assert answer.usage["image_tokens"] == 1 and answer.usage["completion_tokens"] <= 3


def test_a_model_of_canvases_answers_too(tmp_path: Path) -> None:
    """Llama 3.2: a picture is a canvas of tiles with one token; several side by side are looked at together."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "attention_heads": 4}
    vision |= {"num_global_layers": 1, "image_size": 28, "patch_size": 7, "intermediate_layers_indices": [1]}
    text = {**TEXT, "vocab_size": 495, "num_hidden_layers": 4, "cross_attention_layers": [1], "num_key_value_heads": 2}
    c = {"model_type": "mllama", "vision_config": vision, "text_config": text, "image_token_index": 4}
    controls = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>")
    model = sightline.load(published(tmp_path, mllama, c, controls))
    processor = model.engine.processor
    assert processor.pixels == Canvas(28, 4, cut=False, scaling=Scaling(CLIP_MEAN, CLIP_STD, "bilinear", exact=True))
    with torch.no_grad():
        for name, parameter in model.published.model.named_parameters():
            if "gate" in name:
                parameter.fill_(1.0)
    red, blue = (Image(PIL.Image.new("RGB", size, colour)) for colour, size in (("red", (50, 20)), ("blue", (20, 80))))
    example = processor((Message("user", (red, blue, Text("how many?"))),))
    assert [tuple(seen.shape[1:]) for seen in example.pixels] == [(28, 56), (84, 28)]
    batch = collate([example], 7, 0)
    tiles = torch.zeros(1, 2, 4, 3, 28, 28)
    tiles[0, 0, 0], tiles[0, 0, 1] = example.pixels[0].split(28, dim=2)
    for number, tile in enumerate(example.pixels[1].split(28, dim=1)):
        tiles[0, 1, number] = tile
    looks = (batch.layout.item[:, :, None] >= torch.tensor([1, 2])).long()[..., None].expand(-1, -1, -1, 4)
    told = {"aspect_ratio_ids": torch.tensor([[2, 7]]), "pixel_values": tiles, "cross_attention_mask": looks}
    runner = model.published.runner
    torch.testing.assert_close(
        runner.logits(runner(batch)), model.logits(input_ids=batch.ids, **told), atol=1e-5, rtol=0.0
    )
    with pytest.raises(InputError, match="message 2 is from the user, expected the assistant"):
        processor((Message("user", (red,)), Message("user", (Text("how many?"),))))
    answer = model.ask(red.picture, "how many?", max_new_tokens=3)
    assert answer.usage["image_tokens"] == 1 and answer.usage["completion_tokens"] <= 3


def test_without_a_tokenizer_only_the_low_level_door_is_open(llava_folder: Path) -> None:
    (llava_folder / "tokenizer.json").unlink()
    model = sightline.load(llava_folder)
    ids = torch.tensor([[1, *[3] * 16, 7]])
    assert model.logits(input_ids=ids, pixel_values=torch.zeros(1, 3, 28, 28)).shape == (1, 18, 500)
    with pytest.raises(InputError, match="llava is a llava without a tokenizer, it reads no questions"):
        model.ask(None, "how many?")


@pytest.mark.parametrize(("settings", "starts"), [({}, True), ({"add_bos_token": False}, False)])
def test_a_folder_says_whether_its_tokenizer_begins_with_bos(
    llava_folder: Path, settings: dict[str, bool], starts: bool
) -> None:
    (llava_folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", **settings}))
    template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' if p.type == 'text' else '<image>' }}"
    )
    (llava_folder / "chat_template.jinja").write_text(template + "{% endfor %}{% endfor %}")
    processor = sightline.load(llava_folder).engine.processor
    example = processor(ask("how many?", Image(PIL.Image.new("RGB", (30, 30)))))
    assert (int(example.ids[0]) == processor.tokenizer.control("<s>")) is starts


def test_sizes_in_older_files_are_plain_numbers(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 336, "crop_size": 336, "resample": 2}))
    found = load_pipeline(tmp_path, FAMILIES["llava"].habits, 336)
    assert isinstance(found, CenterCrop)
    assert (found.shortest, found.crop, found.scaling.resample) == (336, 336, "bilinear")


def test_without_a_file_the_family_s_habit_is_taken(tmp_path: Path) -> None:
    wanted = {"llava": CenterCrop, "llava_llama": PadSquare, "paligemma": Square, "idefics": Square}
    assert {family: type(load_pipeline(tmp_path, FAMILIES[family].habits, 224)) for family in wanted} == wanted


def test_a_file_of_other_sizes_is_told(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 3}}))
    with pytest.raises(CheckpointError, match="sizes of pictures are not as expected"):
        load_pipeline(tmp_path, FAMILIES["llava"].habits, 224)


def test_a_template_without_a_place_for_pictures_is_the_language_model_s(llava_folder: Path) -> None:
    path = llava_folder / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"}))
    processor = sightline.load(llava_folder).engine.processor
    example = processor(ask("how many?", Image(PIL.Image.new("RGB", (30, 30)))))
    assert len(example.slots) == 16
    assert processor.tokenizer.decode(example.ids.tolist()).startswith("USER: ")
