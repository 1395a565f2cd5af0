"""Pictures from people: each kind is read upright as RGB, all else is one clear line, nothing large is decoded."""

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings, strategies as st

from sightline.core.errors import CapacityError, InputError, SightlineError
from sightline.core.geometry import Frame, orient
from sightline.core.sequence import Image
from sightline.data import media
from sightline.data.media import FORMATS, MAX_PIXELS, MAX_SIDE, open_image

NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
RED = (255, 0, 0)


def encoded(picture: PIL.Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def png(width: int, height: int) -> bytes:
    """A file of a few dozen bytes whose header claims a size that its pixels do not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def pixel(source: Any) -> tuple[int, ...]:
    """The upper left pixel of what is read, after checking that it is RGB."""
    found = open_image(source).picture
    assert found.mode == "RGB"
    return found.getpixel((0, 0))


def refused(source: Any, kind: type[SightlineError] = InputError) -> str:
    """The one line that refuses a source."""
    with pytest.raises(kind) as caught:
        open_image(source)
    message = str(caught.value)
    assert "\n" not in message and "0x7f" not in message  # an address in memory would help an attacker
    return message


@pytest.mark.parametrize("format", ["PNG", "BMP", "JPEG", "WEBP", "GIF"])
def test_each_format_is_read_from_a_path_and_from_bytes(tmp_path: Path, format: str) -> None:
    data = encoded(PIL.Image.new("RGB", (60, 40), "red"), format)
    path = tmp_path / "picture.data"  # what a file is called says nothing
    path.write_bytes(data)
    found = open_image(path)
    assert found.picture.size == (60, 40) and found.source == str(path)
    assert np.abs(np.subtract(found.picture.getpixel((30, 20)), RED)).max() <= 2
    assert open_image(data) == open_image(str(path)) == open_image(bytearray(data)) == found


def test_lossless_pixels_are_kept_exactly() -> None:
    assert open_image(encoded(NOISE)).picture.tobytes() == NOISE.tobytes()
    assert open_image(NOISE).picture.tobytes() == open_image(np.asarray(NOISE)).picture.tobytes() == NOISE.tobytes()


def test_an_image_is_itself() -> None:
    image = Image(NOISE)
    assert open_image(image) is image


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda folder: folder / "none.png", "none.png: no such file"),
        (lambda folder: folder, "not a regular file"),
        (lambda folder: folder / "empty.png", "empty.png: the file is empty, expected a picture"),
        (lambda folder: folder / "text.png", "text.png: not a picture; expected JPEG, PNG, WEBP, GIF, BMP"),
        (lambda folder: folder / "text.png" / "a.png", "text.png/a.png: no such file"),
        (lambda folder: str(folder / ("a" * 300)), "cannot be read (File name too long)"),
        (lambda folder: "a\0b", "a?b: no such file"),
        (lambda folder: "two\nlines\x1b[2J\udc80.png", "two?lines?[2J?.png: no such file"),
    ],
    ids=["missing", "directory", "empty", "text", "below a file", "long name", "zero byte", "line break"],
)
def test_files_that_cannot_be_read(tmp_path: Path, make: Any, said: str) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("this is not a picture")
    assert said in refused(make(tmp_path))


def test_large_files_are_not_read_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(encoded(NOISE))
    monkeypatch.setattr(media, "MAX_BYTES", 1000)
    assert "large.png: 0 MiB, at most 0 MiB are read" in refused(path, CapacityError)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_cut_off_data_is_told(format: str, kept: float) -> None:
    data = encoded(NOISE, format)
    message = refused(data[: int(len(data) * kept)])
    assert "damaged or cut off" in message or "not a picture" in message


def test_cut_off_data_of_a_picture_opened_by_pillow_is_told_too() -> None:
    """Pillow puts decoding off, so a picture handed in may still be damaged."""
    data = encoded(NOISE)
    assert "PNG data is damaged" in refused(PIL.Image.open(io.BytesIO(data[: len(data) // 2])))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_bytes_end_in_a_picture_or_in_one_line(format: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(NOISE.crop((0, 0, 12, 9)), format))
    for place, value in changes:
        data[min(int(place * len(data)), len(data) - 1)] = value
    try:
        said = open_image(bytes(data)).picture.mode
    except SightlineError as error:
        said = str(error)
    assert said == "RGB" or (said.startswith("picture: ") and "\n" not in said)


@pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused(format: str) -> None:
    assert "expected JPEG, PNG, WEBP, GIF, BMP" in refused(encoded(NOISE, format))


@pytest.mark.parametrize(
    "width, height, said",
    [
        (9000, 9000, "9000x9000 pixels, at most 33.2 megapixels"),
        (12_000, 12_000, "12000x12000 pixels, at most 33.2 megapixels"),  # here Pillow would warn
        (20_000, 20_000, "far too large"),  # here Pillow would refuse
        (MAX_SIDE + 1, 1, "and 30000 pixels a side"),
        (1, MAX_SIDE + 1, "and 30000 pixels a side"),
        (2**31 - 1, 2**31 - 1, "far too large"),
        (2**32 - 1, 1, "far too large"),
    ],
)
def test_sizes_are_refused_from_the_header_alone(
    width: int, height: int, said: str, recwarn: pytest.WarningsRecorder
) -> None:
    """Decoding would fail on these files, so the complaint about their size shows that it was not tried."""
    start = time.process_time()
    assert said in refused(png(width, height), CapacityError)
    assert time.process_time() - start < 0.2
    assert not recwarn.list


def test_the_largest_picture_is_past_the_check_of_size() -> None:
    assert "damaged or cut off" in refused(png(MAX_SIDE, MAX_PIXELS // MAX_SIDE))


@pytest.mark.parametrize("width, height", [(0, 0), (0, 5), (5, 0)])
def test_pictures_without_pixels_are_refused(width: int, height: int) -> None:
    assert "not a picture" in refused(png(width, height))
    assert f"{width}x{height} pixels, expected sides of at least 1" in refused(PIL.Image.new("RGB", (width, height)))
    assert "expected sides of at least 1" in refused(np.zeros((height, width, 3), np.uint8))


def test_pictures_in_memory_have_the_same_limits() -> None:
    assert "40000x1 pixels" in refused(PIL.Image.new("RGB", (40_000, 1)), CapacityError)
    assert "9000x9000 pixels" in refused(np.broadcast_to(np.uint8(0), (9000, 9000)), CapacityError)


def test_a_single_pixel() -> None:
    for source in (encoded(PIL.Image.new("RGB", (1, 1), "red")), PIL.Image.new("RGB", (1, 1), "red")):
        assert open_image(source).picture.size == (1, 1) and pixel(source) == RED


@pytest.mark.parametrize(
    "picture, wanted",
    [
        (PIL.Image.new("L", (3, 2), 77), (77, 77, 77)),
        (PIL.Image.new("1", (3, 2), 1), (255, 255, 255)),
        (PIL.Image.new("P", (3, 2), 0), (0, 0, 0)),
        (PIL.Image.new("RGB", (3, 2), "red").quantize(4), RED),
        (PIL.Image.new("RGBA", (3, 2), (255, 0, 0, 255)), RED),
        (PIL.Image.new("RGBA", (3, 2), (255, 0, 0, 0)), (255, 255, 255)),  # see-through over white
        (PIL.Image.new("RGBA", (3, 2), (255, 0, 0, 51)), (255, 204, 204)),
        (PIL.Image.new("LA", (3, 2), (0, 51)), (204, 204, 204)),
        (PIL.Image.fromarray(np.full((2, 3), 65_535, np.uint16)), (255, 255, 255)),
        (PIL.Image.fromarray(np.full((2, 3), 32_896, np.uint16)), (128, 128, 128)),
        (PIL.Image.fromarray(np.full((2, 3), 200, np.uint16)), (1, 1, 1)),  # dark in 16 bits, not bright in 8
        (PIL.Image.fromarray(np.full((2, 3), 1, np.uint16)), (0, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, PIL.Image.Image) else "",
)
def test_each_mode_becomes_rgb(picture: PIL.Image.Image, wanted: tuple[int, int, int]) -> None:
    assert pixel(picture) == pixel(encoded(picture)) == wanted


@pytest.mark.parametrize(
    "values, wanted",
    [
        (np.full((2, 3), 0.5, np.float32), 128),  # a share
        (np.full((2, 3), 100, np.int32), 100),
        (np.full((2, 3), 65_535, np.int32), 255),
        (np.full((2, 3), -5, np.int32), 0),
        (np.array([[np.nan, 255.0]], np.float32), 0),
    ],
)
def test_values_of_unknown_depth_are_scaled_by_their_largest(values: np.ndarray, wanted: int) -> None:
    assert pixel(PIL.Image.fromarray(values)) == (wanted,) * 3


def test_colours_that_stand_for_transparency_are_white() -> None:
    for picture, through in ((PIL.Image.new("RGB", (3, 2), "red"), RED), (PIL.Image.new("P", (3, 2), 0), 0)):
        assert pixel(encoded(picture, transparency=through)) == (255, 255, 255)


def test_colours_of_print_are_read() -> None:
    data = encoded(PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert PIL.Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(np.subtract(pixel(data), RED)).max() <= 4


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [PIL.Image.new("RGB", (9, 9), color) for color in ("red", "lime", "blue")]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert PIL.Image.open(io.BytesIO(data)).n_frames == 3
        assert pixel(data) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_turned_as_their_camera_was_held(format: str, orientation: int) -> None:
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:8, :16] = 255  # a mark that each turn and flip moves elsewhere
    stored = upright if orientation < 5 else upright.transpose(1, 0, 2)
    rows_run_back = orientation in (3, 4, 6, 7)  # EXIF 2.3, table of tag 274: what the first row and column show
    columns_run_back = orientation in (2, 3, 7, 8)
    stored = stored[:: -1 if rows_run_back else 1, :: -1 if columns_run_back else 1]
    exif = PIL.Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[format]
    data = encoded(PIL.Image.fromarray(stored.copy()), format, exif=exif, **options)
    found = open_image(data).picture
    assert open_image(PIL.Image.open(io.BytesIO(data))) == Image(found)  # handed in by a caller, the same
    assert open_image(found) == Image(found)  # and turned once only
    assert found.size == (40, 24)
    assert np.abs(np.asarray(found).astype(int) - upright).max() <= (40 if format == "JPEG" else 0)

    # the recorded way of coordinates is that of the pixels
    ys, xs = np.nonzero(stored[:, :, 0])
    way = orient(Frame(stored.shape[1], stored.shape[0]), orientation)
    ends = sorted([way.forward(xs.min(), ys.min()), way.forward(xs.max() + 1, ys.max() + 1)])
    assert (min(x for x, _ in ends), min(y for _, y in ends)) == (0, 0)
    assert (max(x for x, _ in ends), max(y for _, y in ends)) == (16, 8)


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_unknown_orientations_turn_nothing(orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[274] = orientation
    assert open_image(encoded(NOISE, exif=exif)).picture.tobytes() == NOISE.tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encoded(NOISE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert open_image(data).picture.size == NOISE.size


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3, 3), np.float32),
        np.zeros((2, 3, 3), np.int64),
        np.zeros((2, 3), bool),
        np.zeros((2, 3, 2), np.uint8),
        np.zeros((3, 2, 3, 3), np.uint8),
        np.zeros(5, np.uint8),
        np.array("text"),
        np.array(None),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_arrays_of_another_kind_are_told(array: np.ndarray) -> None:
    message = refused(array)
    assert str(array.dtype) in message and str(list(array.shape)) in message
    assert "expected uint8 [height, width] or [..., 3 or 4]" in message


def test_arrays_need_not_lie_in_one_piece() -> None:
    values = np.asarray(NOISE)
    assert np.array_equal(np.asarray(open_image(values[::-2, ::-1]).picture), values[::-2, ::-1])
    assert pixel(np.full((2, 3), 9, np.uint8)) == (9, 9, 9)
    assert pixel(np.zeros((2, 3, 4), np.uint8)) == (255, 255, 255)


@pytest.mark.parametrize("source, kind", [(None, "NoneType"), (3, "int"), ([1], "list"), (object(), "object")])
def test_what_is_no_picture_at_all_is_told_by_its_kind(source: Any, kind: str) -> None:
    assert refused(source).startswith(f"{kind}: not a picture; expected a path, encoded bytes, a Pillow picture")


def test_a_name_stands_in_the_message_and_in_the_image() -> None:
    assert open_image(encoded(NOISE), "upload 3").source == "upload 3"
    with pytest.raises(InputError, match=r"^upload 3: not a picture"):
        open_image(b"text", "upload 3")
