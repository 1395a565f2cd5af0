"""The low-level door of published models: inputs are checked, answers do not depend on how they are asked for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.core.errors import CheckpointError, ConfigError, InputError
from sightline.core.patches import patchify
from sightline.zoo.checkpoint import read_tensors, write
from sightline.zoo.families import family_of
from sightline.zoo.published import Published, load_published

IMAGE, SLOTS = 49, 4
Get = Callable[[str], Published]


def prompt(images: int, length: int = 7, seed: int = 0) -> Tensor:
    """Ids [1, n]: the places of some pictures, then words."""
    words = torch.randint(3, IMAGE, (length,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.full((images * SLOTS,), IMAGE), words])[None]


def pixels(images: int) -> Tensor:
    return torch.randn(images, 3, 16, 16)


@pytest.fixture
def folder(published: Get, tmp_path: Path) -> Path:
    """A copy of a LLaVA's folder that a test may damage."""
    return Path(shutil.copytree(published("llava").folder, tmp_path / "llava"))


# -------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_value": pixels(1)}, "unknown input 'pixel_value'; did you mean 'pixel_values'?"),
        ({"attn_mask": torch.ones(1, 7)}, "unknown input 'attn_mask'; did you mean 'attention_mask'?"),
        ({"pixel_values": pixels(2)}, "4 image tokens in input_ids, the pictures need 8"),
        ({}, "4 image tokens in input_ids, but no pixel_values"),
    ],
)
def test_inputs_that_do_not_fit_are_told(published: Get, inputs: dict[str, Tensor], message: str) -> None:
    for call in (published("llava").logits, lambda **given: published("llava").generate_ids(3, **given)):
        with pytest.raises(InputError) as caught:
            call(input_ids=prompt(1), **inputs)
        assert str(caught.value) == message


@pytest.mark.parametrize("places", [0, 2])
def test_places_are_as_many_as_the_pictures_need(published: Get, places: int) -> None:
    with pytest.raises(InputError, match=f"{places * SLOTS} image tokens in input_ids, the pictures need 4"):
        published("llava").logits(input_ids=prompt(places), pixel_values=pixels(1))


def test_parts_alone_do_what_they_can(published: Get) -> None:
    llama, clip = published("llama"), published("clip")
    assert clip.features(pixels(2)).shape == published("llava").features(pixels(2)).shape == (2, 4, 16)
    with pytest.raises(InputError, match="a llama model takes no pixel_values"):
        llama.logits(input_ids=prompt(0), pixel_values=pixels(1))
    with pytest.raises(InputError, match="a llama model has no vision encoder"):
        llama.features(pixels(1))
    with pytest.raises(InputError, match="a clip_vision_model model writes no text"):
        clip.logits(input_ids=prompt(0))


@pytest.mark.parametrize("family", ["llava", "llama", "paligemma"])
def test_prompts_padded_on_the_right_are_not_continued(published: Get, family: str) -> None:
    ids, mask = torch.cat([prompt(0), prompt(0, seed=1)]), torch.ones(2, 7, dtype=torch.int64)
    mask[1, -2:] = 0
    with pytest.raises(InputError, match="padded on the right, expected padding on the left"):
        published(family).generate_ids(3, input_ids=ids, attention_mask=mask)


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(("family", "images"), [("llama", 0), ("llava", 0), ("llava", 2), ("paligemma", 1)])
def test_generated_ids_are_the_likeliest_of_the_logits(published: Get, family: str, images: int) -> None:
    """Token by token with a cache, as everything read anew; a prefix model is told where its answer begins."""
    model, ids = published(family), prompt(images)
    seen: dict[str, Any] = {"pixel_values": pixels(images)} if images else {}
    written = model.generate_ids(6, input_ids=ids, **seen)
    assert written.shape[0] == 1 and 1 <= written.shape[1] <= 6
    for t in range(written.shape[1]):
        more = torch.cat([ids, written[:, :t]], dim=1)
        types = torch.zeros_like(more)
        types[:, ids.shape[1] :] = 1
        logits = model.logits(input_ids=more, token_type_ids=types, **seen)
        assert logits.dtype == torch.float32
        assert int(logits[0, -1].argmax()) == int(written[0, t])


@torch.no_grad()
def test_what_answers_is_the_model_that_was_read(published: Get) -> None:
    """However a model is prepared to run, its numbers are those of the plain modules with the file's weights."""
    llava, llama, clip = (published(name) for name in ("llava", "llama", "clip"))
    inputs = {"input_ids": prompt(1), "pixel_values": pixels(1)}
    wanted = llava.model.logits(llava.model(llava.batch(**inputs)))
    torch.testing.assert_close(llava.logits(**inputs), wanted, atol=1e-5, rtol=1e-4)
    batch, decoder = llama.batch(input_ids=prompt(0)), llama.model
    wanted = decoder.logits(decoder(decoder.embed(batch.ids), batch.layout))
    torch.testing.assert_close(llama.logits(input_ids=prompt(0)), wanted, atol=1e-5, rtol=1e-4)
    seen = pixels(2)
    wanted = clip.model(patchify(seen, 8)).dense()
    torch.testing.assert_close(clip.features(seen), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llava", "paligemma"])
def test_padding_changes_nothing(published: Get, family: str) -> None:
    model, long, short = published(family), prompt(0, 9), prompt(0, 5, seed=1)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found = model.logits(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found[1:, 4:], model.logits(input_ids=short), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[:1], model.logits(input_ids=long), atol=1e-5, rtol=1e-4)
    together = model.generate_ids(5, input_ids=ids, attention_mask=mask)
    for row, alone in enumerate((long, short)):
        wanted = model.generate_ids(5, input_ids=alone)[0]
        assert torch.equal(together[row, : len(wanted)], wanted)


def test_rows_that_ended_are_filled_with_the_end_token(published: Get, folder: Path) -> None:
    """The end is what the model would write second; a file of generation settings goes before the configuration."""
    ids = torch.cat([prompt(0, seed=s) for s in range(6)])
    free = published("llava").generate_ids(6, input_ids=ids)
    end = int(free[0, 1])
    for settings, ends in (({"eos_token_id": end}, {end}), ({"eos_token_id": [end, 7]}, {end, 7})):
        (folder / "generation_config.json").write_text(json.dumps(settings))
        found = load_published(folder).generate_ids(6, input_ids=ids)
        for row, unbound in zip(found.tolist(), free[:, : found.shape[1]].tolist(), strict=True):
            stop = next((t + 1 for t, index in enumerate(unbound) if index in ends), len(unbound))
            assert row == unbound[:stop] + [end] * (len(unbound) - stop)
        assert found[0].tolist()[1:] == [end] * (found.shape[1] - 1)


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_saved_folder_is_the_one_that_was_read(published: Get, tmp_path: Path) -> None:
    for family in ("llama", "clip", "llava", "paligemma"):
        model = published(family)
        model.save(tmp_path / family)
        again, first = read_tensors(tmp_path / family), read_tensors(model.folder)
        assert set(again) == set(first)
        assert all(torch.equal(again[name], first[name]) for name in first)
        assert load_published(tmp_path / family).config == model.config


def test_every_parameter_tells_where_it_came_from(published: Get) -> None:
    model = published("llava")
    assert model.loaded_from == {name: str(model.folder) for name in model.model.state_dict()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"language_model.lm_head.weight": None}, "1 tensors are missing, such as language_model.lm_head.weight"),
        ({"language_model.extra": torch.ones(1)}, "1 tensors too many, such as language_model.extra"),
        (
            {"language_model.lm_head.weight": torch.ones(2, 2)},
            r"language_model.lm_head.weight is \[2, 2\], its config.json asks for \[50, 16\]",
        ),
        (
            {"vision_tower.vision_model.embeddings.patch_embedding.weight": torch.ones(16, 3, 7, 7)},
            r"patch_embedding.weight is \[16, 3, 7, 7\], its config.json asks for \[16, 3, 8, 8\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_told(folder: Path, change: dict[str, Tensor | None], message: str) -> None:
    tensors = {k: v for k, v in {**read_tensors(folder), **change}.items() if v is not None}
    write(folder, tensors, json.loads((folder / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=message):
        load_published(folder)


def test_a_key_that_is_missing_is_told(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: the key 'text_config' is missing"):
        load_published(folder)


def test_an_unknown_family_tells_the_nearest() -> None:
    with pytest.raises(ConfigError, match="the model type 'lava', which is not known; did you mean 'llava'"):
        family_of({"model_type": "lava"})
    assert family_of({"model_type": "llama", "mm_vision_tower": "x"}) == "llava_llama"
    assert family_of({"model_type": "llama"}) == "llama"
