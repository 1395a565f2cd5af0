"""Pictures of any size as several views; against published processors they are compared in tests/parity."""

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from pydantic import TypeAdapter

from sightline.core.config import from_dict, to_dict
from sightline.core.errors import ConfigError
from sightline.core.geometry import Box, Frame
from sightline.core.patches import Tiling
from sightline.core.sequence import Image, Message, Text, Video
from sightline.data.images import OneView, Scaling, Square
from sightline.data.processor import Processor
from sightline.data.template import TEMPLATES
from sightline.data.tiles import AnyResolution, Canvas, Fitted, Pipeline, Tiles
from sightline.language.tokenizer import train_tokenizer

PLAIN = Scaling(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))  # values stay 0 to 255
SPLIT = Fitted(48, 8, 24, ((1, 2), (2, 1)), 48, PLAIN)
PIPELINES: list[Any] = [Tiles(48), AnyResolution(48), Fitted(48, 8, 24), SPLIT, Canvas(48)]
RIBBONS = [(1, 1), (30_000, 1), (1, 30_000), (2000, 3)]


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.kind)
def test_pipelines_are_configurations(pipeline: Any) -> None:
    assert from_dict(type(pipeline), to_dict(pipeline)) == pipeline
    assert TypeAdapter(Pipeline).validate_python(to_dict(pipeline)) == pipeline


@pytest.mark.parametrize("size", RIBBONS, ids=str)
@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.kind)
def test_ribbons_have_views_like_any_picture(pipeline: Any, size: tuple[int, int]) -> None:
    for seen in (pipeline.seen, pipeline.frame):
        found = seen(PIL.Image.new("RGB", size, "red"))
        assert all(pixels.dtype == torch.float32 and pixels.is_contiguous() for pixels in found.pixels)
        assert all(0 < side <= 48 for pixels in found.pixels for side in pixels.shape[1:])
        assert found.way.source == Frame(*size)


def test_any_resolution() -> None:
    """A wide picture on a row of three squares, of which the last shows something; a tall one padded at its sides."""
    picture = PIL.Image.new("RGB", (300, 100), "black")
    picture.paste("white", (220, 30, 270, 70))
    seen = AnyResolution(48, scaling=PLAIN).seen(picture)
    assert seen.tiles == (1, 3) and seen.tiling == Tiling(1, 3, 300, 100) and len(seen.pixels) == 4
    ys, xs = np.nonzero(seen.pixels[0].mean(0).numpy() > 127)
    found = Box(xs.min(), ys.min(), xs.max() + 1, ys.max() + 1, Frame(48, 48))
    assert np.abs(np.subtract(found.xyxy, seen.way.apply(Box(220, 30, 270, 70, Frame(300, 100))).xyxy)).max() <= 0.75
    assert seen.pixels[1].max() < 1 and seen.pixels[2].max() < 1 and seen.pixels[3].max() > 200
    tall = AnyResolution(48, ((1, 2), (2, 1)), PLAIN).seen(PIL.Image.new("RGB", (40, 90), "white"))
    assert tall.tiles == (2, 1)
    column = torch.cat(tall.pixels[1:], dim=1)
    assert (column[:, :, 2:-3] > 254).all() and (column[:, :, :2] == 0).all() and (column[:, :, -3:] == 0).all()


def test_fitted() -> None:
    """The longer side as asked, the shorter in whole patches, what is beyond the picture black."""
    seen = Fitted(48, 8, 20, scaling=PLAIN).seen(PIL.Image.new("RGB", (96, 10), "white"))
    assert seen.pixels[0].shape == (3, 24, 48)
    assert (seen.pixels[0][:, :20] > 254).all() and (seen.pixels[0][:, 20:] == 0).all()
    box = Box(48, 5, 96, 10, Frame(96, 10))
    assert seen.way.apply(box).xyxy == pytest.approx((24, 10, 48, 20))
    pieces = SPLIT.seen(PIL.Image.new("RGB", (200, 90), "white"))
    assert pieces.tiles == (1, 2) and len(pieces.pixels) == 2
    assert len(SPLIT.frame(PIL.Image.new("RGB", (200, 90))).pixels) == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AnyResolution(48, ()), "expected rows and columns of 1 or more"),
        (lambda: AnyResolution(48, ((0, 2),)), "expected rows and columns of 1 or more"),
        (lambda: Fitted(50, 8), "in whole patches of 8"),
        (lambda: Fitted(48, 8, 49), "sides from 49 to 48, expected the larger last"),
        (lambda: Canvas(48, 0), "0 tiles, expected 1 or more"),
    ],
)
def test_settings_are_checked(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


# -------------------------------------------------------------------------------------------------------- processor

CONTROLS = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>")
TOKENIZER = train_tokenizer(["how many?"] * 30, 300, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")


def processor(pixels: Any, seen: list[Any]) -> Processor:
    """Patches of 4, each a token; what the model is asked to count is kept in `seen`."""

    def count(grid: tuple[int, int, int], tiling: Tiling | None = None) -> int:
        seen.append((grid, tiling))
        return grid[1] * grid[2] if tiling is None else 100

    return Processor(TOKENIZER, TEMPLATES["sightline"], pixels, count, 4, "<image>")


def test_a_picture_that_the_model_lays_out_is_counted_as_a_whole() -> None:
    seen: list[Any] = []
    picture = PIL.Image.new("RGB", (90, 30))
    example = processor(AnyResolution(16), seen)((Message("user", (Image(picture), Text("how many?"))),))
    assert len(example.slots) == 100 and example.tilings == (Tiling(1, 3, 90, 30),) and len(example.pixels) == 4
    assert seen[-1] == ((1, 4, 4), Tiling(1, 3, 90, 30))


def test_frames_of_films_are_seen_once_and_not_cut() -> None:
    """The same picture, as a picture and twice as a frame."""
    image = Image(PIL.Image.new("RGB", (40, 20)))
    film = Video((image, image), (0.0, 1.0))
    made: list[int] = []

    class Counted(OneView):
        def seen(self, picture: PIL.Image.Image) -> Any:
            made.append(1)
            return Tiles(16).seen(picture)

        def frame(self, picture: PIL.Image.Image) -> Any:
            made.append(2)
            return Square(16).frame(picture)

    example = processor(Counted(), [])((Message("user", (film, image, image, Text("how many?"))),))
    assert made == [2, 1] and len(example.pixels) == 2 + 2 * 3 and len(example.slots) == 8 * 16
    assert example.tilings == ()
