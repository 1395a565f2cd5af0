"""Aria against transformers: small and large pictures, one, several, none; experts and bucketed positions."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import IMAGE_TOKEN, TEXT, VISION, pixels, randomised, saved
from torch import Tensor

from sightline.core.errors import ConfigError, InputError
from sightline.zoo import aria as family
from sightline.zoo.describe import count
from sightline.zoo.families import ROWS
from sightline.zoo.published import Published, load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
QUERIES = {42: 5, 21: 3}  # by the side of a picture: 36 patches or 9
EXPERTS = {"moe_num_experts": 5, "moe_topk": 2, "moe_num_shared_experts": 2}


def aria(**more: Any) -> Any:
    config = hf.AriaConfig(
        text_config={**TEXT, **EXPERTS, "model_type": "aria_text"},
        vision_config={**VISION, "image_size": 42, "model_type": "idefics3_vision"},
        projector_patch_to_query_dict={"9": 3, "36": 5},
        image_token_index=IMAGE_TOKEN,
        **more,
    )
    model = randomised(hf.AriaForConditionalGeneration(config))
    with torch.no_grad():  # larger, or little of the pictures would be left behind the norms
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(3)
    return model


def inputs(*pictures: int, side: int = 42) -> dict[str, Tensor]:
    """A row of words for each number, with the places of so many pictures in it; rows are equally long."""
    generator = torch.Generator().manual_seed(3)
    slots, length = torch.full((QUERIES[side],), IMAGE_TOKEN), 12 + max(pictures) * QUERIES[side]
    rows = []
    for several in pictures:
        words = torch.randint(3, 90, (length - several * QUERIES[side],), generator=generator)
        rows.append(torch.cat([words[:2], *[slots] * several, words[2:]]))
    given = {"input_ids": torch.stack(rows)}
    return given | ({"pixel_values": pixels(sum(pictures), side)} if any(pictures) else {})


def logits(model: Any, **given: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Published]:
    theirs = aria()
    return theirs, load_published(saved(theirs, tmp_path_factory.mktemp("aria")))


@pytest.mark.parametrize("side", QUERIES)
@pytest.mark.parametrize("pictures", [(1,), (1, 2), (0, 0)])
def test_logits_and_greedy_tokens(pair: tuple[Any, Published], pictures: tuple[int, ...], side: int) -> None:
    theirs, ours = pair
    given = inputs(*pictures, side=side)
    wanted = logits(theirs, **given)
    torch.testing.assert_close(ours.logits(**given), wanted, **TOLERANCE)
    with torch.no_grad():
        greedy = theirs.generate(**given, max_new_tokens=32, do_sample=False)[:, given["input_ids"].shape[1] :]
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy)
    if any(pictures):
        other = {**given, "pixel_values": pixels(sum(pictures), side, seed=5)}
        assert (ours.logits(**other) - wanted).abs().max() > 0.01  # the pictures are seen


@pytest.mark.parametrize("shape", [(42, 42), (21, 21), (14, 35), (70, 28), (77, 49)])
def test_features_of_any_grid(pair: tuple[Any, Published], shape: tuple[int, int]) -> None:
    theirs, ours = pair
    images = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        wanted = theirs.model.vision_tower(images, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(ours.features(images), wanted, **TOLERANCE)


def test_buckets_are_rounded_as_published(pair: tuple[Any, Published]) -> None:
    """At the published size the fractions of some places round to the place before."""
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    from sightline.encoders.plane import buckets

    config = hf.models.idefics3.configuration_idefics3.Idefics3VisionConfig
    theirs = Idefics3VisionEmbeddings(config(hidden_size=1, image_size=70, patch_size=1, num_attention_heads=1)).eval()
    with torch.no_grad():
        theirs.patch_embedding.weight.zero_()
        theirs.patch_embedding.bias.zero_()
        theirs.position_embedding.weight.copy_(torch.arange(4900.0)[:, None])
        for rows, columns in ((70, 70), (35, 35), (33, 61)):
            mask = torch.ones(1, rows, columns, dtype=torch.bool)
            wanted = theirs(torch.zeros(1, 3, rows, columns), patch_attention_mask=mask)[0, :, 0].long()
            found = 70 * buckets(rows, 70)[:, None] + buckets(columns, 70)
            assert torch.equal(found.flatten(), wanted)


def test_left_padded_batch(pair: tuple[Any, Published]) -> None:
    theirs, ours = pair
    given = inputs(1, 2)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["input_ids"] = torch.cat([torch.zeros(2, 3, dtype=torch.int64), given["input_ids"]], dim=1)
    given["input_ids"][1, :3] = 7
    given["attention_mask"] = torch.cat([torch.tensor([[0] * 3, [1] * 3]), given["attention_mask"]], dim=1)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(ours.logits(**given)[real], logits(theirs, **given)[real], **TOLERANCE)


@pytest.mark.parametrize("side", QUERIES)
def test_what_only_fills_a_picture_up_is_not_seen(pair: tuple[Any, Published], side: int) -> None:
    """Pictures that fill part of their square, not all in whole patches, beside one that fills it."""
    theirs, ours = pair
    given = inputs(1, 2, side=side)
    mask = torch.zeros(3, side, side, dtype=torch.bool)
    mask[0, :9], mask[1, :, :15], mask[2] = True, True, True
    given["pixel_mask"] = mask
    wanted = logits(theirs, **given)
    torch.testing.assert_close(ours.logits(**given), wanted, **TOLERANCE)
    with torch.no_grad():
        greedy = theirs.generate(**given, max_new_tokens=16, do_sample=False)[:, given["input_ids"].shape[1] :]
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=16), greedy)
    del given["pixel_mask"]
    assert (ours.logits(**given) - wanted).abs().max() > 0.01


def test_what_we_save_loads_in_transformers(pair: tuple[Any, Published], tmp_path: Path) -> None:
    theirs, ours = pair
    ours.save(tmp_path)
    again, told = hf.AriaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    given = inputs(1, 2)
    assert torch.equal(logits(again.eval(), **given), logits(theirs, **given))


def test_inputs_that_contradict_each_other_are_told(pair: tuple[Any, Published]) -> None:
    given = inputs(1)
    with pytest.raises(InputError, match=r"^5 image tokens in input_ids, the pictures need 3$"):
        pair[1].logits(**given | {"pixel_values": pixels(1, 21)})
    with pytest.raises(ConfigError, match=r"^a picture in a square of 16 patches, this pool knows 9, 36$"):
        pair[1].logits(**given | {"pixel_values": pixels(1, 28)})
    with pytest.raises(InputError, match=r"^pixel_mask is \[1, 4\], expected \[1, 42, 42\]$"):
        pair[1].logits(**given, pixel_mask=torch.ones(1, 4))
    with pytest.raises(InputError, match=r"^pixel_mask is \[1, 4\], expected pixel_values with it$"):
        pair[1].logits(input_ids=given["input_ids"], pixel_mask=torch.ones(1, 4))
    hole = torch.ones(1, 42, 42)
    hole[0, 0, 3] = 0
    with pytest.raises(InputError, match="a picture must fill one rectangle"):
        pair[1].logits(**given, pixel_mask=hole)
    with pytest.raises(ConfigError, match="vision_feature_layer is -2, expected -1"):
        family.config({"vision_feature_layer": -2})


def test_the_published_size() -> None:
    row = ROWS["aria"]
    text = {key: value for key, value in row.config["text_config"].items() if key != "rope_theta"}
    vision = {**row.config["vision_config"], "model_type": "idefics3_vision"}
    with torch.device("meta"):
        theirs = hf.AriaForConditionalGeneration(hf.AriaConfig(text_config=text, vision_config=vision))
    assert count(row.model) == sum(p.numel() for p in theirs.parameters())
