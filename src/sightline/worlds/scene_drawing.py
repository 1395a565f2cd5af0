"""Drawing of scenes: outlines, cached stamps, backgrounds and styles, in Pillow.

A stamp is one shape at one pixel size as a few 8-bit masks. It is drawn at four times its size, reduced once and
kept, so that a picture costs a few pastes an object.
"""

import io
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Rgb = tuple[int, int, int]
Outline = list[tuple[float, float]]

PALETTE: dict[str, Rgb] = {
    "red": (220, 35, 40),
    "green": (45, 160, 60),
    "blue": (40, 75, 220),
    "yellow": (248, 220, 40),
    "orange": (248, 135, 20),
    "purple": (130, 45, 170),
    "pink": (250, 140, 195),
    "cyan": (60, 210, 225),
    "brown": (125, 75, 35),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
STYLES = ("flat", "bordered", "shaded", "sketchy", "soft", "grainy", "jpeg")
BACKGROUNDS = ("plain", "gradient", "noise", "lines", "checker")

_SCALE = 4  # supersampling of stamps
_LIGHT = ("yellow", "pink", "cyan", "white")  # their patterns go darker, all others' lighter
_CONTRAST = 85.0  # least RGB distance between an object's colour and its background
_EDGE = 64  # mask value from which a pixel counts as covered: a quarter of it


# ------------------------------------------------------------------------------------------------------- outlines


def _polygon(corners: int, start: float = -90.0) -> Outline:
    angles = [math.radians(start + 360 * i / corners) for i in range(corners)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def _star() -> Outline:
    spokes = _polygon(10)
    return [(x * r, y * r) for (x, y), r in zip(spokes, (1.0, 0.42) * 5, strict=True)]


def _heart() -> Outline:
    turns = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


def _moon() -> Outline:
    outer = [(math.cos(a), math.sin(a)) for a in (math.radians(50 + 260 * i / 32) for i in range(33))]
    tip_x, tip_y = outer[0]
    centre, radius = 0.55, math.hypot(tip_x - 0.55, tip_y)
    sweep = math.atan2(tip_y, tip_x - centre)
    inner = [
        (centre + radius * math.cos(a), radius * math.sin(a))
        for a in (-sweep - (2 * math.pi - 2 * sweep) * i / 24 for i in range(1, 24))
    ]
    return outer + inner


_ARROW = [(-1.0, -0.3), (0.1, -0.3), (0.1, -0.8), (1.0, 0.0), (0.1, 0.8), (0.1, 0.3), (-1.0, 0.3)]
_OUTLINES: dict[str, Callable[[], Outline]] = {
    "circle": lambda: _polygon(48),
    "square": lambda: [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)],
    "triangle": lambda: [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)],
    "diamond": lambda: [(0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)],
    "star": _star,
    "cross": lambda: [
        (-0.33, -1),
        (0.33, -1),
        (0.33, -0.33),
        (1, -0.33),
        (1, 0.33),
        (0.33, 0.33),
        (0.33, 1),
        (-0.33, 1),
        (-0.33, 0.33),
        (-1, 0.33),
        (-1, -0.33),
        (-0.33, -0.33),
    ],
    "heart": _heart,
    "moon": _moon,
    "arrow": lambda: _ARROW,
    "oval": lambda: [(x, y * 0.58) for x, y in _polygon(48)],
}
OUTLINE_NAMES = tuple(_OUTLINES)
TURNS = {"arrow": (0, 90, 180, 270), "moon": (0, 180), "triangle": (0, 180)}  # quarter turns that keep the name


def _outline(shape: str, extent: float, angle: int, wobble: int) -> Outline:
    """Corners of `shape` turned by `angle`, its longer side `extent`, centred on its own bounding box."""
    points = _OUTLINES[shape]()
    if wobble:
        points = _shaken(points, random.Random(f"{shape}/{wobble}"))
    turn = math.radians(angle)
    cos, sin = math.cos(turn), math.sin(turn)
    points = [(x * cos - y * sin, x * sin + y * cos) for x, y in points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    scale = extent / max(max(xs) - min(xs), max(ys) - min(ys))
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    return [((x - middle_x) * scale, (y - middle_y) * scale) for x, y in points]


def _shaken(points: Outline, rng: random.Random) -> Outline:
    """The outline as an unsteady hand draws it: two slow waves along the angle, 5% of the radius."""
    phases = [(rng.uniform(0, 2 * math.pi), rng.choice((3, 4, 5, 7))) for _ in range(2)]
    dense = []
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        steps = max(1, round(math.hypot(x2 - x1, y2 - y1) / 0.15))
        dense += [(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps) for i in range(steps)]
    shaken = []
    for x, y in dense:
        angle = math.atan2(y, x)
        scale = 1 + sum(0.035 * math.sin(frequency * angle + phase) for phase, frequency in phases)
        shaken.append((x * scale, y * scale))
    return shaken


# --------------------------------------------------------------------------------------------------------- stamps


@dataclass(frozen=True, eq=False)
class Stamp:
    """Masks of one shape, all of one size: `body` is painted in the colour, `pattern` in its tint, `border` dark,
    `glow` light. `covered` [h, w] marks the silhouette and `box` its tight x1, y1, x2, y2 within the masks."""

    body: Image.Image
    pattern: Image.Image | None
    border: Image.Image | None
    glow: Image.Image
    covered: np.ndarray
    box: tuple[int, int, int, int]


@lru_cache(maxsize=8192)
def stamp(shape: str, extent: int, texture: str, angle: int, wobble: int) -> Stamp:
    """The stamp of a shape whose longer side is `extent` pixels; `wobble` 0 is a steady hand."""
    side = extent + 4
    large = Image.new("L", (side * _SCALE, side * _SCALE))
    half = side * _SCALE / 2
    outline = _outline(shape, extent * _SCALE, angle, wobble)
    ImageDraw.Draw(large).polygon([(x + half - 0.5, y + half - 0.5) for x, y in outline], fill=255)
    silhouette = large.reduce(_SCALE)
    body, pattern, border = silhouette, None, None
    if texture == "hollow":
        body = _rim(large, max(2.0, extent * 0.11))
    else:
        border = _rim(large, max(1.0, extent * 0.045))
        if texture != "solid":
            pattern = _masked(_pattern(texture, side, extent), silhouette)
    covered = np.asarray(silhouette) >= _EDGE
    ramp = Image.linear_gradient("L").transpose(Image.Transpose.FLIP_TOP_BOTTOM).resize((side, side))
    return Stamp(body, pattern, border, _masked(ramp, body), covered, _tight(covered))


def _tight(covered: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _masked(mask: Image.Image, by: Image.Image) -> Image.Image:
    product = np.asarray(mask, np.uint16) * np.asarray(by, np.uint16) // 255
    return Image.fromarray(product.astype(np.uint8))


def _rim(large: Image.Image, width: float) -> Image.Image:
    """The part of a supersampled silhouette within `width` pixels of its outside."""
    solid = np.asarray(large)
    inner = solid.copy()
    for axis in (0, 1):
        inner = _least_nearby(inner, round(width * _SCALE), axis)
    return Image.fromarray(solid - inner).reduce(_SCALE)


def _least_nearby(values: np.ndarray, radius: int, axis: int) -> np.ndarray:
    """The least value within `radius` along one axis; the borders of a stamp are empty, so wrapping is harmless."""
    least, reach = values, 0
    while reach < radius:
        step = min(reach + 1 if reach else 1, radius - reach)
        least = np.minimum(np.minimum(least, np.roll(least, step, axis)), np.roll(least, -step, axis))
        reach += step
    return least


def _pattern(texture: str, side: int, extent: int) -> Image.Image:
    """Stripes or dots [side, side], their period growing slowly with the object."""
    period = (4.5 + extent / 14) * _SCALE
    y, x = np.mgrid[0 : side * _SCALE, 0 : side * _SCALE].astype(np.float32) - side * _SCALE / 2
    if texture == "striped":
        ink = np.mod((x + y) / math.sqrt(2), period) < period * 0.42
    else:
        row = np.floor(y / period)
        dx = np.mod(x + row * period / 2, period) - period / 2
        ink = dx**2 + (np.mod(y, period) - period / 2) ** 2 < (period * 0.3) ** 2
    return Image.fromarray((ink * 255).astype(np.uint8)).reduce(_SCALE)


# ---------------------------------------------------------------------------------------------------- backgrounds


@dataclass(frozen=True)
class Background:
    """Two close colours mixed by one of a few cached masks."""

    kind: str
    first: Rgb
    second: Rgb
    variant: int


def background_for(colors: Iterable[str], kinds: tuple[str, ...], rng: random.Random) -> Background:
    """A background on which every one of `colors` stands out."""
    inks = [PALETTE[name] for name in set(colors)]
    kind, variant = rng.choice(kinds), rng.randrange(8)
    for _ in range(16):
        level = rng.choice((255, 245, 230, 205, 175, 140, 105, 70, 40, 15, 0))
        tint = 0 if rng.random() < 0.4 else 28
        first = _clipped(level + rng.randint(-tint, tint) for _ in range(3))
        shift = rng.choice((-1, 1)) * rng.randint(10, 30)
        second = _clipped(c + shift + rng.randint(-6, 6) for c in first)
        if all(math.dist(ink, end) >= _CONTRAST for ink in inks for end in (first, second)):
            return Background(kind, first, second, variant)
    return Background(kind, (150, 150, 150), (140, 140, 140), variant)  # far enough from every colour of the palette


def _clipped(channels: Iterable[int]) -> Rgb:
    red, green, blue = (min(255, max(0, c)) for c in channels)
    return red, green, blue


def paint_background(background: Background, size: tuple[int, int]) -> Image.Image:
    """The empty picture, RGB."""
    canvas = Image.new("RGB", size, background.first)
    if background.kind != "plain":
        canvas.paste(background.second, (0, 0), _mixture(background.kind, background.variant, size))
    return canvas


@lru_cache(maxsize=256)
def _mixture(kind: str, variant: int, size: tuple[int, int]) -> Image.Image:
    """How much of the second colour each pixel takes."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    across, down = x / max(1, width - 1), y / max(1, height - 1)
    if kind == "gradient":
        ramp = (across, down, (across + down) / 2, np.hypot(across - 0.5, down - 0.5) * 1.4)[variant % 4]
        amount = 1 - ramp if variant >= 4 else ramp
    elif kind == "noise":
        cell = (1, 2, 3, 4)[variant % 4]
        grains = np.random.default_rng(variant).random((height // cell + 1, width // cell + 1))
        amount = np.kron(grains, np.ones((cell, cell)))[:height, :width]
    elif kind == "lines":
        angle, period = math.pi * (variant % 4) / 4, 7 + variant
        amount = np.mod(x * math.cos(angle) + y * math.sin(angle), period) < 1.5
    else:
        cell = (6, 8, 11, 16)[variant % 4]
        amount = (x // cell + y // cell) % 2
    return Image.fromarray((np.clip(amount, 0, 1) * 255).astype(np.uint8))


# -------------------------------------------------------------------------------------------------------- painting


def paint(canvas: Image.Image, made: Stamp, at: tuple[int, int], color: str, rgb: Rgb, style: str) -> None:
    """Paste one object, its stamp's corner `at`, in `rgb`, a shade of the palette's `color`."""
    canvas.paste(rgb, at, made.body)
    if style == "shaded":
        canvas.paste(_mixed(rgb, (255, 255, 255), 0.45), at, made.glow)
    if made.pattern is not None:
        canvas.paste(_tint(color, rgb), at, made.pattern)
    if style in ("bordered", "sketchy") and made.border is not None and color != "black":
        canvas.paste(_mixed(rgb, (0, 0, 0), 0.65), at, made.border)


def _mixed(rgb: Rgb, other: Rgb, amount: float) -> Rgb:
    return _clipped(round(c + (o - c) * amount) for c, o in zip(rgb, other, strict=True))


def _tint(color: str, rgb: Rgb) -> Rgb:
    """The colour of stripes and dots: the object's own hue, clearly lighter or darker."""
    return _mixed(rgb, (0, 0, 0), 0.5) if color in _LIGHT else _mixed(rgb, (255, 255, 255), 0.65)


def finish(picture: Image.Image, style: str, seed: int) -> Image.Image:
    """What the style does to the whole picture: blur, grain or compression."""
    if style == "soft":
        return picture.filter(ImageFilter.GaussianBlur(0.8))
    if style == "grainy":
        noise = np.random.default_rng(seed).integers(-14, 15, (picture.height, picture.width, 3), dtype=np.int16)
        return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    if style == "jpeg":
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=40 + seed % 40)
        return Image.open(file).convert("RGB")
    return picture


def jittered(color: str, rng: random.Random) -> Rgb:
    """A shade of a palette colour, each channel within 12."""
    return _clipped(channel + rng.randint(-12, 12) for channel in PALETTE[color])
