"""LLaVA-NeXT against transformers: pictures of several sizes, whose tiles are laid out as rows of tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import IMAGE_TOKEN, TEXT, VISION, layout_1, layout_2, layout_3, randomised, saved, write
from torch import Tensor

from sightline.core.errors import ConfigError, InputError
from sightline.zoo import llava_next as family
from sightline.zoo.describe import count
from sightline.zoo.families import ROWS
from sightline.zoo.published import Published, load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
# heights and widths: square, wide, tall, a ribbon that leaves no rows, and one whose edge is rounded
SIZES = [(40, 40), (30, 90), (200, 41), (1, 300), (47, 33), (28, 28)]


def llava_next(text: str = "mistral", **more: Any) -> Any:
    language = {"mistral": hf.MistralConfig, "llama": hf.LlamaConfig}[text](**TEXT)
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=language,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        **more,
    )
    return randomised(hf.LlavaNextForConditionalGeneration(config))


def places(height: int, width: int) -> tuple[int, int]:
    """Views and tokens of a picture, by the published processor."""
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    best = select_best_resolution((height, width), PINPOINTS)
    down, across = best[0] // 28, best[1] // 28
    kept = LlavaNextProcessor._get_unpadded_features(None, height, width, 4, 4, down, across)
    return 1 + down * across, 16 + sum(kept)


def inputs(*rows: list[tuple[int, int]], seed: int = 2) -> dict[str, Tensor]:
    """A row of words for each list of pictures' sizes, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    written = []
    for sizes in rows:
        words = torch.randint(3, 90, (9,), generator=generator)
        parts = [words[:1]]
        for size in sizes:
            parts += [torch.full((places(*size)[1],), IMAGE_TOKEN), words[1:3]]
        written.append(torch.cat([*parts, words[3:]]))
    longest = max(map(len, written))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.int64), row]) for row in written])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in written])
    sizes = [size for row in rows for size in row]
    if not sizes:
        return {"input_ids": ids, "attention_mask": mask}
    most = max(places(*size)[0] for size in sizes)
    pixels = torch.randn(len(sizes), most, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def compare(theirs: Any, ours: Published, given: dict[str, Tensor]) -> None:
    """Logits within 1e-4 and 32 greedy tokens equal."""
    with torch.no_grad():
        wanted = theirs(**given).logits
        greedy = theirs.generate(**given, max_new_tokens=32, do_sample=False)[:, given["input_ids"].shape[1] :]
    real = given["attention_mask"].bool()
    torch.testing.assert_close(ours.logits(**given)[real], wanted[real], **TOLERANCE)
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Published]:
    theirs = llava_next()
    return theirs, load_published(saved(theirs, tmp_path_factory.mktemp("next")))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_picture(pair: tuple[Any, Published], size: tuple[int, int]) -> None:
    given = inputs([size])
    compare(*pair, given)
    other = {**given, "pixel_values": given["pixel_values"].flip(-1)}
    assert (pair[1].logits(**other) - pair[1].logits(**given)).abs().max() > 0.01  # the picture is seen


@pytest.mark.parametrize("rows", [([],), (SIZES[:3],), (SIZES[:1], SIZES[1:4]), ([], SIZES[4:])], ids=str)
def test_several_pictures_and_rows(pair: tuple[Any, Published], rows: tuple[Any, ...]) -> None:
    compare(*pair, inputs(*rows))


@pytest.mark.parametrize("layout", [layout_1, layout_2, layout_3])
def test_layouts_give_the_same_model(tmp_path: Path, layout: Any) -> None:
    theirs = llava_next("llama", vision_feature_layer=[-2, -1])
    compare(theirs, load_published(write(tmp_path, theirs.config.to_dict(), layout(theirs))), inputs(SIZES[:2]))


def test_views_one_after_the_other(pair: tuple[Any, Published]) -> None:
    given = inputs(SIZES[:3])
    views = [pixels[: places(*size)[0]] for pixels, size in zip(given["pixel_values"], SIZES, strict=False)]
    compare(*pair, {**given, "pixel_values": torch.cat(views)})


def test_what_we_save_loads_in_transformers(pair: tuple[Any, Published], tmp_path: Path) -> None:
    theirs, ours = pair
    ours.save(tmp_path)
    kind = hf.LlavaNextForConditionalGeneration
    again, told = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    given = inputs(SIZES[:3])
    with torch.no_grad():
        assert torch.equal(again.eval()(**given).logits, theirs(**given).logits)


def test_inputs_that_contradict_each_other_are_told(pair: tuple[Any, Published]) -> None:
    given = inputs([(40, 40), (30, 90)])
    wrong = {
        r"image_sizes: found none, expected \[pictures, 2\]": {"image_sizes": None},
        "1 image_sizes for 2 pictures": {"image_sizes": given["image_sizes"][:1]},
        "2 views a picture, their sizes need 5": {"pixel_values": given["pixel_values"][:, :2]},
        "7 views, the pictures' sizes need 9": {"pixel_values": given["pixel_values"].flatten(0, 1)[:7]},
        "image tokens in input_ids, the pictures need": {"image_sizes": torch.tensor([[40, 40], [30, 70]])},
    }
    for message, change in wrong.items():
        with pytest.raises(InputError, match=message):
            pair[1].logits(**given | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "'full', expected 'default': only patches are laid out"),
        ({"image_grid_pinpoints": [[28, 50]]}, "28x50 pixels, expected whole squares of 28"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(change: dict[str, Any], message: str) -> None:
    text = {"model_type": "llama", **TEXT}
    with pytest.raises(ConfigError, match=message):
        family.config({"vision_config": VISION, "text_config": text, **change})


@pytest.mark.parametrize("name", ["llava-1.6-mistral-7b", "llava-1.6-34b"])
def test_the_published_sizes(name: str) -> None:
    row = ROWS[name]
    text = {key: value for key, value in row.config["text_config"].items() if key != "rope_theta"}
    with torch.device("meta"):
        config = hf.LlavaNextConfig(vision_config=row.config["vision_config"], text_config=text)
        theirs = hf.LlavaNextForConditionalGeneration(config)
    assert count(row.model) == sum(p.numel() for p in theirs.parameters())
