"""Rotary positions: turning complex numbers, so that products depend on distances alone."""

import pytest
import torch
from torch import Tensor

from sightline.layers.rotary import rotary_table, rotate


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
