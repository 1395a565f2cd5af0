"""Fuyu against transformers: pixels straight into the decoder, rows that end with a token."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from published_folders import IMAGE_TOKEN, TEXT, in_memory, picture, randomised, saved, write
from torch import Tensor
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

import sightline
from sightline.core.errors import ConfigError, InputError
from sightline.core.patches import patchify
from sightline.core.sequence import Image, Message, Text, ask
from sightline.data.native_resolution import FitWithin
from sightline.language.tokenizer import train_tokenizer
from sightline.zoo import fuyu as family
from sightline.zoo.describe import count
from sightline.zoo.families import ROWS
from sightline.zoo.published import Published, load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
PATCH = 5
NEWLINE = 97


def fuyu(**more: Any) -> Any:
    text = {**TEXT, "model_type": "persimmon", "rope_parameters": {"rope_theta": 25_000.0, "rope_type": "default"}}
    text["rope_parameters"]["partial_rotary_factor"] = 0.5
    config = hf.FuyuConfig(text_config=text | more, patch_size=PATCH, image_token_id=IMAGE_TOKEN)
    return randomised(hf.FuyuForCausalLM(config))


def inputs(*grids: tuple[int, int], seed: int = 2) -> dict[str, Tensor]:
    """A row for each picture of so many rows and columns; all are equally long."""
    words = torch.randint(3, 90, (len(grids), 40), generator=torch.Generator().manual_seed(1))
    longest = max(r * (c + 1) for r, c in grids) + 8
    lines = []
    for own, (r, c) in zip(words, grids, strict=True):
        line = torch.tensor([*[IMAGE_TOKEN] * c, NEWLINE])
        ids = torch.cat([own[:1], line.repeat(r), own])
        lines.append(ids[:longest])
    given = {"input_ids": torch.stack(lines)}
    total = sum(r * c for r, c in grids)
    if total:
        generator = torch.Generator().manual_seed(seed)
        given["pixel_values"] = torch.randn(1, total, 3 * PATCH * PATCH, generator=generator)
    return given


def logits(model: Any, **given: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Published]:
    theirs = fuyu()
    return theirs, load_published(saved(theirs, tmp_path_factory.mktemp("fuyu")))


@pytest.mark.parametrize("grids", [((2, 3),), ((4, 1), (2, 5)), ((0, 0),)])
def test_logits_and_greedy_tokens(pair: tuple[Any, Published], grids: tuple[tuple[int, int], ...]) -> None:
    theirs, ours = pair
    given = inputs(*grids)
    torch.testing.assert_close(ours.logits(**given), logits(theirs, **given), **TOLERANCE)
    with torch.no_grad():
        greedy = theirs.generate(**given, max_new_tokens=32, do_sample=False)[:, given["input_ids"].shape[1] :]
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy)
    if "pixel_values" in given:
        other = given | {"pixel_values": given["pixel_values"].flip(1)}
        assert (ours.logits(**other) - ours.logits(**given)).abs().max() > 0.01


def test_left_padded_batch(pair: tuple[Any, Published]) -> None:
    theirs, ours = pair
    given = inputs((2, 3), (1, 4))
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["input_ids"] = torch.cat([torch.zeros(2, 3, dtype=torch.int64), given["input_ids"]], dim=1)
    given["attention_mask"] = torch.cat([torch.tensor([[0] * 3, [1] * 3]), given["attention_mask"]], dim=1)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(ours.logits(**given)[real], logits(theirs, **given)[real], **TOLERANCE)


def test_the_older_inputs(pair: tuple[Any, Published]) -> None:
    """Patches of each row and, for each token, which of them stands there."""
    ours, given = pair[1], inputs((2, 3), (1, 4))
    values = torch.zeros(2, 6, 75)
    values[0], values[1, :4] = given["pixel_values"][0, :6], given["pixel_values"][0, 6:]
    there = given["input_ids"] == IMAGE_TOKEN
    indices = torch.where(there, there.cumsum(1) - 1, -1)
    older = {"input_ids": given["input_ids"], "image_patches": values, "image_patches_indices": indices}
    assert torch.equal(ours.logits(**older), ours.logits(**given))
    with pytest.raises(InputError, match="image_patches_indices up to 9 for"):
        ours.logits(**older | {"image_patches_indices": torch.where(there, 9, -1)})
    with pytest.raises(InputError, match="two names of one input"):
        ours.logits(**older, pixel_values=values)


def test_what_we_save_loads_in_transformers_and_here(pair: tuple[Any, Published], tmp_path: Path) -> None:
    theirs, ours = pair
    ours.save(tmp_path / "ours")
    again, told = hf.FuyuForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    given = inputs((2, 3))
    assert torch.equal(logits(again.eval(), **given), logits(theirs, **given))
    assert torch.equal(load_published(tmp_path / "ours").logits(**given), ours.logits(**given))


def test_inputs_that_contradict_each_other_are_told(pair: tuple[Any, Published]) -> None:
    ours, given = pair[1], inputs((2, 3))
    with pytest.raises(InputError, match=r"^6 image tokens in input_ids, the pictures need 5$"):
        ours.logits(**given | {"pixel_values": given["pixel_values"][:, 1:]})
    with pytest.raises(InputError, match=r"^6 image tokens in input_ids, but no pixel_values$"):
        ours.logits(input_ids=given["input_ids"])
    with pytest.raises(InputError, match=r"^pixel_values: found \[1, 3, 28, 28\], expected \[batch, patches, 75\]$"):
        ours.logits(**given | {"pixel_values": torch.zeros(1, 3, 28, 28)})


def test_the_published_size() -> None:
    row = ROWS["fuyu-8b"]
    with torch.device("meta"):
        theirs = hf.FuyuForCausalLM(hf.FuyuConfig())
    assert count(row.model) == sum(p.numel() for p in theirs.parameters())
    assert row.model.decoder.rope_theta == 25_000 and row.model.decoder.rotary_fraction == 0.5


# -------------------------------------------------------------------------------------------------------- processor


SMALL = {"size": {"height": 120, "width": 180}, "patch_size": {"height": 30, "width": 30}}


@pytest.mark.parametrize("size", [(50, 70), (60, 90), (31, 400), (400, 33), (777, 555), (180, 120), (1, 1)])
def test_pixels_as_the_published_processor(size: tuple[int, int]) -> None:
    processor = FuyuImageProcessorPil(**SMALL)
    made = processor(picture(*size))
    image = torch.as_tensor(np.asarray(made["images"][0][0]))
    ours = family.pixels(SMALL, 0).seen(picture(*size)).pixels[0]
    rows, columns = ours.shape[1] // 30, ours.shape[2] // 30
    unpadded = made["image_unpadded_heights"][0][0], made["image_unpadded_widths"][0][0]
    assert (rows, columns) == tuple(-(-side // 30) for side in unpadded)
    wanted = torch.as_tensor(processor.patchify_image(image[:, : rows * 30, : columns * 30].numpy()))
    patches = patchify(ours[None], 30).values
    assert (patches - family.channels_first(wanted, 3, 30)).abs().max() <= 2 / 255 + 1e-5


def test_a_box_keeps_its_place() -> None:
    ours = FitWithin(180, 120).seen(picture(360, 120))
    assert (ours.way.target.width, ours.way.target.height) == (180, 60)
    with pytest.raises(ConfigError, match="100x120 pixels, filled with 1, expected multiples of 30"):
        FitWithin(100, 120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random model with a tokenizer, in which the tokens of pictures are not told apart from words."""
    controls = ("<unk>", "<s>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|", "<0x04>")
    tokenizer = train_tokenizer(["what is in this picture?"] * 30, 400, controls)
    theirs = fuyu(vocab_size=400)
    c = theirs.config.to_dict() | {"image_token_id": tokenizer.control("|SPEAKER|")}
    names = {key.replace("model.language_model.", "language_model.model."): v for key, v in in_memory(theirs).items()}
    names = {key.replace("model.vision_embed_tokens", "vision_embed_tokens"): v for key, v in names.items()}
    write(tmp_path, c, {key.replace("lm_head", "language_model.lm_head"): v for key, v in names.items()})
    tokenizer.spec["added_tokens"] = [t for t in tokenizer.spec["added_tokens"] if t["content"] in controls[:3]]
    tokenizer.save(tmp_path)
    sizes = {"size": {"height": 20, "width": 30}, "patch_size": {"height": PATCH, "width": PATCH}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(sizes))
    return tmp_path


def test_a_conversation_as_the_model_reads_it(folder: Path) -> None:
    model = sightline.load(folder)
    processor = model.engine.processor
    example = processor(ask("what is it?\n", Image(picture(60, 31))))
    line = "|SPEAKER|" * 6 + "|NEWLINE|"
    assert processor.tokenizer.decode(example.ids.tolist(), skip_control=False) == line * 3 + "<s>what is it?\n<0x04>"
    given = {"input_ids": example.ids[None], "pixel_values": published(example.pixels[0])}
    batch = load_published(folder).batch(**given)
    assert torch.equal(batch.slots, example.slots)
    torch.testing.assert_close(batch.patches.values, patchify(example.pixels[0][None], PATCH).values)
    assert model.ask(picture(60, 31), "what?", max_new_tokens=3).usage["image_tokens"] == 18


def published(pixels: Tensor) -> Tensor:
    """Patches in (row, column, channel) order."""
    cut = patchify(pixels[None], PATCH).values.unflatten(1, (3, PATCH, PATCH))
    return cut.permute(0, 2, 3, 1).flatten(1)[None]


def test_nobody_types_a_token_of_pictures(folder: Path) -> None:
    processor = sightline.load(folder).engine.processor
    example = processor(ask("|SPEAKER| and |NEWLINE|"))
    assert processor.image_id not in example.ids.tolist()


def test_one_question_about_one_picture() -> None:
    image = Image(picture(9, 9))
    with pytest.raises(InputError, match="this model reads one picture, the question has 2"):
        family.template(ask("what?", image, image))
    with pytest.raises(InputError, match="this model answers one question"):
        family.template((*ask("what?", image, answer="this"), *ask("and?")))
    said = family.template(ask("what?", image, answer="this"))
    assert [part.text for part in said if getattr(part, "learned", False)] == ["this"]
    assert family.template((Message("user", (Text("what?"), image)),)) == family.template(ask("what?", image))
