"""Pictures and films from people, read safely: few formats, size checked before decoding, upright, RGB."""

import io
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..core.errors import CapacityError, InputError
from ..core.sequence import Image, Video

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # of the 43 that Pillow opens; most of its flaws are in the others
ANIMATED = ("GIF", "WEBP")
MAX_PIXELS = 33_200_000  # 8K video is 33.18 million
MAX_SIDE = 30_000
MAX_BYTES = 64 << 20
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # endings of frames in a folder
FILMS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
FRAMES = 8  # that are taken of a film
MAX_FILM_PIXELS = 100 * MAX_PIXELS  # of all frames of an animated picture, each of which is made from those before it

_ORIENTATION = 0x0112
_MARKS = ("exif", "xmp", "XML:com.adobe.xmp")  # where Pillow keeps what says how a picture is to be turned
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def open_image(source: "str | Path | bytes | PIL.Image.Image | np.ndarray | Image", name: str = "") -> Image:
    """An upright picture from a path, encoded bytes, a Pillow picture or an array [height, width(, 3)] of uint8.

    Raises InputError for what cannot be read and CapacityError for what is too large, each told in one line.
    """
    if isinstance(source, Image):
        return source
    if isinstance(source, PIL.Image.Image):
        return Image(rgb(upright(_loaded(source, name or "picture"))), name or "picture")
    if isinstance(source, np.ndarray):
        return Image(rgb(_loaded(_from_array(source), name or "array")), name or "array")
    if isinstance(source, (str, Path)):
        # a file's name may hold line breaks, codes that steer a terminal, bytes that are no text
        name = "".join(letter if letter.isprintable() else "?" for letter in name or str(source))
        return Image(decode(_read(Path(source), name), name), name)
    if not isinstance(source, (bytes, bytearray, memoryview)):
        kind = type(source).__name__
        raise InputError(f"{name or kind}: not a picture; expected a path, encoded bytes, a Pillow picture or an array")
    return Image(decode(source, name or "picture"), name or "picture")


def _read(path: Path, name: str) -> bytes:
    try:
        if not path.exists():
            raise InputError(f"{name}: no such file")
        if not path.is_file():
            raise InputError(f"{name}: not a regular file")
        if path.stat().st_size > MAX_BYTES:
            raise CapacityError(f"{name}: {path.stat().st_size >> 20} MiB, at most {MAX_BYTES >> 20} MiB are read")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or 'bad path'})") from None
    except ValueError:
        raise InputError("a path with a zero byte in it: no such file") from None


def _from_array(array: np.ndarray) -> PIL.Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise InputError(f"array {array.dtype} {list(array.shape)}: expected uint8 [height, width] or [..., 3 or 4]")
    return PIL.Image.fromarray(array)


def decode(data: bytes, name: str = "picture") -> PIL.Image.Image:
    """Encoded bytes to an upright RGB picture; the size in the header is checked before any pixel is decoded."""
    if not data:
        raise InputError(f"{name}: the file is empty, expected a picture")
    try:
        picture = _opened(data, FORMATS)
    except PIL.Image.DecompressionBombError:
        raise CapacityError(f"{name}: far too large, at most {MAX_PIXELS / 1e6:.1f} megapixels are read") from None
    except Exception:  # Pillow raises many kinds for damaged headers
        raise InputError(f"{name}: not a picture; expected {', '.join(FORMATS)}") from None
    return rgb(upright(_loaded(picture, name)))


def _opened(data: bytes, formats: Sequence[str]) -> PIL.Image.Image:
    """A picture of one of these formats, no pixel of it decoded; Pillow raises many kinds for damaged headers.

    Of large ones it need not warn: `check_size` has the lower limit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        return PIL.Image.open(io.BytesIO(data), formats=formats)


def _loaded(picture: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """The picture with its pixels decoded, which Pillow puts off, once its size has been checked."""
    check_size(picture.size, name)
    try:
        picture.load()
    except Exception:  # truncated or damaged data: many kinds, some with addresses in their text
        raise InputError(f"{name}: the {picture.format} data is damaged or cut off") from None
    return picture


def check_size(size: tuple[int, int], name: str) -> None:
    """Refuse what would take too much memory."""
    width, height = size
    if not (width and height):
        raise InputError(f"{name}: {width}x{height} pixels, expected sides of at least 1")
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        raise CapacityError(
            f"{name}: {width}x{height} pixels, at most {MAX_PIXELS / 1e6:.1f} megapixels "
            f"and {MAX_SIDE} pixels a side are read"
        )


def orientation(picture: PIL.Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where it is missing or damaged."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF must not cost the picture
        return 1
    return value if value in _TURNS else 1


def turned(path: Path) -> int:
    """The EXIF orientation in which a picture's file holds it; 1 where it is not to be read."""
    try:
        return orientation(_opened(path.read_bytes(), FORMATS))
    except Exception:  # as in `decode`
        return 1


def upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as its camera held it, no longer marked as turned: handed in again, it stays as it is."""
    turn = _TURNS.get(orientation(picture))
    if turn is None:
        return picture
    turned = picture.transpose(turn)
    for key in _MARKS:
        turned.info.pop(key, None)
    return turned


def rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Any mode to RGB: transparency over white, 16 bits scaled to 8."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        # of modes with 16 in their name the depth is known: a dark picture is not to be brightened
        return PIL.Image.fromarray(_eight_bits(values, 65535 if "16" in picture.mode else None)).convert("RGB")
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        over = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", over.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, over).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(values: np.ndarray, white: int | None) -> np.ndarray:
    """Grey values from 0 to `white`; where that is unknown, up to 1 as a share, up to 255 as they are, else 16 bits."""
    top = white or float(np.nanmax(values))
    scale = 255.0 if top <= 1 else 1.0 if top <= 255 else 255 / 65535
    return np.clip(np.nan_to_num(values) * scale + 0.5, 0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------------- films


def open_media(source: Any, name: str = "") -> Image | Video:
    """A film from a folder of frames, a film's file or an animated GIF or WebP, and a picture from all else."""
    if isinstance(source, (str, Path)) and _is_film(Path(source)):
        return open_video(source, name=name)
    if isinstance(source, (bytes, bytearray, memoryview)) and _moves(bytes(source)):
        return open_video(bytes(source), name=name)
    return open_image(source, name)


def open_video(
    source: str | Path | bytes, frames: int = FRAMES, rate: float | None = None, fps: float = 1.0, name: str = ""
) -> Video:
    """Frames of a film with their times in seconds, as the film itself tells them.

    source: a folder of pictures, in the order of the last numbers in their names; a path or bytes of an animated GIF or
    WebP; a path of another film, which PyAV reads. frames: the most that are taken, evenly from the first to the last.
    rate: how many are taken a second, as far as `frames` allows. fps: how many a folder holds a second.
    Raises InputError for what cannot be read and CapacityError for what is too large, each told in one line.
    """
    if frames < 1 or not (rate is None or 0 < rate < float("inf")) or not 0 < fps < float("inf"):
        raise InputError(f"{frames} frames, {rate} a second, {fps} in a folder's second; expected more than 0 of each")

    def chosen(times: Sequence[float]) -> list[int]:
        return taken(times, frames, rate)

    if isinstance(source, (str, Path)):
        name = "".join(letter if letter.isprintable() else "?" for letter in name or str(source))
        path = Path(source)
        if path.is_dir():
            return _folder(path, fps, chosen)
        if path.suffix.lower() in FILMS:
            return _decoded(path, name, chosen)
        source = _read(path, name)
    return _animated(bytes(source), name or "film", chosen)


def taken(times: Sequence[float], most: int, rate: float | None = None) -> list[int]:
    """Which frames of a film are taken: those shown at `rate` moments a second or, of all, at most `most` evenly."""
    which: Sequence[int] = range(len(times))
    if rate is not None:
        moments = int((times[-1] - times[0]) * rate + 1e-6) + 1
        shown = (bisect_right(times, times[0] + k / rate + 1e-6) - 1 for k in range(moments))
        which = list(dict.fromkeys(shown))
    count = min(len(which), most)
    return [which[round(i * (len(which) - 1) / max(1, count - 1))] for i in range(count)]


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder by the last number in their names: frame 10 comes after frame 9."""

    def counted(path: Path) -> tuple[int, str]:
        numbers = re.findall(r"\d+", path.stem)
        return (int(numbers[-1][:18]) if numbers else -1, path.name)

    return sorted((path for path in folder.iterdir() if path.suffix.lower() in PICTURES), key=counted)


def _is_film(path: Path) -> bool:
    """Whether a path is a folder, a film by its ending, or an animated picture."""
    try:
        if path.is_dir() or path.suffix.lower() in FILMS:
            return True
        with path.open("rb") as file:
            if not _may_move(file.read(16)):
                return False
        return path.stat().st_size <= MAX_BYTES and _moves(path.read_bytes())
    except (OSError, ValueError):  # which is told where it is read as a picture
        return False


def _may_move(head: bytes) -> bool:
    """Whether a file that begins like this is of a format that may hold several frames."""
    return head.startswith(b"GIF8") or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _moves(data: bytes) -> bool:
    """Whether encoded bytes hold several frames."""
    if not _may_move(data[:16]):
        return False
    try:
        return bool(getattr(_opened(data, ANIMATED), "is_animated", False))
    except Exception:  # damaged: told where it is read as a picture
        return False


def _folder(path: Path, fps: float, chosen: Callable[[Sequence[float]], list[int]]) -> Video:
    """Pictures of a folder as frames."""
    try:
        files = frame_files(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not files:
        raise InputError(f"{path}: not a regular file, and a folder without frames ({', '.join(PICTURES)})")
    times = [i / fps for i in range(len(files))]
    which = chosen(times)
    return Video(tuple(open_image(files[i]) for i in which), tuple(times[i] for i in which))


def _animated(data: bytes, name: str, chosen: Callable[[Sequence[float]], list[int]]) -> Video:
    """Frames of an animated picture; one that names no time is shown for a tenth of a second, as browsers do."""
    if not _may_move(data[:16]):
        raise InputError(f"{name}: not a film; expected an animated GIF or WebP, {', '.join(FILMS)} or a folder")
    try:
        picture: Any = _opened(data, ANIMATED)
    except PIL.Image.DecompressionBombError:
        raise CapacityError(f"{name}: far too large, at most {MAX_PIXELS / 1e6:.1f} megapixels are read") from None
    except Exception:  # Pillow raises many kinds for damaged headers
        raise InputError(f"{name}: not an animated picture") from None
    check_size(picture.size, name)
    try:
        count = getattr(picture, "n_frames", 1)
        if count * picture.width * picture.height > MAX_FILM_PIXELS:
            size = f"{count} frames of {picture.width}x{picture.height} pixels"
            raise CapacityError(f"{name}: {size}, at most {MAX_FILM_PIXELS / 1e9:.1f} billion in all are read")
        times, time = [], 0.0
        for _ in _frames(picture, range(count)):
            times.append(time)
            time += (picture.info.get("duration") or 100) / 1000
        which = chosen(times)
        shown = tuple(Image(rgb(frame.copy()), name) for frame in _frames(picture, which))
    except CapacityError:
        raise
    except Exception:  # truncated or damaged data: many kinds
        raise InputError(f"{name}: the {picture.format} data is damaged or cut off") from None
    return Video(shown, tuple(times[i] for i in which))


def _frames(picture: Any, which: Iterable[int]) -> Iterator[Any]:
    """The picture at each of some frames, decoded."""
    for i in which:
        picture.seek(i)
        picture.load()
        yield picture


def _decoded(path: Path, name: str, chosen: Callable[[Sequence[float]], list[int]]) -> Video:
    """Frames of a film that PyAV reads: their times from its packets, then the pictures of those that are taken."""
    if not path.is_file():
        raise InputError(f"{name}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        import av
    except ImportError:
        ending = path.suffix.lower()
        raise InputError(
            f"{name}: a film in {ending} is read by PyAV, expected: pip install 'sightline[video]'"
        ) from None
    try:
        with av.open(str(path)) as film:
            stream = film.streams.video[0]
            check_size((stream.width, stream.height), name)
            marks = sorted(packet.pts for packet in film.demux(stream) if packet.pts is not None)
            times = [float((mark - marks[0]) * stream.time_base) for mark in marks]
        which = chosen(times)
        wanted, found = {marks[i] for i in which}, {}
        with av.open(str(path)) as film:
            for frame in film.decode(video=0):
                if frame.pts in wanted:
                    turned = frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True)
                    found[frame.pts] = Image(rgb(turned), name)
                if len(found) == len(wanted):
                    break
        return Video(tuple(found[marks[i]] for i in which), tuple(times[i] for i in which))
    except CapacityError:
        raise
    except Exception:  # PyAV has a kind for each of FFmpeg's errors
        raise InputError(f"{name}: no film that PyAV can read, or one that is damaged or cut off") from None
