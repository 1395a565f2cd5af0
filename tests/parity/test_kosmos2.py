"""Kosmos-2 against transformers: one picture, several, none; a mask tells where they go, whatever the ids there."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import VISION, llava, pixels, randomised, saved
from torch import Tensor

from sightline.core.errors import InputError
from sightline.zoo.describe import count
from sightline.zoo.families import ROWS
from sightline.zoo.published import Published, load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
QUERIES, LENGTH = 5, 26
TEXT: dict[str, Any] = {"embed_dim": 32, "layers": 2, "attention_heads": 4, "ffn_dim": 48, "vocab_size": 99}
TEXT |= {"max_position_embeddings": 256, "eos_token_id": None}


def kosmos() -> Any:
    config = hf.Kosmos2Config(text_config=TEXT, vision_config=VISION, latent_query_num=QUERIES)
    model = randomised(hf.Kosmos2ForConditionalGeneration(config))
    with torch.no_grad():  # larger, or features of length one leave little behind the map
        for parameter in model.image_to_text_projection.parameters():
            parameter.mul_(3)
    return model


def inputs(*pictures: int) -> dict[str, Tensor]:
    """A row of words for each number, with the places of so many pictures in it."""
    ids = torch.randint(3, 99, (len(pictures), LENGTH), generator=torch.Generator().manual_seed(3))
    given = {"input_ids": ids}
    if any(pictures):
        mask = torch.zeros_like(ids)
        for row, several in enumerate(pictures):
            for k in range(several):
                mask[row, 6 + 7 * k : 6 + 7 * k + QUERIES] = 1
        given |= {"image_embeds_position_mask": mask, "pixel_values": pixels(sum(pictures))}
    return given


def logits(model: Any, **given: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def greedy(model: Any, **given: Tensor) -> Tensor:
    with torch.no_grad():
        return model.generate(**given, max_new_tokens=32, do_sample=False)[:, given["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Published]:
    theirs = kosmos()
    return theirs, load_published(saved(theirs, tmp_path_factory.mktemp("kosmos2")))


@pytest.mark.parametrize("pictures", [(1,), (1, 2)])
def test_logits_and_greedy_tokens(pair: tuple[Any, Published], pictures: tuple[int, ...]) -> None:
    theirs, ours = pair
    given = inputs(*pictures)
    wanted = logits(theirs, **given)
    torch.testing.assert_close(ours.logits(**given), wanted, **TOLERANCE)
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy(theirs, **given))
    other = {**given, "pixel_values": pixels(sum(pictures), seed=5)}
    assert (ours.logits(**other) - wanted).abs().max() > 0.01  # the pictures are seen


def test_no_picture(pair: tuple[Any, Published]) -> None:
    """The published model as a whole asks for a picture; its language model answers without one."""
    theirs, ours = pair
    given = inputs(0, 0)
    torch.testing.assert_close(ours.logits(**given), logits(theirs.text_model, **given), **TOLERANCE)
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy(theirs.text_model, **given))
    marked = given | {"image_embeds_position_mask": torch.zeros_like(given["input_ids"])}
    assert torch.equal(ours.logits(**marked), ours.logits(**given))


def test_left_padded_batch(pair: tuple[Any, Published]) -> None:
    """transformers counts the padding as it goes on writing, so that answers are compared with each row's alone."""
    theirs, ours = pair
    given = inputs(1, 2)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][0, :4], given["input_ids"][0, :4] = 0, 1
    real = given["attention_mask"].bool()
    torch.testing.assert_close(ours.logits(**given)[real], logits(theirs, **given)[real], **TOLERANCE)
    alone = {name: given[name][:1, 4:] for name in ("input_ids", "image_embeds_position_mask")}
    wanted = greedy(theirs, **alone, pixel_values=given["pixel_values"][:1])
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32)[:1], wanted)


def test_ids_below_a_picture_do_not_matter(pair: tuple[Any, Published]) -> None:
    given = inputs(1)
    below = given["image_embeds_position_mask"].bool()
    other = {**given, "input_ids": given["input_ids"].masked_fill(below, 7)}
    assert torch.equal(pair[1].logits(**other), pair[1].logits(**given))


def test_what_we_save_loads_in_transformers(pair: tuple[Any, Published], tmp_path: Path) -> None:
    theirs, ours = pair
    ours.save(tmp_path)
    again, told = hf.Kosmos2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    given = inputs(1, 2)
    assert torch.equal(logits(again.eval(), **given), logits(theirs, **given))


def test_inputs_that_contradict_each_other_are_told(pair: tuple[Any, Published], tmp_path: Path) -> None:
    ours, given = pair[1], inputs(1)
    mask = given["image_embeds_position_mask"]
    few = mask.clone()
    few[0, 6:8] = 0
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image_embeds_position_mask": few}, "3 image tokens in image_embeds_position_mask, the pictures need 5"),
        ({"image_embeds_position_mask": None}, "0 image tokens in image_embeds_position_mask, the pictures need 5"),
        ({"pixel_values": None}, "5 image tokens in image_embeds_position_mask, but no pixel_values"),
        (
            {"image_embeds_position_mask": mask[:, 1:]},
            "image_embeds_position_mask is [1, 25], expected [1, 26] as input_ids",
        ),
    ]
    for change, message in cases:
        with pytest.raises(InputError) as caught:
            ours.logits(**given | change)
        assert str(caught.value) == message
    with pytest.raises(InputError, match="a llava model takes no image_embeds_position_mask"):
        load_published(saved(llava(), tmp_path)).logits(**given)


def test_the_published_size() -> None:
    """What the published configuration class builds by default is the published model."""
    with torch.device("meta"):
        theirs = hf.Kosmos2ForConditionalGeneration(hf.Kosmos2Config())
    assert count(ROWS["kosmos-2-patch14-224"].model) == sum(p.numel() for p in theirs.parameters())
