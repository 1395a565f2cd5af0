"""InternVL's tiles against the processor that transformers uses for it."""

import random

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from sightline.data.images import IMAGENET_MEAN, IMAGENET_STD, Scaling
from sightline.data.tiles import Tiles


def sizes(count: int) -> list[tuple[int, int]]:
    """Half of them of proportions that grids have, where the rule for equally near ones decides."""
    draw = random.Random(3)
    out = [(draw.randint(1, 4000), draw.randint(1, 4000)) for _ in range(count // 2)]
    while len(out) < count:
        unit = draw.randint(1, 700)
        out.append((unit * draw.randint(1, 6), unit * draw.randint(1, 6)))
    return out


def test_the_grid_of_two_thousand_sizes() -> None:
    ranges = ((1, 12), (1, 6), (2, 9), (1, 40))
    grids = set()
    for index, (width, height) in enumerate(sizes(2000)):
        least, most = ranges[0 if index % 8 < 5 else index % 8 - 4]
        wanted = get_optimal_tiled_canvas((height, width), (448, 448), least, most)
        found = Tiles(448, min_tiles=least, max_tiles=most).grid(width, height)
        assert found == wanted, (width, height, least, most)
        grids.add(found)
    assert len(grids) > 40


@pytest.mark.parametrize("size", [(90, 60), (28, 28), (31, 200), (640, 480), (3, 5)], ids=str)
def test_pixels(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(values)
    processor = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28},
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    wanted = processor(picture, return_tensors="pt")["pixel_values"]
    found = Tiles(28, scaling=Scaling(IMAGENET_MEAN, IMAGENET_STD, exact=True))(picture)
    torch.testing.assert_close(torch.stack([pixels for pixels, _ in found]), wanted, atol=1e-5, rtol=0.0)
