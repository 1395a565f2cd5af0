"""Boxes and points with the frame they are measured in, and the exactly invertible way between frames.

A picture is turned upright, resized, padded or cropped before a model sees it. Each of these is an affine step along
the two axes, so a whole chain maps a place there and back without loss beyond float64 rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar, final

from .errors import InputError

if TYPE_CHECKING:  # values do without torch
    from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """A coordinate system: x right and y down from the upper left corner, in pixels of a picture of this size."""

    width: float
    height: float

    def __post_init__(self) -> None:
        if not (0 < self.width < math.inf and 0 < self.height < math.inf):
            raise InputError(f"a picture of {self.width}x{self.height} pixels: expected sides above 0")


@final
@dataclass(frozen=True)
class Point:
    """A place in a frame, with an optional label and confidence in [0, 1]."""

    x: float
    y: float
    frame: Frame
    label: str = ""
    confidence: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.x) and math.isfinite(self.y)):
            raise InputError(f"point {self.x, self.y}: expected finite numbers")


@final
@dataclass(frozen=True)
class Box:
    """An axis-aligned rectangle in a frame: left, top, right, bottom; right and bottom are outer edges."""

    x1: float
    y1: float
    x2: float
    y2: float
    frame: Frame
    label: str = ""
    confidence: float | None = None

    def __post_init__(self) -> None:
        if not (-math.inf < self.x1 <= self.x2 < math.inf and -math.inf < self.y1 <= self.y2 < math.inf):  # nor NaN
            raise InputError(f"box {self.xyxy}: expected finite left <= right and top <= bottom")

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        return self.x1, self.y1, self.x2, self.y2

    @property
    def area(self) -> float:
        return (self.x2 - self.x1) * (self.y2 - self.y1)

    @property
    def center(self) -> Point:
        return Point((self.x1 + self.x2) / 2, (self.y1 + self.y2) / 2, self.frame, self.label, self.confidence)

    def clipped(self) -> "Box":
        """The part inside the frame."""
        x1, x2 = (min(max(x, 0.0), self.frame.width) for x in (self.x1, self.x2))
        y1, y2 = (min(max(y, 0.0), self.frame.height) for y in (self.y1, self.y2))
        return replace(self, x1=x1, y1=y1, x2=x2, y2=y2)


Place = TypeVar("Place", Box, Point)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes of one frame, continuous edges (no +1); 0 for two empty boxes."""
    if a.frame != b.frame:
        raise InputError(f"boxes measured in {_size(a.frame)} and {_size(b.frame)} pixels, expected one frame")
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    shared = max(width, 0.0) * max(height, 0.0)
    union = a.area + b.area - shared
    return shared / union if union > 0 else 0.0


def generalized_iou(a: "Tensor", b: "Tensor") -> "Tensor":
    """IoU of boxes [..., 4] (left, top, right, bottom), less the share of the box around both that neither fills.

    [...] in [-1, 1], with a gradient where the two do not meet as well (arXiv:1902.09630).
    """
    low_a, high_a, low_b, high_b = a[..., :2], a[..., 2:], b[..., :2], b[..., 2:]

    def area(low: "Tensor", high: "Tensor") -> "Tensor":
        return (high - low).clamp(min=0).prod(-1)

    shared = area(low_a.maximum(low_b), high_a.minimum(high_b))
    union = area(low_a, high_a) + area(low_b, high_b) - shared
    around = area(low_a.minimum(low_b), high_a.maximum(high_b))
    return shared / union.clamp(min=1e-9) - (around - union) / around.clamp(min=1e-9)


def match(found: Sequence[Box], truth: Sequence[Box], threshold: float = 0.5) -> list[tuple[int, int, float]]:
    """Greedy one-to-one pairs (found, truth, IoU) of at least `threshold`, best first."""
    pairs = sorted(((iou(f, t), i, j) for i, f in enumerate(found) for j, t in enumerate(truth)), reverse=True)
    taken: list[tuple[int, int, float]] = []
    for overlap, i, j in pairs:
        if overlap >= threshold and all(i != a and j != b for a, b, _ in taken):
            taken.append((i, j, overlap))
    return taken


@dataclass(frozen=True)
class Step:
    """x' = scale_x * x + shift_x and the same for y, from one frame to another; axes swap first if `swap`."""

    source: Frame
    target: Frame
    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)
    swap: bool = False

    def forward(self, x: float, y: float) -> tuple[float, float]:
        if self.swap:
            x, y = y, x
        return self.scale[0] * x + self.shift[0], self.scale[1] * y + self.shift[1]

    def backward(self, x: float, y: float) -> tuple[float, float]:
        x, y = (x - self.shift[0]) / self.scale[0], (y - self.shift[1]) / self.scale[1]
        return (y, x) if self.swap else (x, y)


def resize(source: Frame, width: float, height: float) -> Step:
    """Stretch to a new size."""
    return Step(source, Frame(width, height), scale=(width / source.width, height / source.height))


def crop(source: Frame, left: float, top: float, width: float, height: float) -> Step:
    """Cut out a window."""
    return Step(source, Frame(width, height), shift=(-left, -top))


def pad(source: Frame, left: float, top: float, width: float, height: float) -> Step:
    """Put the picture at (left, top) of a larger canvas."""
    return Step(source, Frame(width, height), shift=(left, top))


# EXIF orientation: whether axes swap, then whether the new x and the new y run backwards
_ORIENTATIONS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


def orient(source: Frame, orientation: int) -> Step:
    """Turn a stored picture upright, by its EXIF orientation 1 to 8 (others mean 1)."""
    swap, flip_x, flip_y = _ORIENTATIONS.get(orientation, _ORIENTATIONS[1])
    target = Frame(source.height, source.width) if swap else source
    scale = (-1.0 if flip_x else 1.0, -1.0 if flip_y else 1.0)
    shift = (target.width if flip_x else 0.0, target.height if flip_y else 0.0)
    return Step(source, target, scale, shift, swap)


@dataclass(frozen=True)
class Transform:
    """The chain of steps from the upright original picture to what the model sees."""

    source: Frame
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        here = self.source
        for step in self.steps:
            if step.source != here:
                raise ValueError(f"a step from {step.source} cannot follow {here}")
            here = step.target

    @property
    def target(self) -> Frame:
        return self.steps[-1].target if self.steps else self.source

    def then(self, step: Step) -> "Transform":
        return Transform(self.source, (*self.steps, step))

    def apply(self, place: Place) -> Place:
        """A place of the original in the model's frame."""
        return self._moved(place, forward=True)

    def invert(self, place: Place) -> Place:
        """A place of the model's frame in the original."""
        return self._moved(place, forward=False)

    def _moved(self, place: Place, forward: bool) -> Place:
        here, frame = (self.source, self.target) if forward else (self.target, self.source)
        if place.frame != here:
            raise InputError(f"a place measured in {_size(place.frame)} pixels, expected pixels of {_size(here)}")
        if isinstance(place, Point):
            x, y = self._map(place.x, place.y, forward)
            return replace(place, x=x, y=y, frame=frame)
        ax, ay = self._map(place.x1, place.y1, forward)
        bx, by = self._map(place.x2, place.y2, forward)
        return replace(place, x1=min(ax, bx), y1=min(ay, by), x2=max(ax, bx), y2=max(ay, by), frame=frame)

    def _map(self, x: float, y: float, forward: bool) -> tuple[float, float]:
        for step in self.steps if forward else reversed(self.steps):
            x, y = step.forward(x, y) if forward else step.backward(x, y)
        return x, y


def _size(frame: Frame) -> str:
    return f"{frame.width:g}x{frame.height:g}"
