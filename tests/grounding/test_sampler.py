"""Regions to points, and points to a token: the same for the same seed, wherever a region lies."""

from typing import Any

import numpy as np
import pytest
import torch

from sightline.core.errors import ConfigError, InputError
from sightline.core.geometry import Box, Frame, Mask, Point, Transform, pad, resize
from sightline.core.patches import Patches
from sightline.grounding.sampler import (
    Regions,
    RegionSampler,
    SamplerConfig,
    drawn,
    farthest,
    looked_up,
    nearest,
    pixels_of,
    points_of,
)

FRAME = Frame(40, 30)


def filled(x1: int, y1: int, x2: int, y2: int) -> Mask:
    pixels = np.zeros((30, 40), dtype=bool)
    pixels[y1:y2, x1:x2] = True
    return Mask(pixels, FRAME)


@pytest.mark.parametrize(
    "region, corners, count",
    [
        (Box(3.5, 2, 5.2, 4, FRAME), (3, 2, 5, 4), 9),  # its last pixel counted, as published
        (Box(38, 28, 40, 30, FRAME), (38, 28, 39, 29), 4),
        (Point(20, 10, FRAME), (15, 5, 25, 15), 121),
        (Point(1.5, 29, FRAME), (0, 24, 6, 29), 42),
        (filled(3, 2, 6, 9), (3, 2, 5, 8), 21),
    ],
)
def test_pixels_of_a_region(region: Any, corners: tuple[int, ...], count: int) -> None:
    pixels = pixels_of(region)
    assert len(pixels) == count == len(set(map(tuple, pixels.tolist())))
    assert (*pixels.amin(0).tolist(), *pixels.amax(0).tolist()) == corners
    assert pixels.tolist() == sorted(pixels.tolist())


def test_a_region_outside_is_refused() -> None:
    with pytest.raises(InputError, match="outside of its picture of 40x30"):
        pixels_of(Box(50, 2, 60, 4, FRAME))
    with pytest.raises(InputError, match="expected"):
        points_of(Point(1, 1, Frame(10, 10)), Transform(FRAME), 4)


@pytest.mark.parametrize("count", [3, 20, 121, 300])
def test_points_are_a_pure_function_of_region_and_seed(count: int) -> None:
    pixels = pixels_of(Point(20, 10, FRAME))
    state = torch.get_rng_state()
    once, again, other = drawn(pixels, count), drawn(pixels, count), drawn(pixels, count, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(once, again) and len(once) == count
    known = set(map(tuple, pixels.tolist()))
    assert set(map(tuple, once.tolist())) <= known
    assert len(set(map(tuple, once.tolist()))) == min(count, len(pixels))  # none twice while there are others
    assert torch.equal(once, other) == (count == 121)


def test_points_go_the_way_of_the_picture() -> None:
    padded = pad(FRAME, 0, 5, 40, 40)
    way = Transform(FRAME, (padded, resize(padded.target, 80, 80)))
    points = points_of(filled(10, 20, 11, 21), way, 2)
    torch.testing.assert_close(points, torch.tensor([[10 / 40, 25 / 40]] * 2))
    squashed = points_of(filled(10, 20, 11, 21), Transform(FRAME, (resize(FRAME, 336, 336),)), 1)
    assert torch.equal(squashed, torch.tensor([[10.0, 20.0]]) / torch.tensor([40.0, 30.0]))


def test_rows_and_columns_are_exchanged_as_published() -> None:
    features = torch.arange(12.0)[:, None]  # three rows of four
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert looked_up(features, (1, 3, 4), corners)[:, 0].tolist() == [0, 8, 3, 11]


def test_thinning_and_neighbours_are_those_by_hand() -> None:
    line = torch.tensor([[[0.5, 0.0], [0.0, 0.0], [0.9, 0.0], [0.2, 0.0]]])
    assert farthest(line, 3).tolist() == [[0, 1, 2]]
    near = nearest(line, line[:, :2], 2)
    assert [set(row) for row in near[0].tolist()] == [{0, 3}, {1, 3}]


def test_a_token_of_each_region_whose_gradients_reach_all() -> None:
    cfg = SamplerConfig(inputs=6, width=5, points=20, sampled=(8, 3), neighbours=(4, 2))
    sampler = RegionSampler(cfg)
    features = torch.randn(2 * 9, 6, requires_grad=True)
    points = torch.rand(3, 20, 2)
    both = Patches(features, ((1, 3, 3),) * 2)
    tokens = sampler(both, Regions(torch.arange(3), torch.tensor([1, 0, 1]), points))
    for k, item in enumerate((1, 0, 1)):
        alone = sampler(Patches(features[item * 9 : item * 9 + 9], ((1, 3, 3),)), Regions(*_one(points[k])))
        torch.testing.assert_close(tokens[k], alone[0], atol=1e-5, rtol=1e-5)
    tokens.square().sum().backward()
    assert features.grad is not None and float((features.grad != 0).float().mean()) > 0.8  # some corner is far off
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in sampler.parameters())


def _one(points: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), points[None]


@pytest.mark.parametrize(
    "settings", [{"sampled": (8,)}, {"points": 100}, {"neighbours": (24, 200)}, {"sampled": (), "neighbours": ()}]
)
def test_settings_that_do_not_fit_are_refused(settings: Any) -> None:
    with pytest.raises(ConfigError, match=r"points|rounds"):
        SamplerConfig(inputs=4, width=4, **settings)
