"""IDEFICS against transformers: any mask over tokens and pictures, pictures that only fill a row up, none at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import TEXT, VISION, pixels, randomised, saved
from torch import Tensor

from sightline.core.errors import ConfigError, InputError
from sightline.zoo.published import Published, load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
LENGTH = 14
PERCEIVER = {"resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 12}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "resampler": {"use_resampler": True, "num_hidden_layers": 4},
    "published": {"use_resampler": True, "qk_layer_norms": True, "additional_vocab_size": 3, "perceiver": True},
    "vector gates": {"alpha_type": "vector", "cross_layer_interval": 1, "additional_vocab_size": 1},
}


def idefics(**more: Any) -> Any:
    tower = {**VISION, "embed_dim": VISION["hidden_size"], "hidden_act": "gelu"}
    tower.pop("hidden_size")
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    perceiver = {**PERCEIVER, "qk_layer_norms_perceiver": more.pop("perceiver", False)}
    text |= {"cross_layer_interval": 2, "additional_vocab_size": 2, **more}
    config = hf.IdeficsConfig(**text, vision_config=tower, perceiver_config=perceiver)
    model = randomised(hf.IdeficsForVisionText2Text(config))
    with torch.no_grad():  # what is seen comes through several products of small weights
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("vision_model", "perceiver", "cross_attn")):
                parameter.mul_(5)
    return model


def inputs(pictures: int, rows: int = 2, seed: int = 3, extra: int = 1) -> dict[str, Tensor]:
    """Random ids, some of them above the language model's; every token looks at some of the pictures or none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99 + extra, (rows, LENGTH), generator=generator)
    ids[:, 5] = 99  # one above in any case
    mask = torch.randint(0, 2, (rows, LENGTH, pictures), generator=generator)
    mask[:, :2] = 0  # before any picture
    images = pixels(rows * pictures).unflatten(0, (rows, pictures))
    return {"input_ids": ids, "pixel_values": images, "image_attention_mask": mask}


def compare(theirs: Any, ours: Published, **given: Tensor) -> None:
    """Logits within 1e-4 and 32 greedy tokens equal."""
    length = given["input_ids"].shape[1]
    with torch.no_grad():
        wanted = theirs(**given).logits
        greedy = theirs.generate(**given, max_new_tokens=32, do_sample=False)[:, length:]
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    torch.testing.assert_close(ours.logits(**given)[real], wanted[real], **TOLERANCE)
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Published]:
    theirs = idefics(**dict(VARIANTS[request.param]))
    return theirs, load_published(saved(theirs, tmp_path_factory.mktemp("idefics")))


@pytest.mark.parametrize("pictures", [1, 3])
def test_any_mask(pair: tuple[Any, Published], pictures: int) -> None:
    compare(*pair, **inputs(pictures))


def test_the_latest_picture_as_its_processor_writes_it(pair: tuple[Any, Published]) -> None:
    given = inputs(2)
    given["image_attention_mask"] = torch.zeros(2, LENGTH, 2, dtype=torch.int64)
    given["image_attention_mask"][:, 3:8, 0] = given["image_attention_mask"][:, 8:, 1] = 1
    given["image_attention_mask"][1, :, 1] = 0  # the second row has one picture, and one that fills it up
    compare(*pair, **given)


def test_left_padded_batch(pair: tuple[Any, Published]) -> None:
    given = inputs(2)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][0, :4] = 0
    compare(*pair, **given)


def test_no_picture(pair: tuple[Any, Published], monkeypatch: pytest.MonkeyPatch) -> None:
    """The published processor then gives one black picture that nothing looks at; no weight of seeing is touched."""
    theirs, ours = pair
    given = inputs(1)
    given["pixel_values"], given["image_attention_mask"] = torch.zeros(2, 1, 3, 28, 28), torch.zeros(2, LENGTH, 1)
    compare(theirs, ours, **given)
    monkeypatch.setattr(type(ours.runner.encoder), "forward", lambda *_: pytest.fail("an encoder saw no picture"))
    with torch.no_grad():
        wanted = theirs(**given).logits
    torch.testing.assert_close(ours.logits(input_ids=given["input_ids"]), wanted, **TOLERANCE)
    torch.testing.assert_close(ours.logits(**given), wanted, **TOLERANCE)


def test_pictures_matter(pair: tuple[Any, Published]) -> None:
    given = inputs(1)
    other = given | {"pixel_values": given["pixel_values"].flip(0)}
    assert float((pair[1].logits(**given) - pair[1].logits(**other)).abs().max()) > 1e-2


def test_what_we_save_loads_in_transformers(pair: tuple[Any, Published], tmp_path: Path) -> None:
    theirs, ours = pair
    ours.save(tmp_path)
    again, told = hf.IdeficsForVisionText2Text.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    given = inputs(2)
    with torch.no_grad():
        assert torch.equal(again.eval()(**given).logits, theirs(**given).logits)


def test_inputs_that_do_not_fit_are_refused(pair: tuple[Any, Published]) -> None:
    given = inputs(2)
    with pytest.raises(InputError, match=r"image_attention_mask is \[2, 14, 1\], expected \[2, 14, 2\]"):
        pair[1].logits(**given | {"image_attention_mask": given["image_attention_mask"][:, :, :1]})
    with pytest.raises(InputError, match=r"pixel_values: found \[2, 2, 3, 28, 28\], expected \[pictures, 3"):
        pair[1].logits(**{key: value for key, value in given.items() if key != "image_attention_mask"})
    with pytest.raises(InputError, match=r"pixel_values: found none, expected \[2, pictures"):
        pair[1].logits(**{key: value for key, value in given.items() if key != "pixel_values"})


def test_an_unknown_gate_is_refused() -> None:
    from sightline.zoo import idefics as family

    with pytest.raises(ConfigError, match="alpha_type 'matrix'"):
        family.config({"alpha_type": "matrix"})
