"""Canvases of Llama 4 against what its published processor has once chosen."""

import json
from pathlib import Path

import PIL.Image
import torch

from sightline.data.tiles import Canvas

ROWS = json.loads((Path(__file__).parent / "tiles" / "llama4.json").read_text())


def test_canvases_of_llama4() -> None:
    for width, height, most, enlarged, rows, columns, across, down in ROWS:
        canvas = Canvas(336, max_tiles=most, enlarged=bool(enlarged))
        assert canvas.grid(width, height) == (rows, columns), (width, height, most, enlarged)
        assert canvas.resized(width, height) == (across, down), (width, height, most, enlarged)
    assert len({tuple(row[4:6]) for row in ROWS}) > 30


def test_a_canvas_is_padded_on_the_right_and_below() -> None:
    seen = Canvas(12).seen(PIL.Image.new("RGB", (30, 20), "white"))
    assert seen.tiles == (2, 3) and len(seen.pixels) == 7
    rows = [torch.cat(seen.pixels[3 * row : 3 * row + 3], dim=2) for row in range(2)]
    joined = torch.cat(rows, dim=1)
    assert joined.shape == (3, 24, 36)
    wanted = torch.full((3, 24, 36), -1.0)
    wanted[:, :20, :30] = 1.0
    torch.testing.assert_close(joined, wanted)
    torch.testing.assert_close(seen.pixels[-1], torch.ones(3, 12, 12))
    assert len(Canvas(12, max_tiles=1).seen(PIL.Image.new("RGB", (30, 20))).pixels) == 1
