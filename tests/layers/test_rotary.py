"""Rotary positions: turning complex numbers, so that products depend on distances alone."""

import math

import pytest
import torch
from torch import Tensor

from sightline.core.errors import ConfigError
from sightline.layers.rotary import RopeScaling, rotary_table, rotate


def at(x: Tensor, position: Tensor, theta: float = 10_000.0) -> Tensor:
    """x [length, dim] turned to its positions."""
    cos, sin = rotary_table(position, x.shape[-1], theta, x.dtype)
    return rotate(x[None, None], cos, sin)[0, 0]


@pytest.mark.parametrize("theta", [10_000.0, 1e6])
def test_pairs_are_complex_numbers_that_turn(theta: float) -> None:
    """Entry k and entry k + dim/2 are one number, turned by position * theta^(-2k/dim) (the half-split convention)."""
    x, position = torch.randn(6, 8), torch.tensor([0, 1, 2, 7, 100, 4095])
    speed = theta ** (-2 * torch.arange(4).double() / 8)
    turned = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones(6, 4).double(), position[:, None] * speed)
    torch.testing.assert_close(
        at(x, position, theta).double(), torch.cat((turned.real, turned.imag), 1), atol=5e-4, rtol=0
    )


@pytest.mark.parametrize("distance", [0, 1, 5, 300])
def test_products_depend_on_the_distance_alone(distance: int) -> None:
    q, k = torch.randn(1, 16).double().expand(5, -1), torch.randn(1, 16).double().expand(5, -1)
    start = torch.tensor([0, 1, 10, 100, 1000])
    products = (at(q, start + distance) * at(k, start)).sum(1)
    torch.testing.assert_close(products, products[:1].expand(5), atol=2e-3, rtol=0)
    other = (at(q, start + distance + 1) * at(k, start)).sum(1)
    assert float((other - products).abs().min()) > 1e-2


def test_turning_keeps_lengths_and_the_first_position_stays() -> None:
    x = torch.randn(4, 8)
    torch.testing.assert_close(at(x, torch.tensor([3, 20, 99, 1])).norm(dim=1), x.norm(dim=1))
    assert torch.equal(at(x, torch.zeros(4, dtype=torch.int64)), x)


def test_angles_of_far_positions_are_taken_in_float32() -> None:
    """bfloat16 knows no 1001: angles computed in it would give neighbours the same place."""
    cos, _ = rotary_table(torch.tensor([1000, 1001]), 8, 10_000.0, torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    torch.testing.assert_close(cos[:, 0].double(), torch.tensor([1000.0, 1001.0]).double().cos(), atol=4e-3, rtol=0)


def test_the_precision_of_what_is_turned_stays() -> None:
    cos, sin = rotary_table(torch.arange(3), 8, 10_000.0, torch.float32)
    assert rotate(torch.randn(1, 2, 3, 8).bfloat16(), cos, sin).dtype == torch.bfloat16


def test_the_gradient_is_that_of_the_formula() -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (t[:, None].double() for t in rotary_table(torch.arange(5)[None], 8, 10_000.0, torch.float32))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


def test_tables_narrower_than_a_head_turn_its_first_numbers() -> None:
    x, position = torch.randn(5, 12), torch.arange(5)
    cos, sin = rotary_table(position, 8, 10_000.0, torch.float32)
    turned = rotate(x[None, None], cos, sin)[0, 0]
    assert torch.equal(turned[:, 8:], x[:, 8:])
    torch.testing.assert_close(turned[:, :8], at(x[:, :8], position))


def angles(scaling: RopeScaling, length: int | None = None) -> Tensor:
    """Angles [4] of the first position for heads of 8 numbers."""
    given = None if length is None else torch.tensor([length])
    cos, sin = rotary_table(torch.tensor([[1]]), 8, 100.0, torch.float64, scaling, given)
    return torch.atan2(sin, cos)[0, 0, :4]


PLAIN = 100.0 ** -(torch.arange(4).double() / 4)


def test_scaling_all_alike() -> None:
    torch.testing.assert_close(angles(RopeScaling("linear", 4.0)), PLAIN / 4)


def test_scaling_long_waves_only() -> None:
    """With 20 tokens waves of 2 pi, 20, 63 and 199 tokens fit 3.2, 1.006, 0.3 and 0.1 times."""
    found = angles(RopeScaling("llama3", 4.0, original=20, low=0.5, high=2.0))
    blend = (20 * float(PLAIN[1]) / (2 * math.pi) - 0.5) / 1.5
    wanted = torch.stack([PLAIN[0], PLAIN[1] * (blend + (1 - blend) / 4), PLAIN[2] / 4, PLAIN[3] / 4])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_scaling_from_one_length_of_waves_on() -> None:
    """Llama 4: nothing is blended."""
    found = angles(RopeScaling("llama3", 4.0, original=20, low=1.0, high=1.0))
    torch.testing.assert_close(found, PLAIN / torch.tensor([1, 1, 4, 4]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind, grown", [("dynamic", 3 * 50 / 20 - 2), ("ntk", 7.0)])
def test_a_base_that_grows_with_the_row(kind: str, grown: float) -> None:
    scaling = RopeScaling(kind, 3.0, original=20)  # type: ignore[arg-type]
    torch.testing.assert_close(angles(scaling, 20), PLAIN, atol=1e-6, rtol=1e-6)
    base = 100.0 * grown ** (8 / 6)
    torch.testing.assert_close(angles(scaling, 50), base ** -(torch.arange(4).double() / 4), atol=1e-6, rtol=1e-5)


def test_each_row_has_a_base_of_its_own() -> None:
    scaling, position = RopeScaling("dynamic", 2.0, original=20), torch.arange(3).expand(2, 3)
    both, _ = rotary_table(position, 8, 100.0, torch.float32, scaling, torch.tensor([10, 60]))
    for row, length in enumerate((10, 60)):
        alone, _ = rotary_table(position[:1], 8, 100.0, torch.float32, scaling, torch.tensor([length]))
        assert torch.equal(both[row], alone[0])
    assert not torch.allclose(both[0], both[1])


@pytest.mark.parametrize("wrong", [{"factor": 0.5}, {"low": 5.0}, {"original": 0}])
def test_a_scaling_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        RopeScaling("llama3", **wrong)  # type: ignore[arg-type]


def test_each_axis_turns_its_own_pairs() -> None:
    places = torch.tensor([[3, 3, 3], [4, 9, 1], [7, 0, 2]])
    cos, sin = rotary_table(places, 12, 100.0, torch.float32, sections=(1, 3, 2))
    for axis, (start, stop) in enumerate(((0, 1), (1, 4), (4, 6))):
        for found, wanted in zip((cos, sin), rotary_table(places[:, axis], 12, 100.0, torch.float32), strict=True):
            assert torch.equal(found[:, start:stop], wanted[:, start:stop])
            assert torch.equal(found[:, 6 + start : 6 + stop], wanted[:, start:stop])
