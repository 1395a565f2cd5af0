"""Picture pipelines: sizes, normalised values, and a recorded way that is where pixels really went."""

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings, strategies as st

from sightline.core.config import from_dict, to_dict
from sightline.core.errors import ConfigError
from sightline.core.geometry import Box, Frame
from sightline.data import images
from sightline.data.images import CLIP_MEAN, CLIP_STD, CenterCrop, PadSquare, Scaling, Square
from sightline.data.tiles import Canvas, Pipeline, Tiles

PLAIN = Scaling(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))  # values stay 0 to 255
SIZES = [(1, 1), (1, 2000), (2000, 1), (3, 5), (33, 47), (47, 33), (64, 64), (201, 99), (640, 480)]


def pipelines(**scaling: Any) -> list[Pipeline]:
    """One of each, with plain values, and crops smaller and larger than the resized picture."""
    plain = Scaling(PLAIN.mean, PLAIN.std, **scaling)
    return [
        Square(48, plain),
        CenterCrop(48, 48, plain),
        CenterCrop(60, 48, plain),
        CenterCrop(40, 48, plain),
        PadSquare(48, plain),
    ]


def noise(width: int, height: int) -> PIL.Image.Image:
    generator = np.random.default_rng(width * 10_000 + height)
    return PIL.Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def name(value: Any) -> str:
    if isinstance(value, CenterCrop):
        return f"{value.kind}-{value.shortest}-{value.crop}"
    return value.kind if isinstance(value, Square | PadSquare) else "x".join(map(str, value))


@pytest.mark.parametrize("size", SIZES, ids=name)
@pytest.mark.parametrize("pipeline", pipelines(), ids=name)
def test_pixels_and_way_have_the_promised_size(pipeline: Pipeline, size: tuple[int, int]) -> None:
    pixels, way = pipeline(noise(*size))
    assert pixels.shape == (3, 48, 48) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert pixels.min() >= 0 and pixels.max() <= 255.001
    assert way.source == Frame(*size) and way.target == Frame(48, 48)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(pipelines()),
    st.integers(80, 300),
    st.integers(80, 300),
    st.tuples(st.floats(0.25, 0.4), st.floats(0.25, 0.4), st.floats(0.2, 0.35), st.floats(0.2, 0.35)),
)
def test_the_way_is_where_pixels_went(
    pipeline: Pipeline, width: int, height: int, part: tuple[float, float, float, float]
) -> None:
    """A rectangle drawn in the original is found again, by its pixels alone, where the way says; and the way back."""
    side = min(width, height)  # near the middle, so that no crop cuts it
    x1, y1 = int(width / 2 - part[0] * side), int(height / 2 - part[1] * side)
    x2, y2 = int(width / 2 + part[2] * side), int(height / 2 + part[3] * side)
    picture = PIL.Image.new("RGB", (width, height), "black")
    picture.paste("white", (x1, y1, x2, y2))
    pixels, way = pipeline(picture)
    drawn = Box(x1, y1, x2, y2, way.source)
    ys, xs = np.nonzero(pixels.mean(0).numpy() > 127)
    found = Box(xs.min(), ys.min(), xs.max() + 1, ys.max() + 1, way.target)
    assert np.abs(np.subtract(found.xyxy, way.apply(drawn).xyxy)).max() <= 0.75  # half a pixel, and the filter's blur
    original_per_seen = max(width, height) / 40
    assert np.abs(np.subtract(way.invert(found).xyxy, drawn.xyxy)).max() <= 0.75 * original_per_seen


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [*SIZES, (17, 300), (300, 17), (60, 200)], ids=name)
def test_the_fast_way_is_within_one_level_of_the_exact(size: tuple[int, int], resample: str) -> None:
    """On noise, the hardest picture there is: one value in thousands may be two levels away."""
    picture = noise(*size)
    for fast, exact in zip(pipelines(resample=resample), pipelines(resample=resample, exact=True), strict=True):
        (pixels, way), (wanted, same_way) = fast(picture), exact(picture)
        away = (pixels - wanted).abs().round()
        assert away.max() <= 2 and (away > 1).float().mean() < 5e-4, name(fast)
        assert way == same_way


def test_a_picture_of_the_right_size_is_not_resampled() -> None:
    picture = noise(48, 48)
    for pipeline in (Square(48, PLAIN), CenterCrop(48, 48, PLAIN), PadSquare(48, PLAIN)):
        assert torch.equal(pipeline(picture)[0].round().byte().permute(1, 2, 0), torch.from_numpy(np.array(picture)))


def test_values_are_normalised_per_channel() -> None:
    pixels, _ = Square(8, Scaling(CLIP_MEAN, CLIP_STD))(PIL.Image.new("RGB", (8, 8), (255, 51, 0)))
    wanted = [(value - m) / s for value, m, s in zip((1, 0.2, 0), CLIP_MEAN, CLIP_STD, strict=True)]
    assert pixels[:, 3, 5].tolist() == pytest.approx(wanted, abs=1e-5)


def test_padding_has_the_mean_colour_and_surrounds_the_picture() -> None:
    pixels, _ = PadSquare(40)(PIL.Image.new("RGB", (40, 20), "white"))
    assert pixels[:, [0, 9, 30, 39]].abs().max() < 0.02  # mean colour, to the level that 8 bits allow
    assert pixels[:, 11:29].min() > 1


def test_a_crop_beyond_the_picture_is_black() -> None:
    pixels, way = CenterCrop(20, 40, PLAIN)(PIL.Image.new("RGB", (20, 20), "white"))
    assert pixels[:, 10:30, 10:30].min() > 254 and pixels.sum() == pytest.approx(255 * 3 * 20 * 20, rel=1e-5)
    assert way.apply(Box(0, 0, 20, 20, way.source)).xyxy == (10, 10, 30, 30)


def test_the_crop_is_the_middle_rounded_down() -> None:
    """As the published processor: 201x99 to 97x48 (not 97.45), of which columns 24 to 71 are kept."""
    _, way = CenterCrop(48, 48)(noise(201, 99))
    first, second = way.steps
    assert first.target == Frame(97, 48) and second.shift == (-24, 0)


@pytest.mark.parametrize("size", [(300, 7), (7, 300), (50, 49)], ids=name)
@pytest.mark.parametrize("pipeline", pipelines(resample="bilinear")[1:], ids=name)
def test_ribbons_take_a_shorter_way_to_the_same_pixels(
    pipeline: Pipeline, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, way = pipeline(noise(*size))
    monkeypatch.setattr(images, "_LARGEST", 0)
    short, same_way = pipeline(noise(*size))
    assert (whole - short).abs().max() < 1.01 and way == same_way


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000)], ids=name)
def test_ribbons_do_not_take_gigabytes(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture on the way is large; padded or resized as a whole, one would have 900 million pixels and more."""

    def modest(make: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            width, height = args[1] if isinstance(args[1], tuple) else args[2:]
            assert width * height <= 336 * 30_000
            return make(*args)

        return checked

    picture = PIL.Image.new("RGB", size, "red")
    monkeypatch.setattr(PIL.Image, "new", modest(PIL.Image.new))
    monkeypatch.setattr(PIL.Image.Image, "resize", modest(PIL.Image.Image.resize))
    monkeypatch.setattr(Scaling, "resized", modest(Scaling.resized))
    for pipeline in (Square(224, PLAIN), CenterCrop(224, 224, PLAIN)):
        assert pipeline(picture)[0][:, 112, 112].tolist() == pytest.approx([255, 0, 0], abs=0.01)
    assert PadSquare(336, PLAIN)(picture)[0].shape == (3, 336, 336)  # in which the ribbon is a ninetieth of a pixel


@pytest.mark.parametrize("pipeline", [Square(64), CenterCrop(70, 64), PadSquare(64, Scaling(exact=True))], ids=name)
def test_pipelines_are_configurations(pipeline: Pipeline) -> None:
    assert from_dict(type(pipeline), to_dict(pipeline)) == pipeline


# ------------------------------------------------------------------------------------------------------------ tiles


def test_every_tile_knows_where_its_pixels_were() -> None:
    """A rectangle inside each tile of a grid, found again in it alone and, smaller, in the whole picture."""
    tiles = Tiles(48, scaling=PLAIN)
    assert tiles.grid(300, 200) == (3, 2)
    for index in range(6):
        left, top = 100 * (index % 3), 100 * (index // 3)
        picture = PIL.Image.new("RGB", (300, 200), "black")
        picture.paste("white", (left + 25, top + 30, left + 75, top + 80))
        items = tiles(picture)
        assert len(items) == 7
        for place in (index, 6):
            pixels, way = items[place]
            assert pixels.shape == (3, 48, 48) and way.target == Frame(48, 48)
            ys, xs = np.nonzero(pixels.mean(0).numpy() > 127)
            found = Box(xs.min(), ys.min(), xs.max() + 1, ys.max() + 1, way.target)
            drawn = Box(left + 25, top + 30, left + 75, top + 80, way.source)
            assert np.abs(np.subtract(found.xyxy, way.apply(drawn).xyxy)).max() <= 0.75
            assert np.abs(np.subtract(way.invert(found).xyxy, drawn.xyxy)).max() <= 5
        assert all(items[other][0].max() < 1 for other in range(6) if other != index)


def test_a_picture_of_one_tile_is_seen_once() -> None:
    picture = noise(50, 50)
    items = Tiles(48, scaling=PLAIN)(picture)
    assert len(items) == 1
    assert torch.equal(items[0][0], Square(48, PLAIN)(picture)[0])
    assert len(Tiles(48, min_tiles=2, thumbnail=False)(picture)) == 4


@pytest.mark.parametrize(("least", "most"), [(0, 4), (5, 4)])
def test_numbers_of_tiles_are_checked(least: int, most: int) -> None:
    with pytest.raises(ConfigError, match=f"from {least} to {most} tiles"):
        Tiles(48, min_tiles=least, max_tiles=most)


# ----------------------------------------------------------------------------------------------------------- canvas


@pytest.mark.parametrize(
    ("size", "grid", "seen"),
    [
        ((30, 20), (1, 1), (48, 32)),  # enlarged to one square
        ((60, 40), (1, 2), (60, 40)),  # kept as it is on the smallest canvas that holds it
        ((90, 90), (2, 2), (90, 90)),
        ((1000, 100), (1, 4), (192, 19)),
        ((100, 400), (4, 1), (48, 192)),
        ((400, 300), (2, 2), (96, 72)),
        ((5000, 3), (1, 4), (192, 1)),
    ],
)
def test_a_canvas_holds_the_picture_in_its_corner(
    size: tuple[int, int], grid: tuple[int, int], seen: tuple[int, int]
) -> None:
    pipeline = Canvas(48, 4, cut=False, scaling=PLAIN)
    assert pipeline.grid(*size) == grid
    view = pipeline.seen(PIL.Image.new("RGB", size, "white"))
    (pixels,), way = view.pixels, view.way
    assert pixels.shape == (3, 48 * grid[0], 48 * grid[1])
    assert float(pixels[:, : seen[1], : seen[0]].min()) > 254 and float(pixels.sum()) < 255.1 * 3 * seen[0] * seen[1]
    whole = Box(0, 0, *size, Frame(*size))
    assert way.apply(whole).xyxy == pytest.approx((0, 0, *seen))
    assert way.invert(way.apply(whole)).xyxy == pytest.approx(whole.xyxy)
