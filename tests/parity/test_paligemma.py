"""PaliGemma 1 and 2 against transformers; prompts see themselves whole, answers are written left to right."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from published_folders import IMAGE_TOKEN, SLOTS, layout_1, layout_2, layout_3, paligemma, pixels, write

from sightline.zoo.published import load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


def question(images: int, length: int) -> torch.Tensor:
    words = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(6))
    return torch.cat([torch.full((images * SLOTS,), IMAGE_TOKEN), words])[None]


@pytest.mark.parametrize("text", ["gemma", "gemma2"])
@pytest.mark.parametrize("layout", [layout_1, layout_2, layout_3])
def test_logits_with_a_suffix(tmp_path: Path, layout: object, text: str) -> None:
    theirs = paligemma(text)
    ours = load_published(write(tmp_path, theirs.config.to_dict(), layout(theirs)))  # type: ignore[operator]
    ids = question(1, 12)
    types = torch.zeros_like(ids)
    types[:, -5:] = 1
    inputs = {"input_ids": ids, "pixel_values": pixels(1), "token_type_ids": types}
    with torch.no_grad():
        wanted = theirs(**inputs, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(ours.logits(**inputs), wanted, **TOLERANCE)


@pytest.mark.parametrize("text", ["gemma", "gemma2"])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_logits_and_greedy_tokens(tmp_path: Path, images: int, text: str) -> None:
    theirs = paligemma(text)
    ours = load_published(write(tmp_path, theirs.config.to_dict(), layout_1(theirs)))
    ids = question(images, 9)
    inputs = {"input_ids": ids} | ({"pixel_values": pixels(images)} if images else {})
    types = torch.zeros_like(ids)
    with torch.no_grad():
        wanted = theirs(**inputs, token_type_ids=types, attention_mask=torch.ones_like(ids)).logits
        greedy = theirs.generate(
            **inputs, token_type_ids=types, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False
        )
    torch.testing.assert_close(ours.logits(**inputs, token_type_ids=types), wanted, **TOLERANCE)
    assert torch.equal(ours.generate_ids(**inputs, token_type_ids=types, max_new_tokens=32), greedy[:, ids.shape[1] :])


def test_no_image(tmp_path: Path) -> None:
    theirs = paligemma()
    ours = load_published(write(tmp_path, theirs.config.to_dict(), layout_1(theirs)))
    ids = question(0, 10)
    types = torch.zeros_like(ids)
    types[:, 6:] = 1
    with torch.no_grad():
        wanted = theirs(input_ids=ids, token_type_ids=types, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(ours.logits(input_ids=ids, token_type_ids=types), wanted, **TOLERANCE)


@pytest.mark.parametrize("text", ["gemma", "gemma2"])
def test_what_we_save_loads_in_transformers(tmp_path: Path, text: str) -> None:
    theirs = paligemma(text)
    ours = load_published(write(tmp_path / "theirs", theirs.config.to_dict(), layout_1(theirs)))
    ours.save(tmp_path / "ours")
    again = hf.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    ids = question(1, 9)
    inputs = {"input_ids": ids, "pixel_values": pixels(1), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, theirs(**inputs).logits)
