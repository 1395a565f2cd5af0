"""The scenes world: seeded pictures of coloured shapes with exact truth.

A scene is a pure function of its seed and configuration. It knows every object's attributes, its tight box as drawn
and how much of it is visible, and from these its captions and dense per-patch truth; questions about it
are in `scene_questions`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ..core.errors import ConfigError
from . import scene_phrases
from .scene_drawing import (
    BACKGROUNDS,
    OUTLINE_NAMES,
    PALETTE,
    STYLES,
    TURNS,
    Background,
    Rgb,
    Stamp,
    background_for,
    finish,
    jittered,
    paint,
    paint_background,
    stamp,
)

COLORS = tuple(PALETTE)
SHAPES = OUTLINE_NAMES
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted", "hollow")

Xyxy = tuple[int, int, int, int]

# The longer side, in pixels of a canvas whose shorter side is 128: small enough for twelve, large enough to be told
# apart, and a gap between the two sizes.
_EXTENTS = {"small": (18, 19, 20, 21, 22), "large": (30, 32, 34, 36, 38)}
_SPACING = 16  # least distance of two centres along x or y, same unit: no two in one patch of 16
_VISIBLE = 0.65  # least visible part of an object
_TRIES = 60


@dataclass(frozen=True)
class SceneConfig:
    """What scenes may contain. Objects scale with the shorter side; `overlap` is the share of scenes where objects
    of different colours may cover each other a little; in `distinct` scenes no two share a colour or a shape."""

    width: int = 128
    height: int = 128
    min_objects: int = 1
    max_objects: int = 12
    overlap: float = 0.3
    distinct: bool = False
    shapes: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = COLORS
    textures: tuple[str, ...] = TEXTURES
    styles: tuple[str, ...] = STYLES
    backgrounds: tuple[str, ...] = BACKGROUNDS

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 64:
            raise ConfigError(f"scene of {self.width}x{self.height} pixels: each side must be at least 64")
        if not 1 <= self.min_objects <= self.max_objects <= 12:
            raise ConfigError(
                f"min_objects {self.min_objects}, max_objects {self.max_objects}: expected 1 <= min <= max <= 12"
            )
        if self.distinct and self.max_objects > min(len(self.colors), len(self.shapes)):
            raise ConfigError(
                f"distinct scenes of {self.max_objects} objects: expected as many colors ({len(self.colors)}) and "
                f"shapes ({len(self.shapes)})"
            )
        for name, known in _KNOWN.items():
            given = getattr(self, name)
            if unknown := sorted(set(given) - set(known)):
                raise ConfigError(f"unknown {name} {unknown[0]!r}: expected some of {', '.join(known)}")
            if not given:
                raise ConfigError(f"{name} is empty: expected some of {', '.join(known)}")


_KNOWN = {"shapes": SHAPES, "colors": COLORS, "textures": TEXTURES, "styles": STYLES, "backgrounds": BACKGROUNDS}


@dataclass(frozen=True)
class Object:
    """One drawn shape. `box` is the tight x1, y1, x2, y2 in pixels of all of it, hidden parts too; `visible` the part
    not covered by later objects; the last four fields are how it is drawn."""

    shape: str
    color: str
    size: str
    texture: str
    box: Xyxy
    visible: float
    rgb: Rgb
    extent: int
    angle: int
    wobble: int

    @property
    def center(self) -> tuple[float, float]:
        """The middle of the box, in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def label(self) -> str:
        """Colour and shape, as in "red circle"."""
        return f"{self.color} {self.shape}"

    def stamp(self) -> Stamp:
        """The masks it is drawn with."""
        return stamp(self.shape, self.extent, self.texture, self.angle, self.wobble)

    def corner(self) -> tuple[int, int]:
        """Where the stamp's upper left pixel lies."""
        box = self.stamp().box
        return self.box[0] - box[0], self.box[1] - box[1]


@dataclass(frozen=True)
class Scene:
    """A picture as values; `objects` are in drawing order, the last on top."""

    seed: int
    size: tuple[int, int]
    objects: tuple[Object, ...]
    background: Background
    style: str

    def picture(self) -> Image.Image:
        """The scene drawn, RGB, `size` pixels."""
        canvas = paint_background(self.background, self.size)
        for each in self.objects:
            paint(canvas, each.stamp(), each.corner(), each.color, each.rgb, self.style)
        return finish(canvas, self.style, self.seed)

    def owners(self) -> np.ndarray:
        """Index of the topmost object at each pixel, -1 where there is none: int8 [height, width]."""
        width, height = self.size
        owners = np.full((height, width), -1, np.int8)
        for index, each in enumerate(self.objects):
            covered, (x, y) = each.stamp().covered, each.corner()
            owners[y : y + covered.shape[0], x : x + covered.shape[1]][covered] = index
        return owners

    def caption(self, rng: random.Random) -> str:
        """An exact caption of all objects; the wording and the attributes said are drawn from `rng`."""
        return scene_phrases.caption(self.objects, textured=self.textured, rng=rng)

    @property
    def textured(self) -> bool:
        """Whether textures tell objects apart or are worth saying: some object is not solid."""
        return any(each.texture != "solid" for each in self.objects)

    def grid(self, patch: int = 16) -> dict[str, np.ndarray]:
        """Dense truth per patch, each [rows, columns] (partial patches at the right and bottom count).

        `object` 1 where an object's centre falls (the later drawn of two); there `color`, `shape`, `size` and
        `texture` index into COLORS, SHAPES, SIZES, TEXTURES (-1 elsewhere) and `box` [rows, columns, 4] is x1, y1,
        x2, y2 in 0..1 of the picture (0 elsewhere). `cover` is the topmost object at the patch's middle pixel,
        `cover_color` and `cover_shape` its indices (-1 where there is none).
        """
        width, height = self.size
        rows, columns = -(-height // patch), -(-width // patch)
        truth = {name: np.full((rows, columns), -1, np.int64) for name in ("color", "shape", "size", "texture")}
        centers, boxes = np.zeros((rows, columns), np.int64), np.zeros((rows, columns, 4), np.float32)
        for each in self.objects:
            cell = int(each.center[1] // patch), int(each.center[0] // patch)
            centers[cell] = 1
            boxes[cell] = np.array(each.box) / (width, height, width, height)
            for name, classes in _CLASSES.items():
                truth[name][cell] = classes.index(getattr(each, name))
        ys = np.minimum(np.arange(rows) * patch + patch // 2, height - 1)
        xs = np.minimum(np.arange(columns) * patch + patch // 2, width - 1)
        cover = self.owners()[np.ix_(ys, xs)].astype(np.int64)
        covers = {
            f"cover_{name}": np.array([*(_CLASSES[name].index(getattr(each, name)) for each in self.objects), -1])[
                cover
            ]
            for name in ("color", "shape")
        }
        return {"object": centers, **truth, "box": boxes, "cover": cover, **covers}


_CLASSES = {"color": COLORS, "shape": SHAPES, "size": SIZES, "texture": TEXTURES}


def reading_order(objects: Sequence[Object]) -> list[Object]:
    """Left to right by centre, then top to bottom."""
    return sorted(objects, key=lambda each: (each.center[0], each.center[1]))


# ------------------------------------------------------------------------------------------------------- generation


def scene(seed: int, config: SceneConfig = SceneConfig()) -> Scene:
    """The scene of this seed: a pure function of its arguments."""
    rng = random.Random(f"scene {seed}")
    style = rng.choice(config.styles)
    objects = _layout(config, style, rng)
    background = background_for((each.color for each in objects), config.backgrounds, rng)
    return Scene(seed, (config.width, config.height), objects, background, style)


def _kinds(count: int, config: SceneConfig, rng: random.Random) -> list[tuple[str, str]]:
    """Colour and shape of `count` objects: free, of few kinds, around a group of alike ones, or all different."""
    colors, shapes = config.colors, config.shapes
    if config.distinct:
        return list(zip(rng.sample(colors, count), rng.sample(shapes, count), strict=True))
    plan = rng.choices(("free", "few", "group", "one shape", "one color"), (20, 25, 35, 10, 10))[0]
    if plan == "few":
        colors = tuple(rng.sample(colors, min(len(colors), rng.randint(2, 4))))
        shapes = tuple(rng.sample(shapes, min(len(shapes), rng.randint(2, 4))))
    color, shape = rng.choice(colors), rng.choice(shapes)
    if plan == "group":
        alike = rng.randint(1, min(6, count))
        kinds = [(color, shape)] * alike
        while len(kinds) < count:
            share = rng.random()
            kinds.append((color if share < 0.35 else rng.choice(colors), shape if share > 0.65 else rng.choice(shapes)))
    elif plan == "one shape":
        kinds = [(rng.choice(colors), shape) for _ in range(count)]
    elif plan == "one color":
        kinds = [(color, rng.choice(shapes)) for _ in range(count)]
    else:
        kinds = [(rng.choice(colors), rng.choice(shapes)) for _ in range(count)]
    rng.shuffle(kinds)
    return kinds


def _layout(config: SceneConfig, style: str, rng: random.Random) -> tuple[Object, ...]:
    """Objects with places; a crowded attempt loses objects down to `min_objects`, then starts afresh."""
    count = rng.randint(config.min_objects, config.max_objects)
    kinds = _kinds(count, config, rng)
    overlap = rng.random() < config.overlap
    textures = ("solid",) if "solid" in config.textures and rng.random() < 0.45 else config.textures
    sizes = rng.choices((SIZES, ("small",), ("large",)), (70, 15, 15))[0]
    for _ in range(_TRIES):
        board = _Board((config.width, config.height), overlap, style == "sketchy")
        for color, shape in kinds:
            board.add(color, shape, rng.choice(sizes), rng.choice(textures), rng)
        if len(board.objects) >= config.min_objects:
            return board.finished()
        sizes = SIZES[:1]
    raise ConfigError(f"{config.min_objects} objects do not fit into {config.width}x{config.height} pixels")


class _Board:
    """The canvas while objects are placed: who owns each pixel, and how many each still shows."""

    def __init__(self, size: tuple[int, int], overlap: bool, wobbly: bool) -> None:
        self.size, self.overlap, self.wobbly = size, overlap, wobbly
        self.unit = min(size) / 128
        self.objects: list[Object] = []
        self.owners = np.full((size[1], size[0]), -1, np.int8)
        self.areas: list[int] = []
        self.shown: list[int] = []

    def add(self, color: str, shape: str, size: str, texture: str, rng: random.Random) -> None:
        """Place one more object on top; a large one that finds no room becomes small, a small one is left out."""
        for name in dict.fromkeys((size, "small")):
            extent = round(rng.choice(_EXTENTS[name]) * self.unit)
            wobble = rng.randint(1, 3) if self.wobbly else 0
            angle = rng.choice(TURNS.get(shape, (0,))) + (0 if wobble else rng.choice((-8, 0, 8)))
            made = stamp(shape, extent, texture, angle, wobble)
            for _ in range(_TRIES):
                side = made.covered.shape[0]
                x, y = rng.randint(0, self.size[0] - side), rng.randint(0, self.size[1] - side)
                box = (x + made.box[0], y + made.box[1], x + made.box[2], y + made.box[3])
                if self._clear(box, color) and self._claim(made, x, y):
                    rgb = jittered(color, rng)
                    self.objects.append(Object(shape, color, name, texture, box, 1.0, rgb, extent, angle, wobble))
                    return

    def _clear(self, box: Xyxy, color: str) -> bool:
        """Centres far enough apart, and boxes too unless these two may overlap; alike colours never run together."""
        spacing = _SPACING * self.unit * 2
        for other in self.objects:
            x1, y1, x2, y2 = other.box
            if abs(box[0] + box[2] - x1 - x2) < spacing and abs(box[1] + box[3] - y1 - y2) < spacing:
                return False
            alike = color == other.color
            gap = 2 if alike else 0
            apart = box[0] > x2 + gap or box[1] > y2 + gap or box[2] + gap < x1 or box[3] + gap < y1
            if not apart and (alike or not self.overlap):
                return False
        return True

    def _claim(self, made: Stamp, x: int, y: int) -> bool:
        """Take the pixels of the silhouette unless an object below would show too little."""
        side = made.covered.shape[0]
        region = self.owners[y : y + side, x : x + side]
        hidden = np.bincount(region[made.covered] + 1, minlength=len(self.objects) + 1)[1:]
        shown = [before - int(lost) for before, lost in zip(self.shown, hidden, strict=True)]
        if any(left < _VISIBLE * area for left, area in zip(shown, self.areas, strict=True)):
            return False
        region[made.covered] = len(self.objects)
        area = int(made.covered.sum())
        self.areas.append(area)
        self.shown = [*shown, area]
        return True

    def finished(self) -> tuple[Object, ...]:
        """The objects, each with the part of it that shows."""
        return tuple(
            replace(each, visible=shown / area)
            for each, shown, area in zip(self.objects, self.shown, self.areas, strict=True)
        )
