"""RMSNorm: its own gradient against autograd's of the formula, and training against inference."""

import pytest
import torch
from torch import Tensor

from sightline.layers.norms import AcrossHeads, RMSNorm

SHAPES = [(5, 16), (2, 3, 16), (2, 3, 4, 16)]


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def norm(offset: bool, eps: float = 1e-6) -> RMSNorm:
    """A norm whose weights are neither zeros nor ones."""
    made = RMSNorm(16, eps, offset)
    with torch.no_grad():
        made.weight.copy_(torch.randn(16))
    return made


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [False, True])
def test_it_is_the_formula(offset: bool, shape: tuple[int, ...], training: bool) -> None:
    made, x = norm(offset), torch.randn(shape) * 3
    with torch.set_grad_enabled(training):
        got = made(x)
    torch.testing.assert_close(got, formula(x, made.weight + 1 if offset else made.weight, 1e-6))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 0.5])  # the large one shows whether the gradient knows of it
def test_its_gradient_is_autograd_s(offset: bool, shape: tuple[int, ...], eps: float) -> None:
    """In float64 on the formula's side; statistics are taken in float32 on ours."""
    made = norm(offset, eps)
    x = torch.randn(shape, requires_grad=True)
    theirs = x.detach().double().requires_grad_()
    weight = made.weight.detach().double().requires_grad_()
    toward = torch.randn(shape)
    made(x).backward(toward)
    formula(theirs, weight + 1 if offset else weight, eps).backward(toward.double())
    assert x.grad is not None and theirs.grad is not None and made.weight.grad is not None and weight.grad is not None
    torch.testing.assert_close(x.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.weight.grad.double(), weight.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offset", [False, True])
def test_bfloat16_keeps_its_statistics_in_float32(offset: bool) -> None:
    """The mean of 4096 squares of 300 does not fit bfloat16's eight bits; the result is one rounding away."""
    made = RMSNorm(4096, offset=offset)
    x = (torch.randn(2, 4096) * 300).bfloat16()
    wanted = formula(x.double(), torch.ones(4096).double(), 1e-6)
    with torch.no_grad():
        asked = made(x)
    trained = made(x)
    assert asked.dtype == trained.dtype == torch.bfloat16
    torch.testing.assert_close(asked.double(), wanted, atol=0, rtol=2**-8)
    torch.testing.assert_close(trained.double(), wanted, atol=0, rtol=2**-7)


def test_zeros_stay_zeros_with_a_finite_gradient() -> None:
    made, x = norm(False), torch.zeros(2, 16, requires_grad=True)
    out = made(x)
    assert not out.any()
    out.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("offset", [False, True])
def test_a_new_norm_scales_by_one(offset: bool) -> None:
    out = RMSNorm(16, offset=offset)(torch.randn(3, 16) * 7)
    torch.testing.assert_close(out.pow(2).mean(-1), torch.ones(3))


def test_across_heads_a_token_is_normalised_as_a_whole() -> None:
    norm, heads = AcrossHeads(24), torch.randn(2, 3, 5, 8)
    torch.nn.init.normal_(norm.weight)
    tokens = heads.transpose(1, 2).flatten(2)
    scale = (tokens.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    wanted = (tokens * scale * norm.weight).unflatten(2, (3, 8)).transpose(1, 2)
    torch.testing.assert_close(norm(heads), wanted)
    with torch.no_grad():
        torch.testing.assert_close(norm(heads), wanted)
