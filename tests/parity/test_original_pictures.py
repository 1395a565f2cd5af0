"""Pictures of fifty sizes as the original code of families prepares them that have no processor in transformers.

They hand pictures to CLIP's processor, some after a step of their own, or to transforms on pictures of Pillow's.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from picture_files import FILES
from torch import Tensor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sightline.data.images import CLIP_MEAN, CLIP_STD, CenterCrop
from sightline.data.media import open_image
from sightline.zoo.families import FAMILIES
from sightline.zoo.family import Habits, stretched_for_encoder
from sightline.zoo.processors import load_pipeline

SIDE = 28
CLIP = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
SQUARE = {"height": SIDE, "width": SIDE}
Theirs = Callable[[PIL.Image.Image], Tensor]


def of(processor: Any, **more: Any) -> Theirs:
    """The only view that a processor of transformers makes."""

    def call(picture: PIL.Image.Image) -> Tensor:
        found: Tensor = processor(picture, return_tensors="pt", **more)["pixel_values"][0]
        return found

    return call


def padded(colour: tuple[int, int, int]) -> Theirs:
    """`expand2square` of haotian-liu/LLaVA and shikras/shikra, then CLIP's."""

    def call(picture: PIL.Image.Image) -> Tensor:
        width, height = picture.size
        side = max(width, height)
        canvas = PIL.Image.new("RGB", (side, side), colour)
        canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
        return of(CLIP)(canvas)

    return call


def open_clip(picture: PIL.Image.Image) -> Tensor:
    """`image_transform` of mlfoundations/open_clip: torchvision's Resize and CenterCrop, whose corner is rounded."""
    width, height = picture.size
    longer = int(SIDE * max(width, height) / min(width, height))
    picture = picture.resize((SIDE, longer) if width <= height else (longer, SIDE), PIL.Image.Resampling.BICUBIC)
    left, top = (round((side - SIDE) / 2.0) for side in picture.size)
    cut = torch.from_numpy(np.array(picture.crop((left, top, left + SIDE, top + SIDE)))).permute(2, 0, 1) / 255
    return (cut - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


CASES: dict[str, Theirs] = {
    "llava_llama": padded((122, 116, 104)),
    "shikra": padded((255, 255, 255)),
    "ferret": of(CLIP, do_center_crop=False, size=SQUARE),
    "open_flamingo": open_clip,
    "otter": of(CLIP),
    "qwen_vl": of(BlipImageProcessorPil(size=SQUARE)),
    "cogvlm": of(BlipImageProcessorPil(size=SQUARE)),
}


@pytest.mark.parametrize("name", CASES)
def test_fifty_pictures(name: str, tmp_path: Path) -> None:
    habits = FAMILIES[name].habits
    # those without habits of their own are held to this one by their tests (tests/zoo)
    ours = load_pipeline(tmp_path, habits, SIDE) if isinstance(habits, Habits) else stretched_for_encoder({}, SIDE)
    for data in FILES:
        (found,) = ours.seen(open_image(data).picture).pixels
        wanted = CASES[name](PIL.Image.open(io.BytesIO(data)).convert("RGB"))
        torch.testing.assert_close(found, wanted, atol=1 / 255 / min(CLIP_STD), rtol=0.0)


def test_where_the_middle_lies_between_two_pixels() -> None:
    """OpenCLIP's window is one pixel beside CLIP's for a quarter of all proportions."""
    picture = PIL.Image.fromarray(np.arange(31, dtype=np.uint8)[None, :, None].repeat(28, 0).repeat(3, 2))
    for rounding, first in (("down", 1), ("even", 2)):
        pixels, way = CenterCrop(28, 28, rounding=rounding)(picture)  # type: ignore[arg-type]
        assert round(float(pixels[0, 0, 0]) * CLIP_STD[0] * 255 + CLIP_MEAN[0] * 255) == first
        assert way.target.width == 28
