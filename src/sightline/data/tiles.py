"""Pictures of any size as several views: cut into squares, the whole beside them, or fitted into one.

Each way of seeing is a configuration, as those of `data.images` are; `Pipeline` is any of them all.
"""

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Literal

import numpy as np
import PIL.Image
from pydantic import Field, PositiveInt
from torch import Tensor

from ..core import geometry
from ..core.config import config
from ..core.errors import ConfigError
from ..core.geometry import Frame, Transform
from ..core.patches import Tiling
from .images import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    PadSquare,
    Scaling,
    Seen,
    Square,
)
from .native_resolution import FitWithin, NativeResolution


@config
class Tiles:
    """Squares cut from the picture, and after several of them the whole picture as one more (InternVL).

    The picture is stretched to the grid of squares whose proportions are nearest its own (arXiv:2404.16821, section
    3.3). Each view is an item of its own; places are counted in shares of the whole picture.
    """

    size: PositiveInt
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    scaling: Scaling = field(default_factory=lambda: Scaling(IMAGENET_MEAN, IMAGENET_STD))
    kind: Literal["tiles"] = "tiles"

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(f"from {self.min_tiles} to {self.max_tiles} tiles, expected 1 or more, the larger last")

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows for a picture of this size; of equally near grids the larger, if the picture is too."""
        sides = range(1, self.max_tiles + 1)
        grids = [(c, r) for c in sides for r in sides if self.min_tiles <= c * r <= self.max_tiles]
        best, least = (1, 1), float("inf")
        for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            away = abs(width / height - columns / rows)
            large = width * height > 0.5 * self.size**2 * columns * rows
            if away < least or (away == least and large):
                best, least = (columns, rows), away
        return best

    def __call__(self, picture: PIL.Image.Image) -> tuple[tuple[Tensor, Transform], ...]:
        """Pixels [3, size, size] of each item and the way coordinates went into it, row by row, the whole one last."""
        columns, rows = self.grid(*picture.size)
        frame, side = Frame(*picture.size), self.size
        step = geometry.resize(frame, columns * side, rows * side)
        pixels = self.scaling.resized(picture, columns * side, rows * side)
        items = []
        for top in range(0, rows * side, side):
            for left in range(0, columns * side, side):
                way = Transform(frame, (step, geometry.crop(step.target, left, top, side, side)))
                items.append((self.scaling.normalised(pixels[:, top : top + side, left : left + side]), way))
        if self.thumbnail and len(items) > 1:
            items.append(Square(side, self.scaling)(picture))
        return tuple(items)

    def seen(self, picture: PIL.Image.Image) -> Seen:
        """All views."""
        columns, rows = self.grid(*picture.size)
        frame = Frame(*picture.size)
        way = Transform(frame, (geometry.resize(frame, self.size, self.size),))
        return Seen(tuple(pixels for pixels, _ in self(picture)), way, (rows, columns))

    def frame(self, picture: PIL.Image.Image) -> Seen:
        """A film's frame, of which only the whole is seen."""
        return Square(self.size, self.scaling).seen(picture)


@config
class AnyResolution:
    """The whole picture stretched to a square, then squares cut from it in its own proportions (LLaVA-NeXT).

    grids: rows and columns of squares that a picture may fill. It is padded in black to the best of them
    (haotian-liu/LLaVA, llava/mm_utils.py).
    """

    size: PositiveInt
    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    scaling: Scaling = field(default_factory=lambda: Scaling(CLIP_MEAN, CLIP_STD))
    kind: Literal["any-resolution"] = "any-resolution"

    def __post_init__(self) -> None:
        if not self.grids or min(min(grid) for grid in self.grids) < 1:
            raise ConfigError(f"grids of squares {self.grids}, expected rows and columns of 1 or more")

    def seen(self, picture: PIL.Image.Image) -> Seen:
        """The whole picture, then its squares row by row."""
        side = self.size
        rows, columns = best_grid(*picture.size, self.grids, side)
        whole, way = Square(side, self.scaling)(picture)
        canvas = self.scaling.normalised(fitted(picture, columns * side, rows * side, self.scaling))
        views = (whole, *squares(canvas, side))
        return Seen(views, way, (rows, columns), Tiling(rows, columns, *picture.size))

    def frame(self, picture: PIL.Image.Image) -> Seen:
        """A film's frame, which is seen like any picture."""
        return self.seen(picture)


@config
class Fitted:
    """The longer side to `size`, the shorter to no less than `min_size`, in black down to whole patches (Aria).

    grids: rows and columns of squares of `unit` that a picture may fill, padded in black to the best of them and cut
    into squares of `size`, each of which is fitted alone; none: the picture is not cut.
    """

    size: PositiveInt
    patch: int
    min_size: PositiveInt = 336
    grids: tuple[tuple[int, int], ...] = ()
    unit: int = 490
    scaling: Scaling = field(default_factory=Scaling)
    kind: Literal["fitted"] = "fitted"

    def __post_init__(self) -> None:
        if self.size % self.patch or not 1 <= self.min_size <= self.size:
            found = f"sides from {self.min_size} to {self.size}"
            raise ConfigError(f"{found}, expected the larger last, and that one in whole patches of {self.patch}")

    def seen(self, picture: PIL.Image.Image) -> Seen:
        """One view, or one of each square."""
        frame = Frame(*picture.size)
        if not self.grids:
            pixels, way = self.fit(picture)
            return Seen((pixels,), way)
        rows, columns = best_grid(*picture.size, self.grids, self.unit)
        canvas = fitted(picture, columns * self.unit, rows * self.unit, self.scaling).permute(1, 2, 0)
        pieces = [
            PIL.Image.fromarray(canvas[top : top + self.size, left : left + self.size].contiguous().numpy())
            for top in range(0, canvas.shape[0], self.size)
            for left in range(0, canvas.shape[1], self.size)
        ]
        tiles = (-(-canvas.shape[0] // self.size), -(-canvas.shape[1] // self.size))
        return Seen(tuple(self.fit(piece)[0] for piece in pieces), Transform(frame), tiles)

    def frame(self, picture: PIL.Image.Image) -> Seen:
        """A film's frame, which is not cut."""
        pixels, way = self.fit(picture)
        return Seen((pixels,), way)

    def fit(self, picture: PIL.Image.Image) -> tuple[Tensor, Transform]:
        """Pixels [3, height, width] of whole patches and the way coordinates went."""
        width, height = picture.size
        scale = self.size / max(width, height)
        if width >= height:
            width, height = self.size, max(int(height * scale), self.min_size)
        else:
            width, height = max(int(width * scale), self.min_size), self.size
        pixels = self.scaling.resized(picture, width, height)
        across, down = (-(-side // self.patch) * self.patch for side in (width, height))
        canvas = pixels.new_zeros((3, down, across))
        canvas[:, :height, :width] = pixels
        frame = Frame(*picture.size)
        step = geometry.resize(frame, width, height)
        way = Transform(frame, (step, geometry.pad(step.target, 0, 0, across, down)))
        return self.scaling.normalised(canvas), way


@config
class Canvas:
    """Squares cut from the picture in its own proportions, and after several the whole picture as one more (Llama 4).

    Not `cut`, the canvas is one view, whose squares the encoder tells apart (Llama 3.2). The picture is padded in black
    on the right and below to the canvas, of up to `max_tiles` squares, that needs the least change of its size. It is
    not enlarged beyond the side of a square, unless `enlarged`, which takes the canvas that lets it be largest.
    """

    size: PositiveInt
    max_tiles: int = 16
    enlarged: bool = False
    cut: bool = True
    scaling: Scaling = field(default_factory=lambda: Scaling(resample="bilinear"))
    kind: Literal["canvas"] = "canvas"

    def __post_init__(self) -> None:
        if self.max_tiles < 1:
            raise ConfigError(f"{self.max_tiles} tiles, expected 1 or more")

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of squares; of canvases that change the size alike, the smallest."""
        counts = range(1, self.max_tiles + 1)
        grids = [(r, c) for r in counts for c in counts if r * c <= self.max_tiles]
        cut = np.array(grids, dtype=np.float32) * self.size  # in single precision, as published
        scales = (cut / np.array((height, width), dtype=np.float32)).min(1)
        larger = scales[scales >= 1]
        chosen = scales.max() if self.enlarged or not len(larger) else larger.min()
        return min((grid for grid, scale in zip(grids, scales, strict=True) if scale == chosen), key=math.prod)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture takes on its canvas."""
        rows, columns = self.grid(width, height)
        down, across = rows * self.size, columns * self.size
        if not self.enlarged:
            down, across = min(max(height, self.size), down), min(max(width, self.size), across)
        if across / width < down / height:
            return across, max(min(math.floor(height * (across / width)), down), 1)
        return max(min(math.floor(width * (down / height)), across), 1), down

    def seen(self, picture: PIL.Image.Image) -> Seen:
        """The squares row by row, the whole one last; or the canvas."""
        side, (rows, columns) = self.size, self.grid(*picture.size)
        pixels = self.scaling.resized(picture, *self.resized(*picture.size))
        canvas = pixels.new_zeros((3, rows * side, columns * side))
        canvas[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        if not self.cut:
            frame = Frame(*picture.size)
            step = geometry.resize(frame, pixels.shape[2], pixels.shape[1])
            way = Transform(frame, (step, geometry.pad(step.target, 0, 0, columns * side, rows * side)))
            return Seen((self.scaling.normalised(canvas),), way)
        views = squares(self.scaling.normalised(canvas), side)
        whole, way = Square(side, self.scaling)(picture)
        return Seen((*views, whole) if len(views) > 1 else tuple(views), way, (rows, columns))

    def frame(self, picture: PIL.Image.Image) -> Seen:
        """A film's frame, of which only the whole is seen."""
        return Square(self.size, self.scaling).seen(picture)


Pipeline = Annotated[
    Square | CenterCrop | PadSquare | Tiles | AnyResolution | Fitted | Canvas | NativeResolution | FitWithin,
    Field(discriminator="kind"),
]


def best_grid(width: int, height: int, grids: Sequence[tuple[int, int]], unit: int) -> tuple[int, int]:
    """Rows and columns of squares of `unit` that keep most pixels of a picture; of those that keep as many, the fewest.

    Of equals the first.
    """

    def worth(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * unit / width, rows * unit / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -rows * columns

    return max(grids, key=worth)


def fitted(picture: PIL.Image.Image, width: int, height: int, scaling: Scaling) -> Tensor:
    """uint8 [3, height, width]: the picture in its own proportions, as large as it fits, in the middle of black."""
    across, down = width / picture.width, height / picture.height
    if across < down:
        new = width, min(math.ceil(picture.height * across), height)
    else:
        new = min(math.ceil(picture.width * down), width), height
    pixels = scaling.resized(picture, *new)
    left, top = (width - new[0]) // 2, (height - new[1]) // 2
    canvas = pixels.new_zeros((3, height, width))
    canvas[:, top : top + new[1], left : left + new[0]] = pixels
    return canvas


def squares(pixels: Tensor, side: int) -> list[Tensor]:
    """Squares [3, side, side] of pixels [3, height, width], row by row."""
    _, height, width = pixels.shape
    return [
        pixels[:, top : top + side, left : left + side].contiguous()
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
