"""Fifty files of pictures of odd sizes and kinds."""

import io
import random

import numpy as np
import PIL.Image


def sizes() -> list[tuple[int, int]]:
    """Widths and heights: tiny, ribbons both ways, portraits, landscapes, exact multiples of a tile, and others."""
    draw = random.Random(4)
    found = [(2, 1), (1, 2), (2, 3), (5, 4), (28, 28), (56, 28), (28, 56), (84, 56), (27, 29), (90, 3), (2, 120)]
    found += [(200, 7), (6, 150), (35, 35), (34, 35), (112, 28), (29, 28), (63, 63), (30, 45), (45, 30)]
    return found + [(draw.randint(3, 130), draw.randint(3, 130)) for _ in range(30)]


def files() -> list[bytes]:
    """PNG files of noise over a slope; every fifth has a palette, every seventh one channel."""
    draw, out = np.random.default_rng(2), []
    for i, (width, height) in enumerate(sizes()):
        values = np.linspace(0, 180, width)[None, :, None] + draw.integers(0, 76, (height, width, 3))
        picture = PIL.Image.fromarray(values.astype(np.uint8))
        if i % 5 == 0:
            picture = picture.quantize(16)
        elif i % 7 == 0:
            picture = picture.convert("L")
        picture.save(file := io.BytesIO(), "PNG")
        out.append(file.getvalue())
    return out


FILES = files()
