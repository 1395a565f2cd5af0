"""Qwen-VL: its inputs, its conversations and its words; its numbers are in tests/golden/test_families.py."""

import base64
import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor

import sightline
from sightline.core.errors import InputError
from sightline.core.geometry import Box, Frame
from sightline.core.sequence import Conversation, Image, Message, Region, Text
from sightline.data.batch import collate
from sightline.data.images import CLIP_MEAN, CLIP_STD, Scaling, Square
from sightline.data.template import Control, End, Words
from sightline.model import VLM
from sightline.zoo import qwen_vl
from sightline.zoo.checkpoint import read_tensors, write
from sightline.zoo.families import ROWS, family_of
from sightline.zoo.hollow import hollow
from sightline.zoo.published import Published, load_published

PIECES = ("th", "he", "the", " the", "wh", "er", "ere", "where", "\n\n")
BEGIN = 256 + len(PIECES) + 208 + 6  # `<img>`
C: dict[str, Any] = {"model_type": "qwen", "vocab_size": 520, "hidden_size": 32, "num_hidden_layers": 2}
C |= {"num_attention_heads": 4, "kv_channels": 8, "intermediate_size": 48, "max_position_embeddings": 256}
C["visual"] = {"image_size": 28, "patch_size": 7, "width": 24, "layers": 1, "heads": 3, "mlp_ratio": 2, "n_queries": 4}
C["visual"] |= {"output_dim": 32, "image_start_id": BEGIN}
PICTURE = [BEGIN, 7, 7, 7, 7, BEGIN + 1]
RED = Image(PIL.Image.new("RGB", (50, 40), "red"))


def published(folder: Path) -> Path:
    """A random checkpoint whose every weight counts, with words in a file of tiktoken."""
    generator = torch.Generator().manual_seed(3)
    config = qwen_vl.config(C)
    tensors = {k: torch.randn(v.shape, generator=generator) * 0.3 for k, v in VLM(config).state_dict().items()}
    write(folder, qwen_vl.keys(config).save(tensors), C)
    tokens = [*(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in PIECES)]
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    (folder / "qwen.tiktoken").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("published") / "qwen-vl")


@pytest.fixture
def model(folder: Path) -> Published:
    return load_published(folder)


def pixels(count: int) -> Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def test_a_part_tells_it_from_a_bare_qwen() -> None:
    assert family_of(C) == "qwen_vl"
    assert family_of({key: value for key, value in C.items() if key != "visual"}) == "qwen"


def test_what_is_saved_is_the_same_model(model: Published, folder: Path, tmp_path: Path) -> None:
    model.save(tmp_path)
    again = load_published(tmp_path)
    given = {"input_ids": torch.tensor([[5, *PICTURE, 9]]), "pixel_values": pixels(1)}
    assert torch.equal(again.logits(**given), model.logits(**given))
    assert again.config == model.config
    wanted, found = (read_tensors(f) for f in (folder, tmp_path))
    assert set(found) == set(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_words_alone_touch_no_weight_of_vision(model: Published) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    wanted = model.logits(input_ids=ids)
    with torch.no_grad():
        for part in (model.model.encoder, model.model.fusion):
            for parameter in part.parameters():
                parameter.fill_(float("nan"))
    assert torch.equal(model.logits(input_ids=ids), wanted)
    assert model.logits(input_ids=torch.tensor([PICTURE]), pixel_values=pixels(1)).isnan().any()


def test_padding_on_either_side_changes_nothing(model: Published) -> None:
    long, short = [5, *PICTURE, 6, 7, 8], [*PICTURE, 9]
    gap = [0] * (len(long) - len(short))
    alone = model.logits(input_ids=torch.tensor([short]), pixel_values=pixels(2)[1:])[0]
    for row, real in (([*gap, *short], slice(len(gap), None)), ([*short, *gap], slice(0, len(short)))):
        mask = torch.ones(2, len(long), dtype=torch.int64)
        mask[1] = 0
        mask[1, real] = 1
        given = {"input_ids": torch.tensor([long, row]), "attention_mask": mask, "pixel_values": pixels(2)}
        torch.testing.assert_close(model.logits(**given)[1, real], alone, atol=1e-5, rtol=0.0)


def test_tokens_through_the_cache_are_those_of_the_whole(model: Published) -> None:
    ids, seen = torch.tensor([[5, *PICTURE, 9]]), pixels(1)
    written = model.generate_ids(input_ids=ids, pixel_values=seen, max_new_tokens=6)
    whole = model.logits(input_ids=torch.cat([ids, written], dim=1), pixel_values=seen)
    assert torch.equal(whole[:, -7:-1].argmax(-1), written)


def test_every_pixel_counts(model: Published) -> None:
    batch = model.batch(input_ids=torch.tensor([[*PICTURE, 5, *PICTURE, 9]]), pixel_values=pixels(2))
    batch.patches.values.requires_grad_()
    model.model(batch)[0, -1].square().sum().backward()
    assert all(grad.abs().max() > 1e-4 for grad in batch.patches.values.grad.unflatten(0, (2, 16)))


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        ([BEGIN, 7, 7, 7, 7, 5], 1, "do not come in pairs"),
        ([BEGIN + 1, 7, 7, 7, 7, BEGIN], 1, "do not come in pairs"),
        ([BEGIN, BEGIN, 7, 7, 7, BEGIN + 1], 1, "do not come in pairs"),
        (
            [BEGIN, 7, 7, 7, BEGIN + 1, BEGIN, 7, 7, 7, 7, 7, BEGIN + 1],
            2,
            r"\[3, 5\] ids .*, the pictures need \[4, 4\]",
        ),
        (PICTURE, 2, r"\[4\] ids between <img> and </img>, the pictures need \[4, 4\]"),
        (PICTURE, 0, "4 image tokens in input_ids, but no pixel_values"),
    ],
)
def test_pictures_without_a_place_of_their_size_are_told(
    model: Published, ids: list[int], count: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.logits(input_ids=torch.tensor([ids]), **({"pixel_values": pixels(count)} if count else {}))


# -------------------------------------------------------------------------------------- conversations and their words


def test_a_published_folder_answers_questions(folder: Path) -> None:
    model = sightline.load(folder)
    answer = model.ask(RED.picture, "where is the cat?", max_new_tokens=3)
    assert answer.usage["image_tokens"] == 4 and answer.usage["completion_tokens"] <= 3
    processor = model.engine.processor
    assert processor.pixels == Square(28, Scaling(CLIP_MEAN, CLIP_STD, exact=True))
    assert processor.tokenizer.eos == "<|im_end|>"


@pytest.mark.parametrize(
    ("talk", "wanted"),
    [
        (
            (Message("user", (RED, Text("where?"))),),
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nPicture 1: <img>????</img>\nwhere?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            (
                Message("system", (Text("Be brief."),)),
                Message("user", (Text("Hi"),)),
                Message("assistant", (Text("Hello"),)),
                Message("user", (RED, RED, Text("\nwhere?"))),
            ),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nPicture 1: <img>????</img>\nPicture 2: <img>????</img>\n\nwhere?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
    ids=["one turn", "two turns"],
)
def test_the_chat_model_reads_chatml(folder: Path, talk: Conversation, wanted: str) -> None:
    processor = sightline.load(folder).engine.processor
    example = processor(talk)
    assert processor.tokenizer.decode(example.ids.tolist(), skip_control=False).replace("<imgpad>", "?") == wanted
    assert example.ids[example.slots].tolist() == [BEGIN + 2] * len(example.slots)


def test_a_role_s_line_break_is_not_joined_with_the_text_s() -> None:
    segments = qwen_vl.chatml((Message("user", (Text("\nwhere?"),)),))
    assert segments[5:9] == [Control("<|im_start|>"), Words("user\n"), Words("\nwhere?"), Control("<|im_end|>")]


def test_what_the_processor_writes_is_what_the_published_inputs_read(folder: Path) -> None:
    model = sightline.load(folder)
    example = model.engine.processor((Message("user", (RED, Text("where?"), RED)),))
    batch = collate([example], 7, 0)
    runner = model.published.runner
    wanted = model.logits(input_ids=example.ids[None], pixel_values=torch.stack(example.pixels))
    with torch.inference_mode():
        torch.testing.assert_close(runner.logits(runner(batch)), wanted, atol=1e-6, rtol=0.0)


def test_an_answer_s_boxes_are_in_pixels_of_the_picture(folder: Path) -> None:
    processor = sightline.load(folder).engine.processor
    ids = processor.tokenizer.trusted("<ref>the cat</ref><box>(333,0),(999,666)</box><|im_end|>")
    found = processor.read(ids, (processor.pixels.seen(PIL.Image.new("RGB", (150, 60))).way,))
    (box,) = found.boxes
    assert (box.label, found.text) == ("the cat", "the cat")
    assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx((50, 0, 150, 40), abs=0.1)


def test_a_question_may_name_a_place(folder: Path) -> None:
    box = Box(50, 0, 150, 40, Frame(50, 40), "it").clipped()
    processor = sightline.load(folder).engine.processor
    ids = processor((Message("user", (RED, Region(box), Text(" what?"))),)).ids.tolist()
    assert "<ref>it</ref><box>(999,0),(999,999)</box> what?" in processor.tokenizer.decode(ids, skip_control=False)


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        (
            "chatml",
            "<|im_start|>user\nPicture 1: <img>????</img>\n框出图中the cat的位置<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("raw", "<img>????</img><ref>the cat</ref><box>"),
    ],
)
def test_how_it_is_asked_for_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, wanted: str) -> None:
    folder = published(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": form, "eos_token_id": 265}))
    model = sightline.load(folder)
    processor, asked = model.engine.processor, []
    answer = model.engine.answer
    monkeypatch.setattr(model.engine, "answer", lambda talks, sampling: asked.extend(talks) or answer(talks, sampling))
    model.detect(RED.picture, "the cat", max_new_tokens=2)
    ids = processor(asked[0]).ids.tolist()
    assert processor.tokenizer.decode(ids, skip_control=False).replace("<imgpad>", "?").endswith(wanted)
    controls = [processor.tokenizer.control(name) for name in ("<ref>", "</ref>", "<box>")]
    assert [index for index in ids if index in controls] == (controls if form == "raw" else [])


def test_an_answer_is_learned_with_its_end_and_line_break(folder: Path) -> None:
    processor = sightline.load(folder).engine.processor
    example = processor((Message("user", (RED, Text("where?"))), Message("assistant", (Text("there"),))))
    learned = example.labels[example.labels >= 0].tolist()
    assert processor.tokenizer.decode(learned, skip_control=False) == "there<|im_end|>\n"


def test_the_model_without_a_chat_continues_text(tmp_path: Path) -> None:
    folder = published(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "raw", "eos_token_id": 265}))
    model = sightline.load(folder)
    processor = model.engine.processor
    talk = (Message("user", (RED, Text("the cat:"))), Message("assistant", (Text("there"),)))
    text = processor.tokenizer.decode(processor(talk).ids.tolist(), skip_control=False)
    assert text.replace("<imgpad>", "?") == "<img>????</img>the cat:there<|endoftext|>"
    assert processor.tokenizer.eos == "<|endoftext|>" and processor.tokenizer.control("<|endoftext|>") == 265
    assert model.ask(RED.picture, "the cat:", max_new_tokens=2).usage["image_tokens"] == 4
    for more in ((Message("system", (Text("Hi"),)), talk[0]), (*talk, talk[0])):
        with pytest.raises(InputError, match="this model continues one text"):
            qwen_vl.raw(more)
    assert qwen_vl.raw(talk)[-1] == End("<|endoftext|>")


def test_control_tokens_have_their_published_ids() -> None:
    ids = {name: 151_643 + i for i, name in enumerate(qwen_vl.CONTROLS)}
    assert (ids["<|im_end|>"], ids["<ref>"], ids["<img>"], ids["<imgpad>"]) == (151_645, 151_851, 151_857, 151_859)


def test_the_published_size() -> None:
    cfg = ROWS["qwen-vl-chat"].model
    assert cfg.image.image_size == 448 and cfg.image.grid == 32
    with hollow():
        model = VLM(cfg)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) * 2 == 19_313_870_336  # bytes in bfloat16
