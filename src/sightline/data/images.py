"""Pictures to pixels: resize, crop or pad, normalise; the way coordinates went is recorded.

Two ways give the same pixels within one level of 255 (in pure noise two, once in ten thousand): Pillow's own filters,
exact against the published processors, and torch's antialiased uint8 interpolation, several times faster, the default.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import PIL.Image
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from ..core import geometry
from ..core.config import config
from ..core.geometry import Frame, Transform
from ..core.patches import Tiling

Resample = Literal["bicubic", "bilinear", "lanczos"]
Triple = tuple[float, float, float]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)

# pixels a picture may have on its way: a ribbon 30000 long, padded or resized as a whole, would take gigabytes
_LARGEST = 2**26

_FILTERS = {
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}


@config
class Scaling:
    """How pixels are resampled and normalised: (value / 255 - mean) / std per channel."""

    mean: Triple = HALF
    std: Triple = HALF
    resample: Resample = "bicubic"
    exact: bool = False  # Pillow's filters instead of torch's, which has no lanczos

    def resized(self, picture: PIL.Image.Image, width: int, height: int) -> Tensor:
        """uint8 [3, height, width]."""
        if picture.size == (width, height):
            return as_bytes(picture)
        if self.exact or self.resample == "lanczos":
            return as_bytes(picture.resize((width, height), _FILTERS[self.resample]))
        pixels = as_bytes(picture)[None]
        # channels last: torch's uint8 path vectorises over the channels of a pixel
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        sizes = [(height, width)]
        if picture.height - height > max(0, 2 * (picture.width - width)):
            sizes.insert(
                0, (height, picture.width)
            )  # Pillow's order for tall pictures; values are cut to 8 bits between
        for size in sizes:
            pixels = F.interpolate(pixels, size=size, mode=self.resample, antialias=True, align_corners=False)
        return pixels[0]

    def normalised(self, pixels: Tensor) -> Tensor:
        """float32 of the same shape, in one multiply and one add."""
        scale = torch.tensor([1 / (255 * s) for s in self.std])[:, None, None]
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)])[:, None, None]
        return torch.addcmul(shift, pixels.float(), scale).contiguous()


@dataclass(frozen=True)
class Seen:
    """A picture as a model sees it: one view, or several tiles and maybe the whole beside them; or a whole film.

    pixels: a float tensor [3, height, width] per view, or [time, frames of a patch, 3, height, width]. way: how
    coordinates go from the original to what places are counted in. tiles: rows and columns of the tiles. tiling: where
    the model is told how they lie. frames: how many pictures it stands for. seconds: from one step of a film's time to
    the next; None for a picture.
    """

    pixels: tuple[Tensor, ...]
    way: Transform
    tiles: tuple[int, int] = (1, 1)
    tiling: Tiling | None = None
    frames: int = 1
    seconds: float | None = None


def ways(seen: Sequence[Seen]) -> list[Transform]:
    """How coordinates go into each picture, and each frame of a film."""
    return [each.way for each in seen for _ in range(each.frames)]


class OneView:
    """Base of pipelines that make one view of a picture."""

    def __call__(self, picture: PIL.Image.Image) -> tuple[Tensor, Transform]:
        """An upright RGB picture to float pixels [3, height, width] and the way its coordinates went."""
        raise NotImplementedError

    def seen(self, picture: PIL.Image.Image) -> Seen:
        """The picture's only view."""
        pixels, way = self(picture)
        return Seen((pixels,), way)

    def frame(self, picture: PIL.Image.Image) -> Seen:
        """A film's frame, which is seen like any picture."""
        return self.seen(picture)


@config
class Square(OneView):
    """Stretch to a square, whatever the picture's proportions (SigLIP, PaliGemma, this project's own)."""

    size: PositiveInt
    scaling: Scaling = field(default_factory=Scaling)
    kind: Literal["square"] = "square"

    def __call__(self, picture: PIL.Image.Image) -> tuple[Tensor, Transform]:
        frame = Frame(*picture.size)
        way = Transform(frame, (geometry.resize(frame, self.size, self.size),))
        return self.scaling.normalised(self.scaling.resized(picture, self.size, self.size)), way


@config
class CenterCrop(OneView):
    """The shorter side to `shortest`, then the middle `crop` x `crop` (CLIP).

    The longer side is rounded down, as the published processor does. rounding: where a window's corner lies that falls
    between two pixels: at the one before, as there, or at the even one, as torchvision and so OpenCLIP have it.
    """

    shortest: PositiveInt
    crop: PositiveInt
    scaling: Scaling = field(default_factory=lambda: Scaling(CLIP_MEAN, CLIP_STD))
    kind: Literal["center-crop"] = "center-crop"
    rounding: Literal["down", "even"] = "down"

    def __call__(self, picture: PIL.Image.Image) -> tuple[Tensor, Transform]:
        width, height = picture.size
        short, long = min(width, height), max(width, height)
        longer = int(self.shortest * long / short)
        new = (longer, self.shortest) if width > height else (self.shortest, longer)
        frame = Frame(width, height)
        step = geometry.resize(frame, *new)
        spare = [side - self.crop for side in new]
        left, top = (n // 2 if self.rounding == "down" else round(n / 2) for n in spare)
        way = Transform(frame, (step, geometry.crop(step.target, left, top, self.crop, self.crop)))
        if new[0] * new[1] <= _LARGEST:
            return self.scaling.normalised(_window(self.scaling.resized(picture, *new), left, top, self.crop)), way
        x0, y0 = max(left, 0), max(top, 0)  # what is seen of a ribbon, alone: within one level of the same
        x1, y1 = min(left + self.crop, new[0]), min(top + self.crop, new[1])
        box = (x0 * width / new[0], y0 * height / new[1], x1 * width / new[0], y1 * height / new[1])
        seen = picture.resize((x1 - x0, y1 - y0), _FILTERS[self.scaling.resample], box)
        return self.scaling.normalised(_window(as_bytes(seen), left - x0, top - y0, self.crop)), way


@config
class PadSquare(OneView):
    """Pad to a square in the mean colour, the picture in the middle, then resize (LLaVA-1.5's own processor).

    fill: another colour to pad with, red, green and blue from 0 to 255.
    """

    size: PositiveInt
    scaling: Scaling = field(default_factory=lambda: Scaling(CLIP_MEAN, CLIP_STD))
    kind: Literal["pad-square"] = "pad-square"
    fill: tuple[int, int, int] | None = None

    def __call__(self, picture: PIL.Image.Image) -> tuple[Tensor, Transform]:
        width, height = picture.size
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        frame = Frame(width, height)
        padded = geometry.pad(frame, left, top, side, side)
        way = Transform(frame, (padded, geometry.resize(padded.target, self.size, self.size)))
        if width != height:
            red, green, blue = self.fill or (int(m * 255) for m in self.scaling.mean)
            wide, length = width > height, side
            if side * side > _LARGEST:  # the longer side takes its final length before the shorter one is padded
                length = self.size
                picture = picture.resize((length, height) if wide else (width, length), _FILTERS[self.scaling.resample])
            canvas = PIL.Image.new("RGB", (length, side) if wide else (side, length), (red, green, blue))
            canvas.paste(picture, (left, top))
            picture = canvas
        return self.scaling.normalised(self.scaling.resized(picture, self.size, self.size)), way


def as_bytes(picture: PIL.Image.Image) -> Tensor:
    """uint8 [3, height, width] of an RGB picture."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def _window(pixels: Tensor, left: int, top: int, side: int) -> Tensor:
    """A square window that may reach beyond the picture, where it is black before normalising."""
    _, height, width = pixels.shape
    out = pixels.new_zeros((3, side, side))
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    out[:, y0 - top : y1 - top, x0 - left : x1 - left] = pixels[:, y0:y1, x0:x1]
    return out
