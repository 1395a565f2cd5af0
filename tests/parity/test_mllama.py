"""Llama 3.2 Vision against transformers: canvases of every shape, several pictures, none; its pictures and its mask.

Tokens that see no picture are compared with transformers as Meta's code has them: nothing comes to them from what
others see (meta-llama/llama-models a9c89c47, `models/llama3/multimodal/model.py`, `CrossAttention`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as hf
from published_folders import TEXT, randomised, saved
from torch import Tensor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from sightline.core.errors import ConfigError, InputError
from sightline.data.images import HALF, IMAGENET_MEAN, Scaling
from sightline.data.tiles import Canvas
from sightline.zoo import mllama
from sightline.zoo.families import ROWS
from sightline.zoo.published import Published, load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
SIDE, TILES, IMAGE = 14, 4, 99
SHAPES = mllama.SHAPES
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 7,
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 96,
}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
ROPE |= {"original_max_position_embeddings": 16}


SCALES = {"gate": 4.0, "embed_tokens": 60.0, "cross_attn.q_norm": 40.0, "cross_attn.k_norm": 40.0, "norm": 5.0}
SCALES |= {"vision": 2.0, "": 1.5}


def tiny(**more: Any) -> Any:
    text = {**TEXT, "num_hidden_layers": 6, "cross_attention_layers": [1, 4], "rope_parameters": ROPE, **more}
    config = hf.MllamaConfig(vision_config=VISION, text_config=text, image_token_index=IMAGE)
    model = randomised(hf.MllamaForConditionalGeneration(config))
    with torch.no_grad():  # so that a token looks at few patches, and neither words nor pictures drown in the other
        for name, parameter in model.named_parameters():
            parameter.mul_(next(factor for part, factor in SCALES.items() if part in name))
    return model


def as_meta_has_it(model: Any) -> Any:
    """Let no attention come to tokens that see nothing."""
    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            told: dict[str, Any] = {}

            def remember(module: Any, args: Any, kwargs: Any, told: dict[str, Any] = told) -> None:
                told["seeing"] = kwargs["full_text_row_masked_out_mask"]

            def hide(module: Any, args: Any, out: Any, told: dict[str, Any] = told) -> Any:
                return out if told["seeing"] is None else (out[0] * told["seeing"][:, 0], *out[1:])

            layer.register_forward_pre_hook(remember, with_kwargs=True)
            layer.cross_attn.register_forward_hook(hide)
    return model


@pytest.fixture(scope="module", params=["grouped heads", "one block"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Published]:
    more = {"grouped heads": {}, "one block": {"num_key_value_heads": 4, "cross_attention_layers": [2]}}
    theirs = tiny(**more[request.param])
    return theirs, load_published(saved(theirs, tmp_path_factory.mktemp("mllama")))


def prompt(rows: list[list[int]], shapes: list[list[list[int]]], length: int = 12, seed: int = 3) -> dict[str, Tensor]:
    """Ids with image tokens at these places of each row, pictures of these shapes; the mask is the processor's."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 98, (len(rows), length), generator=generator)
    most = max(map(len, shapes))
    pixels = torch.zeros(len(rows), most, TILES, 3, SIDE, SIDE)
    numbers = torch.zeros(len(rows), most, dtype=torch.int64)
    for i, (places, told) in enumerate(zip(rows, shapes, strict=True)):
        ids[i, places] = IMAGE
        for k, (down, across) in enumerate(told):
            pixels[i, k, : down * across] = torch.randn(down * across, 3, SIDE, SIDE, generator=generator)
            numbers[i, k] = SHAPES.index([down, across]) + 1
    counts = [[down * across for down, across in told] for told in shapes]
    spans = [get_cross_attention_token_mask(row, IMAGE) for row in ids.tolist()]
    mask = convert_sparse_cross_attention_mask_to_dense(spans, counts, TILES, length)
    tiles = torch.zeros(len(rows), most, TILES, dtype=torch.int64)
    tiles[..., 0] = 1  # as the published processor has it for no picture too
    for i, told in enumerate(counts):
        for k, count in enumerate(told):
            tiles[i, k, :count] = 1
    found = {"input_ids": ids, "pixel_values": pixels, "aspect_ratio_ids": numbers, "aspect_ratio_mask": tiles}
    return {**found, "cross_attention_mask": torch.from_numpy(mask)}


def compare(theirs: Any, ours: Published, **given: Tensor) -> None:
    """Logits within 1e-4 and 32 greedy tokens equal."""
    length = given["input_ids"].shape[1]
    with torch.no_grad():
        wanted = theirs(**given).logits
        greedy = theirs.generate(**given, max_new_tokens=32, do_sample=False)[:, length:]
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    torch.testing.assert_close(ours.logits(**given)[real], wanted[real], **TOLERANCE)
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_picture_of_every_shape(pair: tuple[Any, Published], shape: list[int]) -> None:
    compare(*pair, **prompt([[0]], [[shape]]))


def test_several_pictures(pair: tuple[Any, Published]) -> None:
    """Side by side and apart; the second row has one picture less, which fills it up."""
    compare(*pair, **prompt([[0, 1, 6], [0, 5]], [[[1, 2], [2, 2], [1, 1]], [[3, 1], [1, 1]]]))


def test_no_picture(pair: tuple[Any, Published]) -> None:
    compare(*pair, input_ids=prompt([[]], [[]])["input_ids"])


def test_tokens_of_pictures_without_any_are_told(pair: tuple[Any, Published]) -> None:
    with pytest.raises(InputError, match=r"^2 image tokens in input_ids, but no pixel_values$"):
        pair[1].logits(input_ids=prompt([[2, 5]], [[[1, 1], [1, 1]]])["input_ids"])


def test_words_before_a_picture(pair: tuple[Any, Published], tmp_path: Path) -> None:
    given = prompt([[4], [2, 3], []], [[[2, 1]], [[1, 1], [1, 3]], []])
    theirs = as_meta_has_it(hf.MllamaForConditionalGeneration.from_pretrained(saved(pair[0], tmp_path)).eval())
    compare(theirs, pair[1], **given)
    padded = {**given, "attention_mask": torch.ones_like(given["input_ids"])}
    padded["attention_mask"][0, :3] = 0
    compare(theirs, pair[1], **padded)


def test_the_mask_says_what_the_ids_say(pair: tuple[Any, Published]) -> None:
    given = prompt([[0, 1, 6], [3, 5]], [[[1, 2], [2, 2], [1, 1]], [[3, 1], [1, 1]]])
    told = {key: value for key, value in given.items() if key != "cross_attention_mask"}
    torch.testing.assert_close(pair[1].logits(**told), pair[1].logits(**given), atol=1e-5, rtol=0.0)
    assert torch.equal(pair[1].generate_ids(**told, max_new_tokens=8), pair[1].generate_ids(**given, max_new_tokens=8))


def test_pictures_matter(pair: tuple[Any, Published]) -> None:
    given = prompt([[0]], [[[2, 2]]])
    other = given | {"pixel_values": -given["pixel_values"]}
    assert float((pair[1].logits(**given) - pair[1].logits(**other)).abs().max()) > 0.1
    other = given | {"pixel_values": given["pixel_values"].flip(2)}
    assert float((pair[1].logits(**given) - pair[1].logits(**other)).abs().max()) > 1e-2
    turned = given | {"aspect_ratio_ids": torch.tensor([[SHAPES.index([1, 4]) + 1]])}
    assert float((pair[1].logits(**given) - pair[1].logits(**turned)).abs().max()) > 1e-2


def test_what_we_save_loads_in_transformers(pair: tuple[Any, Published], tmp_path: Path) -> None:
    theirs, ours = pair
    ours.save(tmp_path)
    again, told = hf.MllamaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    given = prompt([[0]], [[[1, 3]]])
    with torch.no_grad():
        assert torch.equal(again.eval()(**given).logits, theirs(**given).logits)


def test_inputs_that_do_not_fit_are_refused(pair: tuple[Any, Published]) -> None:
    given, ours = prompt([[2]], [[[1, 2]]]), pair[1]
    broken = given["cross_attention_mask"].clone()
    broken[0, 5, 0, 1] = 0
    with pytest.raises(InputError, match="shows some tiles of a picture and not others"):
        ours.logits(**given | {"cross_attention_mask": broken})
    with pytest.raises(InputError, match=r"cross_attention_mask is \[1, 11, 1, 4\], expected \[1, 12, 1, tiles\]"):
        ours.logits(**given | {"cross_attention_mask": given["cross_attention_mask"][:, 1:]})
    with pytest.raises(InputError, match=r"aspect_ratio_ids: found none, expected \[1, 1\]"):
        ours.logits(**{key: value for key, value in given.items() if key != "aspect_ratio_ids"})
    with pytest.raises(InputError, match=r"pixel_values: found \[1, 4, 3, 14, 14\], expected \[1, pictures, tiles"):
        ours.logits(**given | {"pixel_values": given["pixel_values"][0]})
    with pytest.raises(InputError, match="aspect_ratio_ids up to 9, expected at most 8"):
        ours.logits(**given | {"aspect_ratio_ids": torch.tensor([[9]])})
    with pytest.raises(InputError, match="1 tiles a picture in pixel_values, one of 1x2 is told"):
        ours.logits(**given | {"pixel_values": given["pixel_values"][:, :, :1]})
    told = {key: value for key, value in given.items() if key != "cross_attention_mask"}
    told["input_ids"] = told["input_ids"].clamp(max=90)
    with pytest.raises(InputError, match=r"\[1\] pictures in the rows for \[0\] image tokens"):
        ours.logits(**told)


def test_blocks_at_uneven_distances_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cross_attention_layers \[3, 8, 12\], expected them at one distance"):
        mllama.config({"text_config": {"cross_attention_layers": [3, 8, 12]}})


@pytest.mark.parametrize("name, blocks, billions", [("11b", 8, 10.67), ("90b", 20, 88.59)])
def test_rows_have_the_published_sizes(name: str, blocks: int, billions: float) -> None:
    from sightline.zoo.describe import count

    model = ROWS[f"llama-3.2-{name}-vision-instruct"].model
    assert len(model.fusion.places(model.decoder.depth)) == blocks  # type: ignore[union-attr]
    assert count(model) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_pictures_are_the_published_processor_s(seed: int) -> None:
    numbers = np.random.RandomState(seed)
    pipeline = Canvas(28, 4, cut=False, scaling=Scaling(IMAGENET_MEAN, HALF, "bilinear", exact=True))
    theirs = MllamaImageProcessorPil(size={"height": 28, "width": 28}, image_mean=IMAGENET_MEAN, image_std=HALF)
    for _ in range(12):
        width, height = numbers.randint(1, 150, 2).tolist()
        picture = PIL.Image.fromarray(numbers.randint(0, 256, (height, width, 3)).astype(np.uint8))
        seen = pipeline.seen(picture)
        (found,), way = seen.pixels, seen.way
        rows, columns = pipeline.grid(width, height)
        wanted = theirs(picture, return_tensors="pt")
        assert wanted["aspect_ratio_ids"].item() == SHAPES.index([rows, columns]) + 1
        tiles = wanted["pixel_values"][0, 0, : rows * columns].unflatten(0, (rows, columns))
        laid = tiles.permute(2, 0, 3, 1, 4).reshape(3, rows * 28, columns * 28)
        assert found.shape == laid.shape
        assert float((found - laid).abs().max()) <= 2.01 / 255, (width, height)
        assert (way.target.width, way.target.height) == (columns * 28, rows * 28)
