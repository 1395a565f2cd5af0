"""Regions of any form as tokens: points of a region, features at the points, gathered to fewer points and to one token.

Ferret (arXiv:2310.07704, section 3.2), after point clouds (PointNet++, arXiv:1706.02413; PointMLP, arXiv:2202.07123).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import config
from ..core.errors import ConfigError, InputError
from ..core.geometry import Box, Mask, Point, Transform
from ..core.patches import Grid, Patches

SPAN = 5  # a point stands for the pixels around it, so many to each side


@dataclass(frozen=True)
class Regions:
    """Regions of pictures that tokens are made of.

    slots: int64 [n], where the token of each goes. items: int64 [n], the picture that each lies in, counted through the
    batch. points: float32 [n, points, 2], shares of that picture's width and height.
    """

    slots: Tensor
    items: Tensor
    points: Tensor

    def moved(self, slots: int, items: int) -> "Regions":
        """The same in a sequence whose beginning lies so many tokens further, and its first picture so many."""
        return Regions(self.slots + slots, self.items + items, self.points)

    @staticmethod
    def joined(parts: "Sequence[Regions]") -> "Regions":
        """Several as one."""
        columns = ([getattr(part, name) for part in parts] for name in ("slots", "items", "points"))
        return Regions(*(torch.cat(column) for column in columns))

    def to(self, device: torch.device | str) -> "Regions":
        return Regions(self.slots.to(device), self.items.to(device), self.points.to(device))


def pixels_of(region: Box | Point | Mask) -> Tensor:
    """The pixels int64 [n, 2] of a region as x and y, column by column; InputError where none is in the picture.

    A box has those that it touches, a point those at most SPAN away.
    """
    if isinstance(region, Mask):
        return torch.from_numpy(region.pixels.copy()).T.nonzero()
    if isinstance(region, Point):
        low, high = (region.x - SPAN, region.y - SPAN), (region.x + SPAN, region.y + SPAN)
    else:
        low, high = (region.x1, region.y1), (region.x2, region.y2)
    sides = int(region.frame.width), int(region.frame.height)
    ranges = [range(max(0, int(a)), min(side, int(b) + 1)) for a, b, side in zip(low, high, sides, strict=True)]
    if not all(ranges):
        raise InputError(f"a region outside of its picture of {sides[0]}x{sides[1]} pixels")
    return torch.cartesian_prod(*(torch.arange(each.start, each.stop) for each in ranges))


def drawn(pixels: Tensor, count: int, seed: int = 0) -> Tensor:
    """So many of some pixels [n, 2], each once or, where there are fewer, some again; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if len(pixels) < count:
        return torch.cat((pixels, pixels[torch.randint(len(pixels), (count - len(pixels),), generator=generator)]))
    return pixels if len(pixels) == count else pixels[torch.randperm(len(pixels), generator=generator)[:count]]


def points_of(region: Box | Point | Mask, way: Transform, count: int, seed: int = 0) -> Tensor:
    """Points float32 [count, 2] of a region, as shares of the picture that the model sees."""
    frame, target = way.source, way.target
    if region.frame != frame:
        raise InputError(f"a region measured in {region.frame}, expected {frame} as its picture")
    begin, end = way.apply(Point(0, 0, frame)), way.apply(Point(frame.width, frame.height, frame))
    first = torch.tensor([begin.x / target.width, begin.y / target.height])
    last = torch.tensor([end.x / target.width, end.y / target.height])
    shares = drawn(pixels_of(region), count, seed) / torch.tensor([frame.width, frame.height])
    return first + shares * (last - first)


@config
class SamplerConfig:
    """Sizes and settings of a region sampler.

    points: of a region at first. sampled: to how many they are thinned out, round after round. neighbours: how many
    points each that is left gathers. pooling: how what it has gathered becomes one.
    """

    inputs: int  # width of the features
    width: int  # width of the decoder
    points: int = 512
    sampled: tuple[int, ...] = (128, 32)
    neighbours: tuple[int, ...] = (24, 24)
    pooling: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        if len(self.sampled) != len(self.neighbours) or not self.sampled:
            raise ConfigError(f"{len(self.sampled)} rounds of sampling and {len(self.neighbours)} of neighbours")
        for before, left, near in zip((self.points, *self.sampled), self.sampled, self.neighbours, strict=False):
            if not 1 <= left <= before or not 1 <= near <= before:
                raise ConfigError(f"{left} of {before} points with {near} neighbours, expected 1 to {before} of both")


class RegionSampler(nn.Module):
    """A token of each region: its points are thinned out twice, those that are left gather what is near them.

    Points are looked up with rows and columns exchanged, as the published code does and its weights have learned.
    Thinning begins at a region's first point, which is one by chance, instead of drawing another.
    """

    def __init__(self, cfg: SamplerConfig) -> None:
        super().__init__()
        self.config = cfg
        placed, rounds = cfg.inputs + 2, range(len(cfg.sampled))
        self.differ = nn.ModuleList(nn.Linear(placed, placed) for _ in rounds)
        self.gather = nn.ModuleList(nn.Linear(2 * placed, cfg.inputs) for _ in rounds)
        self.norms = nn.ModuleList(nn.LayerNorm(cfg.inputs) for _ in rounds)
        self.flatten = nn.Linear(cfg.inputs * cfg.sampled[-1], cfg.inputs)
        self.project = nn.Linear(cfg.inputs, cfg.width)

    def forward(self, features: Patches, regions: Regions) -> Tensor:
        """Features [m, inputs] of the pictures to tokens [n, width]."""
        cfg, maps, grids = self.config, features.items(), features.grids
        places = zip(regions.items.tolist(), regions.points, strict=True)
        x = torch.stack([looked_up(maps[i], grids[i], points) for i, points in places])
        points = regions.points
        rounds = zip(cfg.sampled, cfg.neighbours, self.differ, self.gather, self.norms, strict=True)
        for count, near, differ, gather, norm in rounds:
            left = farthest(points, count)
            anchors = taken(points, left)
            where = nearest(points, anchors, near)
            own = torch.cat((taken(x, left), anchors.to(x.dtype)), dim=-1)[:, :, None]
            around = torch.cat((taken(x, where), taken(points, where).to(x.dtype)), dim=-1)
            both = torch.cat((differ(around - own), own.expand_as(around)), dim=-1)
            gathered = norm(F.relu(gather(both)))
            x = gathered.amax(2) if cfg.pooling == "max" else gathered.mean(2)
            points = anchors
        out: Tensor = self.project(self.flatten(x.flatten(1)))
        return out


def looked_up(features: Tensor, grid: Grid, points: Tensor) -> Tensor:
    """Features [p, width] of a picture [h*w, width] at points [p, 2], between the middles of its patches."""
    _, rows, columns = grid
    plane = features.float().T.unflatten(1, (rows, columns))[None]
    exchanged = 2 * points.flip(-1) - 1
    found = F.grid_sample(plane, exchanged[None, :, None], align_corners=True)
    return found[0, :, :, 0].T.to(features.dtype)


def farthest(points: Tensor, count: int) -> Tensor:
    """Which of points [n, p, 2] are left [n, count]: the first, then each time the one farthest from all so far."""
    chosen = torch.zeros(len(points), count, dtype=torch.int64, device=points.device)
    away = torch.full(points.shape[:2], 1e10, device=points.device)
    for k in range(1, count):
        last = points.gather(1, chosen[:, k - 1, None, None].expand(-1, 1, 2))
        away = away.minimum((points - last).square().sum(-1))
        chosen[:, k] = away.max(-1).indices
    return chosen


def nearest(points: Tensor, anchors: Tensor, count: int) -> Tensor:
    """Which of points [n, p, 2] are nearest to each of anchors [n, a, 2], [n, a, count] in no order."""
    squares = -2 * (anchors @ points.transpose(1, 2))
    squares = squares + anchors.square().sum(-1)[:, :, None] + points.square().sum(-1)[:, None]
    return squares.topk(count, largest=False, sorted=False).indices


def taken(x: Tensor, where: Tensor) -> Tensor:
    """Vectors [n, p, width] at indices [n, ...] as [n, ..., width]."""
    flat = where.flatten(1)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, flat).view(*where.shape, -1)
