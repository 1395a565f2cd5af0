"""LLaVA in every layout that was published, against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import (
    IMAGE_TOKEN,
    SLOTS,
    VISION,
    layout_1,
    layout_2,
    layout_3,
    llava,
    original,
    pixels,
    prompt,
    write,
)
from safetensors.torch import load_file
from torch import Tensor

from sightline.core.errors import InputError
from sightline.zoo.published import load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
LAYOUTS = {"published": layout_1, "4.52": layout_2, "5": layout_3}


def compare(theirs: Any, ours: Any, **inputs: Tensor) -> None:
    """Logits within 1e-4 and 32 greedy tokens equal."""
    with torch.no_grad():
        wanted = theirs(**inputs).logits
        greedy = theirs.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(ours.logits(**inputs)[real], wanted[real], **TOLERANCE)
    assert torch.equal(ours.generate_ids(**inputs, max_new_tokens=32), greedy)


def compare_original(theirs: Any, ours: Any) -> None:
    """The same for no picture, one and several, with the original's number for a picture's place."""
    for images in (0, 1, 3):
        ids = prompt(images)
        seen = {"pixel_values": pixels(images)} if images else {}
        with torch.no_grad():
            wanted = theirs(input_ids=ids, **seen).logits
            greedy = theirs.generate(input_ids=ids, **seen, max_new_tokens=32, do_sample=False)[:, ids.shape[1] :]
        placed = torch.where(ids == IMAGE_TOKEN, -200, ids)
        torch.testing.assert_close(ours.logits(input_ids=placed, **seen), wanted, **TOLERANCE)
        assert torch.equal(ours.generate_ids(input_ids=placed, **seen, max_new_tokens=32), greedy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_model(tmp_path: Path, layout: str) -> None:
    theirs = llava()
    ours = load_published(write(tmp_path, theirs.config.to_dict(), LAYOUTS[layout](theirs)))
    compare(theirs, ours, input_ids=prompt(1), pixel_values=pixels(1))


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize(("text", "vision"), [("llama", "clip"), ("qwen2", "siglip")])
def test_any_number_of_images(tmp_path: Path, images: int, text: str, vision: str) -> None:
    theirs = llava(text, vision, vision_feature_select_strategy="default" if vision == "clip" else "full")
    ours = load_published(write(tmp_path, theirs.config.to_dict(), layout_1(theirs)))
    inputs = {"input_ids": prompt(images)}
    if images:
        inputs["pixel_values"] = pixels(images)
    compare(theirs, ours, **inputs)


def test_left_padded_batch(tmp_path: Path) -> None:
    theirs = llava()
    ours = load_published(write(tmp_path, theirs.config.to_dict(), layout_1(theirs)))
    long, short = prompt(1, 14), prompt(1, 9, seed=5)
    gap = long.shape[1] - short.shape[1]
    ids = torch.cat([long, torch.cat([torch.zeros(1, gap, dtype=torch.int64), short], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :gap] = 0
    compare(theirs, ours, input_ids=ids, attention_mask=mask, pixel_values=pixels(2))


def test_original_layout(tmp_path: Path) -> None:
    theirs = llava()
    config = {**theirs.config.text_config.to_dict(), "model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}
    config |= {"mm_vision_tower": "tower", "mm_vision_select_layer": -2, "eos_token_id": None}
    write(tmp_path / "tower", hf.CLIPVisionConfig(**VISION).to_dict(), {"unused": torch.zeros(1)})
    compare_original(theirs, load_published(write(tmp_path, config, original(theirs))))


def test_original_layout_with_the_tower_beside_it(tmp_path: Path) -> None:
    theirs = llava()
    names = original(theirs)
    inside = "model.vision_tower.vision_tower."
    tower = {k.removeprefix(inside): v for k, v in names.items() if k.startswith(inside)}
    rest = {k: v for k, v in names.items() if not k.startswith(inside)}
    config = {**theirs.config.text_config.to_dict(), "model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}
    write(tmp_path / "tower", hf.CLIPVisionConfig(**VISION).to_dict(), tower)
    ours = load_published(write(tmp_path, config | {"mm_vision_tower": "tower"}, rest))
    ids = prompt(1)
    with torch.no_grad():
        wanted = theirs(input_ids=ids, pixel_values=pixels(1)).logits
    got = ours.logits(input_ids=torch.where(ids == IMAGE_TOKEN, -200, ids), pixel_values=pixels(1))
    torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_llava_1_has_one_linear_layer(tmp_path: Path) -> None:
    """transformers always builds two; its second is made the identity and its activation none."""
    theirs = llava(projector_hidden_act="linear")
    with torch.no_grad():
        second = theirs.model.multi_modal_projector.linear_2
        second.weight.copy_(torch.eye(32))
        second.bias.zero_()
    names = {k: v for k, v in original(theirs).items() if "mm_projector.2" not in k}
    names = {k.replace("mm_projector.0.", "mm_projector."): v for k, v in names.items()}
    config = {**theirs.config.text_config.to_dict(), "model_type": "llava", "mm_vision_tower": "tower"}
    write(tmp_path / "tower", hf.CLIPVisionConfig(**VISION).to_dict(), {"unused": torch.zeros(1)})
    ours = load_published(write(tmp_path, {**config, "eos_token_id": None}, names))
    compare_original(theirs, ours)
    ours.save(tmp_path / "ours")
    assert {k: v.shape for k, v in load_file(tmp_path / "ours" / "model.safetensors").items()} == {
        k: v.shape for k, v in names.items()
    }


def test_what_we_save_loads_in_transformers(tmp_path: Path) -> None:
    theirs = llava()
    ours = load_published(write(tmp_path / "theirs", theirs.config.to_dict(), layout_3(theirs)))
    ours.save(tmp_path / "ours")
    again, told = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    inputs = {"input_ids": prompt(1), "pixel_values": pixels(1)}
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, theirs(**inputs).logits)


def test_pictures_and_places_must_match(tmp_path: Path) -> None:
    theirs = llava()
    ours = load_published(write(tmp_path, theirs.config.to_dict(), layout_1(theirs)))
    with pytest.raises(InputError, match=f"{SLOTS} image tokens in input_ids, the pictures need {2 * SLOTS}"):
        ours.logits(input_ids=prompt(1), pixel_values=pixels(2))
    with pytest.raises(InputError, match="no pixel_values"):
        ours.logits(input_ids=prompt(1))


def test_defaults_that_the_published_file_leaves_out(tmp_path: Path) -> None:
    from sightline.zoo import llava as family

    published = {
        "model_type": "llava",
        "vision_config": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 336, "patch_size": 14, "model_type": "clip_vision_model",
        },
        "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5},
    }  # fmt: skip
    cfg = family.config(json.loads(json.dumps(published)))
    assert (cfg.decoder.width, cfg.decoder.depth, cfg.decoder.mlp, cfg.decoder.tied) == (4096, 32, 11008, False)
    assert (cfg.image.layer, cfg.image.grid, cfg.image.normed) == (-2, 24, False)
