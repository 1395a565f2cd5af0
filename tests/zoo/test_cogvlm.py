"""CogVLM and CogVLM2: inputs and conversations; their numbers are in tests/golden/test_families.py."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor

import sightline
from sightline.core.errors import ConfigError, InputError
from sightline.core.geometry import Box, Frame
from sightline.core.sequence import Conversation, Image, Message, Region, Text
from sightline.data.batch import collate
from sightline.data.images import CLIP_MEAN, CLIP_STD, Scaling, Square
from sightline.language.tokenizer import train_tokenizer
from sightline.model import VLM
from sightline.zoo import cogvlm
from sightline.zoo.checkpoint import read_tensors, write
from sightline.zoo.families import ROWS, family_of
from sightline.zoo.hollow import hollow
from sightline.zoo.published import Published, load_published

C: dict[str, Any] = {"architectures": ["CogVLMForCausalLM"], "vocab_size": 500, "hidden_size": 32}
C |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
C["vision_config"] = {"image_size": 28, "patch_size": 7, "hidden_size": 24, "num_hidden_layers": 1, "num_heads": 3}
C["vision_config"] |= {"intermediate_size": 40, "layer_norm_eps": 1e-6}
NEWER = {**C, "num_multi_query_heads": 2}
COUNT = {"cogvlm": 18, "cogvlm2": 6}  # 16 or 4, and one on either side
RED = Image(PIL.Image.new("RGB", (50, 40), "red"))
WHERE = Message("user", (RED, Text("where?")))
THERE = Message("assistant", (Text("there"),))


def published(folder: Path, c: dict[str, Any]) -> Path:
    """A random checkpoint whose every weight counts, with a tokenizer."""
    generator = torch.Generator().manual_seed(3)
    config = cogvlm.config(c)
    tensors = {k: torch.randn(v.shape, generator=generator) * 0.3 for k, v in VLM(config).state_dict().items()}
    write(folder, cogvlm.keys(config).save(tensors), c)
    newer = ("<|reserved_special_token_0|>", "<|begin_of_text|>", "<|end_of_text|>")
    controls = newer if cogvlm.newer(c) else ("<unk>", "<s>", "</s>")
    train_tokenizer(["Question: where is the cat? Answer: there"] * 30, 500, controls).save(folder)
    return folder


@pytest.fixture(scope="module", params=["cogvlm", "cogvlm2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("published") / request.param, C if request.param == "cogvlm" else NEWER)


@pytest.fixture
def model(folder: Path) -> Published:
    return load_published(folder)


def pixels(count: int) -> Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def row(folder: Path, *words: int, left: int = 0, right: int = 0) -> dict[str, list[int]]:
    """A picture and words after the first token, padded."""
    count = COUNT[folder.name]
    ids = [0] * left + [1] + [0] * count + list(words) + [0] * right
    kinds = [0] * (left + 1) + [1] * count + [0] * (len(words) + right)
    real = [0] * left + [1] * (1 + count + len(words)) + [0] * right
    return {"input_ids": ids, "token_type_ids": kinds, "attention_mask": real}


def inputs(*rows: dict[str, list[int]]) -> dict[str, Any]:
    given: dict[str, Any] = {key: torch.tensor([each[key] for each in rows]) for key in rows[0]}
    return given | {"images": [[picture] for picture in pixels(len(rows))]}


def test_its_class_tells_what_it_is() -> None:
    assert family_of(C) == "cogvlm" and family_of({"model_type": "cogvlm"}) == "cogvlm"


def test_what_is_saved_is_the_same_model(model: Published, folder: Path, tmp_path: Path) -> None:
    model.save(tmp_path)
    given = inputs(row(folder, 5, 6))
    assert torch.equal(load_published(tmp_path).logits(**given), model.logits(**given))
    wanted, found = (read_tensors(each) for each in (folder, tmp_path))
    assert set(found) == set(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_words_alone_touch_no_weight_of_vision(model: Published, folder: Path) -> None:
    ids = torch.tensor([[1, 5, 6, 7]])
    wanted = model.logits(input_ids=ids)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if name.startswith(("encoder.", "fusion.")) or ".vision." in name:
                parameter.fill_(float("nan"))
    assert torch.equal(model.logits(input_ids=ids), wanted)
    assert model.logits(**inputs(row(folder, 5))).isnan().any()


def test_padding_on_either_side_changes_nothing(model: Published, folder: Path) -> None:
    long = row(folder, 5, 6, 7, 8)
    alone = model.logits(**{**inputs(row(folder, 9)), "images": [[pixels(2)[1]]]})[0]
    for padded, real in ((row(folder, 9, left=3), slice(3, None)), (row(folder, 9, right=3), slice(0, -3))):
        found = model.logits(**inputs(long, padded))[1, real]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0.0)


def test_tokens_through_the_cache_are_those_of_the_whole(model: Published, folder: Path) -> None:
    given = inputs(row(folder, 5, 6))
    written = model.generate_ids(**given, max_new_tokens=6)
    whole = model.logits(**inputs(row(folder, 5, 6, *written[0].tolist())))
    assert torch.equal(whole[:, -7:-1].argmax(-1), written)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_in_other_precisions_it_answers_nearly_the_same(model: Published, folder: Path, precision: Any) -> None:
    given, rough = inputs(row(folder, 5, 6)), load_published(folder, precision)
    wanted, found = model.logits(**given)[0, -1], rough.logits(**given)[0, -1]
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    assert rough.generate_ids(**given, max_new_tokens=3).shape == (1, 3)


def test_every_pixel_counts(model: Published, folder: Path) -> None:
    batch = model.batch(**inputs(row(folder, 5), row(folder, 6)))
    batch.patches.values.requires_grad_()
    model.model(batch)[:, -1].square().sum().backward()
    assert all(grad.abs().max() > 1e-4 for grad in batch.patches.values.grad.unflatten(0, (2, 16)))


def test_pictures_without_their_places_are_told(model: Published, folder: Path) -> None:
    given, count = inputs(row(folder, 5)), COUNT[folder.name]
    for images, message in (
        ([list(pixels(2))], r"images: found \[2\] a row, expected at most 1 in 1 rows"),
        ([[pixels(1)[0]], []], r"images: found \[1, 0\] a row, expected at most 1 in 1 rows"),
        (None, f"{count} tokens of type 1 in token_type_ids, but no pixel_values"),
    ):
        with pytest.raises(InputError, match=message):
            model.logits(**{**given, "images": images})
    given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    with pytest.raises(InputError, match=f"0 tokens of type 1 in token_type_ids, the pictures need {count}"):
        model.logits(**given)
    two = {**inputs(row(folder, 5), row(folder, 6)), "images": [[torch.zeros(3, 28, 28)], [torch.zeros(3, 28, 14)]]}
    with pytest.raises(InputError, match="pictures of several sizes"):
        model.logits(**two)


# ----------------------------------------------------------------------------------------------------- conversations


def test_a_published_folder_answers_questions(folder: Path) -> None:
    model = sightline.load(folder)
    answer = model.ask(RED.picture, "where is the cat?", max_new_tokens=3)
    assert answer.usage["image_tokens"] == COUNT[folder.name] and answer.usage["completion_tokens"] <= 3
    processor = model.engine.processor
    assert processor.pixels == Square(28, Scaling(CLIP_MEAN, CLIP_STD, exact=True))
    assert processor.tokenizer.eos == ("</s>" if folder.name == "cogvlm" else "<|end_of_text|>")


def test_what_the_processor_writes_is_what_the_published_inputs_read(folder: Path) -> None:
    """Positions and kinds of tokens among them: a picture's patches share a position, its last token is a word's."""
    model = sightline.load(folder)
    example = model.engine.processor((WHERE,))
    kinds = torch.zeros_like(example.ids).index_fill(0, example.slots, 1)[None]
    given = {"input_ids": example.ids[None], "token_type_ids": kinds, "images": [[example.pixels[0]]]}
    runner = model.published.runner
    with torch.inference_mode():
        found = runner.logits(runner(collate([example], 7, 0)))
    torch.testing.assert_close(found, model.logits(**given), atol=1e-6, rtol=0.0)


def text_of(folder: Path, talk: Conversation) -> str:
    """What a conversation becomes, without the places of its picture."""
    processor = sightline.load(folder).engine.processor
    example = processor(talk)
    ids = [int(x) for i, x in enumerate(example.ids) if i not in example.slots.tolist()]
    assert example.slots.tolist() == list(range(1, 1 + len(example.slots)))
    return processor.tokenizer.decode(ids, skip_control=False)


@pytest.mark.parametrize(
    ("form", "talk", "wanted"),
    [
        ("chat", (WHERE,), "<s>Question: where? Answer:"),
        ("vqa", (WHERE,), "<s>Question: where? Short answer:"),
        ("base", (WHERE,), "<s>where?"),
        ("chat", (Message("user", (Text("where?"), RED)), THERE), "<s>Question: where? Answer:there</s>"),
        (
            "chat",
            (Message("user", (Text("Hi"),)), THERE, WHERE),
            "<s>Question: Hi Answer: there\nQuestion: where? Answer:",
        ),
    ],
)
def test_the_forms_of_a_conversation(tmp_path: Path, form: str, talk: Conversation, wanted: str) -> None:
    folder = published(tmp_path, {**C, "template_version": form})
    assert text_of(folder, talk) == wanted


def test_conversations_without_a_form_are_told(folder: Path) -> None:
    system = Message("system", (Text("Be brief."),))
    for form, talk, message in (
        ("chat", (system, WHERE), "no place for a system message"),
        ("chat", (WHERE, THERE, WHERE), "reads one picture, the conversation has 2"),
        ("base", (WHERE, THERE, Message("user", (Text("why?"),))), "answers one question, the conversation has 3"),
    ):
        with pytest.raises(InputError, match=message):
            cogvlm.template(form, "<s>", "</s>")(talk)
    c = json.loads((folder / "config.json").read_text())
    other = folder.parent / "other"
    write(other, read_tensors(folder), {**c, "template_version": "chatml"})
    train_tokenizer(["the cat"] * 30, 500, ("<unk>", "<s>", "</s>")).save(other)
    with pytest.raises(ConfigError, match="template_version 'chatml', expected one of 'chat', 'vqa', 'base'"):
        sightline.load(other)


def test_boxes_come_and_go_in_pixels_of_the_picture(folder: Path) -> None:
    processor = sightline.load(folder).engine.processor
    ids = processor.tokenizer.encode("the cat [[333,000,999,666]]")
    found = processor.read(ids, (processor.pixels.seen(PIL.Image.new("RGB", (150, 60))).way,))
    (box,) = found.boxes
    assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx((50, 0, 150, 40), abs=0.2)
    asked = Message("user", (RED, Text("what is "), Region(Box(5, 0, 25, 40, Frame(50, 40))), Text("?")))
    assert text_of(folder, (asked,)).endswith("Question: what is [[100,000,500,999]]? Answer:")


def test_the_published_sizes() -> None:
    """arXiv:2311.03079: 17 billion, of which 6.5 billion learn at first."""
    with hollow():
        first, second = (VLM(ROWS[name].model) for name in ("cogvlm-chat", "cogvlm2-llama3-chat-19b"))
    total = sum(p.numel() for p in first.parameters()) / 1e9
    learned = sum(p.numel() for n, p in first.named_parameters() if n.startswith("fusion.") or ".vision." in n) / 1e9
    assert (round(total, 1), round(learned, 1)) == (17.6, 6.6)
    frequencies = 32 * 64  # in the published file and not in ours
    assert (
        sum(p.numel() for p in second.parameters()) + frequencies
    ) * 2 == 39_006_214_656  # bytes that its index tells


def test_an_activation_that_it_does_not_compute_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_act is 'gelu', expected 'silu'"):
        cogvlm.config({**C, "hidden_act": "gelu"})
