"""Pictures from people, read safely: few formats, size checked before decoding, upright, RGB."""

import io
import warnings
from pathlib import Path

import numpy as np
import PIL.Image

from ..core.errors import CapacityError, InputError
from ..core.sequence import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # of the 43 that Pillow opens; most of its flaws are in the others
MAX_PIXELS = 33_200_000  # 8K video is 33.18 million
MAX_SIDE = 30_000
MAX_BYTES = 64 << 20

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
        with warnings.catch_warnings():  # below is our own limit, which is lower than the one that Pillow warns of
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.Image.DecompressionBombError:
        raise CapacityError(f"{name}: far too large, at most {MAX_PIXELS / 1e6:.1f} megapixels are read") from None
    except Exception:  # Pillow raises many kinds for damaged headers
        raise InputError(f"{name}: not a picture; expected {', '.join(FORMATS)}") from None
    return rgb(upright(_loaded(picture, name)))


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
