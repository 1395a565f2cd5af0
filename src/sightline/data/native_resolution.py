"""Pictures and films seen near their own size, as one view whose grid of patches differs from picture to picture."""

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Literal

import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import geometry
from ..core.config import config
from ..core.errors import ConfigError, InputError
from ..core.geometry import Frame, Transform
from .images import CLIP_MEAN, CLIP_STD, OneView, Scaling, Seen


@config
class NativeResolution(OneView):
    """A picture near its own size and proportions: sides that are multiples, an area within bounds (Qwen2-VL).

    A patch holds several frames: those of a film, a picture over and over (arXiv:2409.12191, section 2.1).

    multiple: of which both sides are, in pixels. area: the least and the most pixels of a picture; film_area: of a
    film's frames.
    """

    multiple: int = 28
    frames: int = 2
    area: tuple[int, int] = (56 * 56, 1280 * 28 * 28)
    film_area: tuple[int, int] = (128 * 28 * 28, 768 * 28 * 28)
    scaling: Scaling = field(default_factory=lambda: Scaling(CLIP_MEAN, CLIP_STD))
    kind: Literal["native-resolution"] = "native-resolution"

    def __post_init__(self) -> None:
        rising = all(0 < least <= most for least, most in (self.area, self.film_area))
        if min(self.multiple, self.frames) < 1 or not rising:
            raise ConfigError(f"pictures of {self.area} and frames of {self.film_area} pixels, expected rising sizes")

    def size(self, width: int, height: int, area: tuple[int, int]) -> tuple[int, int]:
        """Width and height that a picture of this size gets; InputError for a ribbon, as the published processor."""
        if max(width, height) > 200 * min(width, height):
            raise InputError(f"{width}x{height} pixels, one side is more than 200 times the other")
        step, (least, most) = self.multiple, area
        new = [round(side / step) * step for side in (width, height)]
        if new[0] * new[1] > most:
            shrink = math.sqrt(width * height / most)
            new = [max(step, math.floor(side / shrink / step) * step) for side in (width, height)]
        elif new[0] * new[1] < least:
            grow = math.sqrt(least / (width * height))
            new = [math.ceil(side * grow / step) * step for side in (width, height)]
        return new[0], new[1]

    def __call__(self, picture: PIL.Image.Image) -> tuple[Tensor, Transform]:
        """Pixels [1, frames, 3, height, width]."""
        pixels, way = self._frame(picture, self.area)
        return pixels[None, None].expand(1, self.frames, -1, -1, -1), way

    def film(self, pictures: Sequence[PIL.Image.Image], times: Sequence[float]) -> Seen:
        """A film of frames of one size at their times in seconds; the last frame fills up the last patch."""
        if not pictures or len({picture.size for picture in pictures}) > 1:
            raise InputError(f"a film of {len(pictures)} frames, expected some, all of one size")
        frames = [self._frame(picture, self.film_area) for picture in pictures]
        pixels = torch.stack([*(each for each, _ in frames), *[frames[-1][0]] * (-len(frames) % self.frames)])
        between = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
        steps = pixels.unflatten(0, (-1, self.frames))
        return Seen((steps,), frames[0][1], frames=len(pictures), seconds=self.frames * between)

    def _frame(self, picture: PIL.Image.Image, area: tuple[int, int]) -> tuple[Tensor, Transform]:
        """Pixels [3, height, width] and their way."""
        size = self.size(*picture.size, area)
        frame = Frame(*picture.size)
        way = Transform(frame, (geometry.resize(frame, *size),))
        return self.scaling.normalised(self.scaling.resized(picture, *size)), way


@config
class FitWithin(OneView):
    """Shrunk to fit where it is too large, then filled up to whole patches at right and bottom (Fuyu).

    fill: the level, of 255, of what is filled.
    """

    width: int = 1920
    height: int = 1080
    multiple: int = 30
    fill: int = 1
    scaling: Scaling = field(default_factory=lambda: Scaling(resample="bilinear"))
    kind: Literal["fit-within"] = "fit-within"

    def __post_init__(self) -> None:
        if self.width % self.multiple or self.height % self.multiple or not 0 <= self.fill <= 255:
            sizes = f"{self.width}x{self.height} pixels, filled with {self.fill}"
            raise ConfigError(f"{sizes}, expected multiples of {self.multiple}, filled with 0 to 255")

    def __call__(self, picture: PIL.Image.Image) -> tuple[Tensor, Transform]:
        width, height = picture.size
        frame, new = Frame(width, height), (width, height)
        if width > self.width or height > self.height:
            scale = min(self.width / width, self.height / height)
            new = (max(1, int(width * scale)), max(1, int(height * scale)))
        step = geometry.resize(frame, *new)
        whole = [-(-side // self.multiple) * self.multiple for side in new]
        way = Transform(frame, (step, geometry.pad(step.target, 0, 0, *whole)))
        pixels = F.pad(
            self.scaling.resized(picture, *new), (0, whole[0] - new[0], 0, whole[1] - new[1]), value=self.fill
        )
        return self.scaling.normalised(pixels), way
