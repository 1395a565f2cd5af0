"""Films: frames with their true times from folders, animated pictures and what PyAV reads; all else is one line."""

import io
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from sightline.core.errors import CapacityError, InputError, SightlineError
from sightline.core.sequence import Image, Video, images_of
from sightline.data import media
from sightline.data.media import open_image, open_media, open_video, taken
from sightline.serving.talker import conversation

COLORS = ["red", "green", "blue", "white", "black"]


def animated(format: str = "GIF", duration: Any = 200, count: int = 5, size: tuple[int, int] = (40, 30)) -> bytes:
    frames = [PIL.Image.new("RGB", size, color) for color in COLORS[:count]]
    out = io.BytesIO()
    more = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(out, format, save_all=True, append_images=frames[1:], duration=duration, loop=0, **more)
    return out.getvalue()


def colors(film: Video) -> list[tuple[int, ...]]:
    return [frame.picture.getpixel((5, 5)) for frame in film.frames]


def rgb(name: str) -> tuple[int, ...]:
    return PIL.Image.new("RGB", (1, 1), name).getpixel((0, 0))  # type: ignore[return-value]


def refused(source: Any, kind: type[SightlineError] = InputError, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        open_video(source, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_an_animated_picture_tells_its_times(tmp_path: Path, format: str) -> None:
    data = animated(format, duration=[100, 200, 300, 400, 500])
    (tmp_path / "film").write_bytes(data)  # what a file is called says nothing
    for source in (data, tmp_path / "film", str(tmp_path / "film")):
        film = open_video(source)
        assert film.times == pytest.approx((0.0, 0.1, 0.3, 0.6, 1.0))
        assert colors(film) == [rgb(color) for color in COLORS]
        assert all(frame.picture.mode == "RGB" for frame in film.frames)


def test_frames_are_taken_evenly_or_by_a_rate() -> None:
    data = animated(duration=[100, 200, 300, 400, 500])
    assert open_video(data, frames=3).times == pytest.approx((0.0, 0.3, 1.0))
    assert colors(open_video(data, frames=2)) == [rgb("red"), rgb("black")]
    assert open_video(data, frames=1).times == (0.0,)
    film = open_video(data, rate=2.0)  # what is shown at 0, 0.5 and 1 second
    assert film.times == pytest.approx((0.0, 0.3, 1.0)) and colors(film) == [rgb(c) for c in ("red", "blue", "black")]
    assert open_video(data, rate=100.0, frames=4).times == pytest.approx((0.0, 0.1, 0.6, 1.0))


@pytest.mark.parametrize(
    "times, most, rate, wanted",
    [
        ([0.0], 8, None, [0]),
        ([0.0, 1.0, 2.0, 3.0, 4.0], 3, None, [0, 2, 4]),
        ([0.0, 0.5, 1.0, 1.5, 2.0], 8, 1.0, [0, 2, 4]),
        ([5.0, 5.5, 7.0], 8, 1.0, [0, 1, 2]),
        ([0.0, 10.0], 8, 1.0, [0, 1]),  # one that is shown long is taken once
        ([i / 30 for i in range(91)], 8, 1.0, [0, 30, 60, 90]),
    ],
)
def test_which_frames_are_taken(times: list[float], most: int, rate: float | None, wanted: list[int]) -> None:
    assert taken(times, most, rate) == wanted


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for i, color in zip((1, 2, 10, 9), COLORS, strict=False):
        PIL.Image.new("RGB", (8, 8), color).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    film = open_video(tmp_path, fps=2.0)
    assert film.times == (0.0, 0.5, 1.0, 1.5)
    assert colors(film) == [rgb(color) for color in ("red", "green", "white", "blue")]


def test_a_still_is_a_picture_and_what_moves_a_film(tmp_path: Path) -> None:
    still = animated(count=1)
    (tmp_path / "still.gif").write_bytes(still)
    (tmp_path / "film.webp").write_bytes(animated("WEBP"))
    assert isinstance(open_media(tmp_path / "still.gif"), Image) and isinstance(open_media(still), Image)
    assert isinstance(open_media(tmp_path / "film.webp"), Video) and isinstance(open_media(animated()), Video)
    assert isinstance(open_media(PIL.Image.new("RGB", (4, 4))), Image)
    assert isinstance(open_media(np.zeros((4, 4, 3), dtype=np.uint8)), Image)
    assert open_image(animated()).picture.getpixel((5, 5)) == rgb("red")  # asked for a picture, it is its first


def test_a_question_about_a_film_is_one_about_its_frames(tmp_path: Path) -> None:
    (tmp_path / "clip.gif").write_bytes(animated())
    talk = conversation(str(tmp_path / "clip.gif"), "what happens?")
    assert len(images_of(talk)) == 5 and isinstance(talk[0].parts[0], Video)


@pytest.mark.parametrize(
    "source, said",
    [
        (b"", "not a film"),
        (b"GIF89a" + bytes(20), "not an animated picture"),
        (animated()[:-400], "damaged or cut off"),
        (Path("/nowhere/film.gif"), "no such file"),
        (Path("/nowhere/film.mp4"), "no such file"),
    ],
)
def test_what_is_no_film_is_one_line(source: Any, said: str) -> None:
    assert said in refused(source)


def test_settings_and_empty_folders_are_told(tmp_path: Path) -> None:
    assert "folder without frames" in refused(tmp_path)
    assert "0 frames" in refused(animated(), frames=0)
    assert "-1" in refused(animated(), rate=-1.0)


def test_what_would_take_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_FILM_PIXELS", 5 * 40 * 30 - 1)
    assert "5 frames of 40x30 pixels" in refused(animated(), CapacityError)
    monkeypatch.setattr(media, "MAX_PIXELS", 1000)
    assert "40x30 pixels, at most" in refused(animated(), CapacityError)


def test_without_pyav_the_extra_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "film.mp4").write_bytes(b"film")
    monkeypatch.setitem(sys.modules, "av", None)
    told = "film.mp4: a film in .mp4 is read by PyAV, expected: pip install 'sightline[video]'"
    assert refused(tmp_path / "film.mp4").endswith(told)


class FakeFilm:
    """As much of a container of PyAV as is used: ten frames a second from second five on, packets out of order."""

    def __init__(self, path: str) -> None:
        if Path(path).read_bytes() != b"film":
            raise RuntimeError("invalid data")
        stream = SimpleNamespace(width=8, height=6, time_base=Fraction(1, 100))
        self.streams = SimpleNamespace(video=[stream])

    def __enter__(self) -> "FakeFilm":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def demux(self, stream: Any) -> list[Any]:
        return [SimpleNamespace(pts=pts) for pts in (500, 530, 510, 520, 540, None)]

    def decode(self, video: int) -> Any:
        for i, color in enumerate(COLORS):
            picture = PIL.Image.new("RGB", (8, 6), color)
            yield SimpleNamespace(pts=500 + 10 * i, rotation=90, to_image=lambda picture=picture: picture)


def test_what_pyav_reads_keeps_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in: PyAV itself is an extra that may be absent."""
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=FakeFilm))
    (tmp_path / "film.mp4").write_bytes(b"film")
    film = open_video(tmp_path / "film.mp4", frames=3)
    assert film.times == pytest.approx((0.0, 0.2, 0.4)) and colors(film) == [rgb(c) for c in ("red", "blue", "black")]
    assert film.frames[0].picture.size == (6, 8)  # turned as the film says
    (tmp_path / "other.mkv").write_bytes(b"none")
    assert "no film that PyAV can read" in refused(tmp_path / "other.mkv")
