"""Places as numbers instead of words, read from what a decoder holds at the token that begins a place.

As detectors do (DETR, arXiv:2005.12872, section 3.1): a perceptron gives the centre and sides, and a box is learned by
the distance of these and by generalised IoU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import config
from ..core.errors import ConfigError
from ..core.geometry import Box, Point, Transform, generalized_iou
from .codecs.base import Place, corners, placed

BOX, POINT = "<box>", "<point>"  # the control tokens that begin a place, as in this project's own convention


@dataclass(frozen=True)
class PlaceTargets:
    """Where places begin in a sequence, and what they are.

    slots: int64 [n], the tokens that begin them. shares: float32 [n, 4], centre x and y, width and height as shares of
    the picture that the model sees. boxes: bool [n], False for a point, which has no sides.
    """

    slots: Tensor
    shares: Tensor
    boxes: Tensor

    def moved(self, slots: int) -> "PlaceTargets":
        """The same in a sequence whose beginning lies so many tokens further."""
        return replace(self, slots=self.slots + slots)

    @staticmethod
    def joined(parts: "Sequence[PlaceTargets]") -> "PlaceTargets":
        """Several as one."""
        columns = ([getattr(part, name) for part in parts] for name in ("slots", "shares", "boxes"))
        return PlaceTargets(*(torch.cat(column) for column in columns))

    def to(self, device: torch.device | str) -> "PlaceTargets":
        return PlaceTargets(self.slots.to(device), self.shares.to(device), self.boxes.to(device))


@config
class BoxHeadConfig:
    """Sizes of a head that reads places: layers of a perceptron, `hidden` numbers between two of them."""

    width: int  # of the decoder
    hidden: int
    layers: int = 3

    def __post_init__(self) -> None:
        if min(self.width, self.hidden, self.layers) < 1:
            raise ConfigError(f"a head of {self.layers} layers and {self.hidden} numbers, expected at least 1 of both")


class BoxHead(nn.Module):
    """Hidden states to places."""

    def __init__(self, cfg: BoxHeadConfig) -> None:
        super().__init__()
        self.config = cfg
        sizes = [cfg.width, *[cfg.hidden] * (cfg.layers - 1), 4]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., width] to centre x and y, width and height [..., 4], shares in [0, 1] in float32."""
        x = hidden
        for i, layer in enumerate(self.layers):
            x = layer(F.relu(x) if i else x)
        return x.float().sigmoid()


def edges(shares: Tensor) -> Tensor:
    """Centre and sides [..., 4] as left, top, right, bottom."""
    half = shares[..., 2:] / 2
    return torch.cat((shares[..., :2] - half, shares[..., :2] + half), dim=-1)


def place_loss(found: Tensor, truth: PlaceTargets, distance: float = 5.0, overlap: float = 2.0) -> Tensor:
    """Loss [n] of shares [n, 4]: distances, of a point those of its centre, and for a box 1 - generalised IoU."""
    away = (found - truth.shares).abs()
    points = ~truth.boxes[:, None] & torch.tensor([False, False, True, True], device=found.device)
    away = away.masked_fill(points, 0.0).sum(-1)
    apart = 1 - generalized_iou(edges(found), edges(truth.shares))
    return distance * away + overlap * torch.where(truth.boxes, apart, 0.0)


def shares_of(places: Sequence[Place], way: Transform) -> tuple[Tensor, Tensor]:
    """Shares [n, 4] of places of the original picture, and which of them are boxes [n]."""
    ends = torch.tensor([[*(numbers := corners(place, way))[:2], *numbers[-2:]] for place in places])
    low, high = ends[:, :2], ends[:, 2:]
    shares = torch.cat(((low + high) / 2, high - low), dim=1)
    return shares, torch.tensor([isinstance(place, Box) for place in places])


def places_of(shares: Tensor, boxes: Tensor, way: Transform, label: str = "") -> list[Box | Point]:
    """Places of the original picture, in its pixels, for shares [n, 4] of what the model sees."""
    numbers = torch.where(boxes[:, None], edges(shares), shares).tolist()
    return [placed(row if box else row[:2], way, label) for row, box in zip(numbers, boxes.tolist(), strict=True)]
