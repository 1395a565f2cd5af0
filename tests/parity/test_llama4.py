"""Llama 4 as a whole against transformers: tiles, rotary encoder, folded patches, experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import IMAGE_TOKEN, TEXT, VISION, pixels, randomised, saved
from torch import Tensor

from sightline.core.errors import InputError
from sightline.zoo.describe import count
from sightline.zoo.families import ROWS
from sightline.zoo.published import Published, load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
SLOTS = 4  # (28 / 7) squared, four in one


def llama4() -> Any:
    folded = {"projector_input_dim": 20, "projector_output_dim": 20, "vision_output_dim": 20, "intermediate_size": 128}
    text = {**TEXT, "num_hidden_layers": 5, "head_dim": 8, "intermediate_size_mlp": 40, "num_local_experts": 3}
    text |= {"attention_chunk_size": 64, "interleave_moe_layer_step": 2, "max_position_embeddings": 512}
    config = hf.Llama4Config(
        vision_config={**VISION, **folded},
        text_config=text,
        image_token_index=IMAGE_TOKEN,
    )
    model = randomised(hf.Llama4ForConditionalGeneration(config))
    with torch.no_grad():  # larger, or little of the pictures would be left
        for parameter in [*model.vision_model.vision_adapter.parameters(), *model.multi_modal_projector.parameters()]:
            parameter.mul_(3)
    return model


def inputs(*tiles: int) -> dict[str, Tensor]:
    """Words around so many tiles each."""
    words = torch.randint(3, 90, (12,), generator=torch.Generator().manual_seed(1))
    parts = [words[:1]]
    for several in tiles:
        parts += [torch.full((several * SLOTS,), IMAGE_TOKEN), words[1:3]]
    given = {"input_ids": torch.cat([*parts, words[3:]])[None]}
    return given | ({"pixel_values": pixels(sum(tiles))} if tiles else {})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Published]:
    theirs = llama4()
    return theirs, load_published(saved(theirs, tmp_path_factory.mktemp("llama4")))


@pytest.mark.parametrize("tiles", [(), (1,), (5,), (1, 3), (16,)], ids=str)
def test_logits_and_greedy_tokens(pair: tuple[Any, Published], tiles: tuple[int, ...]) -> None:
    theirs, ours = pair
    given = inputs(*tiles)
    with torch.no_grad():
        wanted = theirs(**given).logits
        greedy = theirs.generate(**given, max_new_tokens=32, do_sample=False)[:, given["input_ids"].shape[1] :]
    torch.testing.assert_close(ours.logits(**given), wanted, **TOLERANCE)
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy)
    if tiles:
        other = {**given, "pixel_values": pixels(sum(tiles), seed=5)}
        assert (ours.logits(**other) - wanted).abs().max() > 0.01  # the pictures are seen


def test_what_we_save_loads_in_transformers(pair: tuple[Any, Published], tmp_path: Path) -> None:
    theirs, ours = pair
    ours.save(tmp_path)
    again, told = hf.Llama4ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs(2)).logits, theirs(**inputs(2)).logits)


def test_pictures_and_places_must_match(pair: tuple[Any, Published]) -> None:
    with pytest.raises(InputError, match="4 image tokens in input_ids, the pictures need 8"):
        pair[1].logits(**inputs(1) | {"pixel_values": pixels(2)})


def test_the_published_size() -> None:
    row = ROWS["llama-4-scout"]
    text = {key: value for key, value in row.config["text_config"].items() if not key.startswith("rope")}
    with torch.device("meta"):
        config = hf.Llama4Config(vision_config=row.config["vision_config"], text_config=text)
        theirs = hf.Llama4ForConditionalGeneration(config)
    assert count(row.model) == sum(p.numel() for p in theirs.parameters())
