"""What training does between the products, against the same in torch, values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.layers import gradients
from sightline.layers.feedforward import GatedFeedForward, quick_gelu
from sightline.layers.norms import RMSNorm
from sightline.layers.rotary import rotary_table, rotate

pytestmark = pytest.mark.skipif(gradients._kernels() is None, reason="no compiler built the kernels")
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small tensors be worth a kernel."""
    monkeypatch.setattr(gradients, "ENOUGH", 1)


def same(ours: Callable[..., Tensor], torchs: Callable[..., Tensor], dtype: torch.dtype, *inputs: Tensor) -> None:
    """Both have the same values and gradients, up to the rounding of `dtype`; what they are held to is in float64."""
    given = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in given]
    out, expected = ours(*given), torchs(*exact)
    assert out.dtype == dtype and out.grad_fn is not None and type(out.grad_fn).__name__.startswith("_")
    along = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, given, along))
    wanted = (expected, *torch.autograd.grad(expected, exact, along.double()))
    for one, other in zip(found, wanted, strict=True):
        size = other.abs().max()
        assert (one.double() - other).abs().max() < (2e-5 if dtype == torch.float32 else 8e-3) * size


@PRECISIONS
@pytest.mark.parametrize("width", [16, 37])
def test_gated(dtype: torch.dtype, width: int) -> None:
    joined = 4 * torch.randn(3, 5, 2 * width)
    joined[0, 0] = torch.linspace(-200, 200, 2 * width)  # where e^-x overflows and where nothing is left of it
    same(gradients.silu_gated, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], dtype, joined)


@PRECISIONS
def test_quick_gelu(dtype: torch.dtype) -> None:
    same(quick_gelu, lambda x: x * torch.sigmoid(1.702 * x), dtype, 30 * torch.randn(7, 41))


@PRECISIONS
@pytest.mark.parametrize("rows", [1, 2])
def test_turned(dtype: torch.dtype, rows: int) -> None:
    """Heads that lie beside others in a row, by one table or by one for each row of the batch."""
    position = torch.arange(6) + torch.tensor([[0], [40]])[:rows]
    cos, sin = (t[:, None].to(dtype) for t in rotary_table(position, 12, 1e4, torch.float32))

    def exactly(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos.double() + torch.cat((-second, first), -1) * sin.double()

    joined = torch.randn(2, 6, 3 * 12 + 7).to(dtype).float()
    heads = lambda x: x[..., 7:].unflatten(-1, (3, 12)).transpose(1, 2)  # noqa: E731
    given = joined.to(dtype).requires_grad_()
    exact = joined.double().requires_grad_()
    out, expected = rotate(heads(given), cos, sin), exactly(heads(exact))
    assert type(out.grad_fn).__name__ == "_TurnedBackward"
    along = torch.randn(2, 6, 3, 12).to(dtype).transpose(1, 2)
    (found,), (wanted,) = torch.autograd.grad(out, given, along), torch.autograd.grad(expected, exact, along.double())
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert (out.double() - expected).abs().max() < bound and (found.double() - wanted).abs().max() < bound


@PRECISIONS
@pytest.mark.parametrize("offset", [False, True])
def test_norm(dtype: torch.dtype, offset: bool) -> None:
    norm = RMSNorm(24, offset=offset)
    nn.init.normal_(norm.weight)
    x = torch.randn(9, 24).to(dtype).requires_grad_()
    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    out = norm(x)
    assert type(out.grad_fn).__name__ == "_NormedBackward"
    expected = F.rms_norm(exact, (24,), weight + int(offset), 1e-6)
    along = torch.randn(9, 24).to(dtype)
    found = torch.autograd.grad(out, (x, norm.weight), along)
    wanted = torch.autograd.grad(expected, (exact, weight), along.double())
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip((out, *found), (expected, *wanted), strict=True):
        assert (one.double() - other).abs().max() < bound * other.abs().max()


def test_a_frozen_norm_gets_no_gradient() -> None:
    norm = RMSNorm(8).requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and norm.weight.grad is None


def test_what_is_no_number_stays_none() -> None:
    """A step that is not made of numbers is refused by its gradients, so that none may be lost on the way."""
    branch = GatedFeedForward(8, 8, "silu")
    x = torch.randn(4, 8, requires_grad=True)
    with torch.no_grad():
        x[1, 3] = float("nan")
    branch(x).sum().backward()
    assert x.grad is not None and bool(x.grad[1].isnan().any())
    assert branch.gate.weight.grad is not None and bool(branch.gate.weight.grad.isnan().any())


def test_a_branch_is_the_same_as_at_inference() -> None:
    branch = GatedFeedForward(8, 20, "silu")
    x = torch.randn(2, 3, 8)
    learned = branch(x)
    with torch.no_grad():
        assert torch.allclose(branch(x), learned, atol=1e-6)


def test_small_tensors_and_inference_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 8)
    assert gradients.fit(x) and not gradients.fit(x.half()) and not gradients.fit(x.to("meta"))
    with torch.no_grad():
        assert not gradients.fit(x)
    monkeypatch.setattr(gradients, "ENOUGH", 33)
    assert not gradients.fit(x)
