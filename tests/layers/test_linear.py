"""Several maps of one input: joined or apart, they are the same numbers and the same gradients."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sightline.layers.linear import after, together, working_precision

SIZES = (12, 4, 4)


def maps(biased: tuple[bool, ...]) -> list[nn.Linear]:
    return [nn.Linear(8, size, bias=bias) for size, bias in zip(SIZES, biased, strict=True)]


@pytest.mark.parametrize("biased", [(True,) * 3, (False,) * 3, (True, False, True)])
@pytest.mark.parametrize("training", [False, True])
def test_together_is_each_map_alone(biased: tuple[bool, ...], training: bool) -> None:
    made, x = maps(biased), torch.randn(2, 5, 8)
    with torch.set_grad_enabled(training):
        found = together(x, made)
    assert [part.shape for part in found] == [(2, 5, size) for size in SIZES]
    for part, each in zip(found, made, strict=True):
        torch.testing.assert_close(part, each(x))


@pytest.mark.parametrize("biased", [(True,) * 3, (False,) * 3, (True, False, True)])
def test_gradients_reach_every_weight_as_they_would_alone(biased: tuple[bool, ...]) -> None:
    made, x = maps(biased), torch.randn(2, 5, 8, requires_grad=True)
    parameters = [x, *(p for each in made for p in each.parameters())]
    toward = [torch.randn(2, 5, size) for size in SIZES]
    joined = torch.autograd.grad(list(together(x, made)), parameters, toward)
    apart = torch.autograd.grad([each(x) for each in made], parameters, toward)
    for a, b in zip(joined, apart, strict=True):
        torch.testing.assert_close(a, b)


def test_a_map_that_is_more_than_linear_is_called_itself() -> None:
    """An adapter in the place of one map must not be left out by the joining."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    made, x = [nn.Linear(8, 4), Doubled(8, 4), nn.Sequential(nn.Linear(8, 4), nn.ReLU())], torch.randn(3, 8)
    for part, each in zip(together(x, made), made, strict=True):
        torch.testing.assert_close(part, each(x))


def test_working_precision_is_autocast_s_while_it_is_on() -> None:
    x = torch.randn(3)
    assert working_precision(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert working_precision(x).dtype == torch.bfloat16
    assert working_precision(x.to("meta")).dtype == torch.float32


def squared(x: torch.Tensor) -> torch.Tensor:
    return x * x.sigmoid()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_map_reads_is_made_again_for_the_same_gradients(bias: bool, bf16: bool) -> None:
    linear, x = nn.Linear(8, 4, bias=bias), torch.randn(2, 5, 8, requires_grad=True)
    parameters, toward = [x, *linear.parameters()], torch.randn(2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found, expected = after(squared, x, linear), linear(squared(x))
    assert type(found.grad_fn).__name__ == "_AfterBackward" and found.dtype == expected.dtype
    gradients = [torch.autograd.grad(out, parameters, toward.to(out.dtype)) for out in (found, expected)]
    for a, b in zip((found, *gradients[0]), (expected, *gradients[1]), strict=True):
        bound = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {}
        torch.testing.assert_close(a, b, **bound)


def test_what_an_activation_makes_is_let_go() -> None:
    linear, x, made = nn.Linear(8, 4), torch.randn(16, 8, requires_grad=True), []

    def watched(x: torch.Tensor) -> torch.Tensor:
        out = torch.relu(x)
        made.append(weakref.ref(out))
        return out

    out = after(watched, x, linear)
    assert out.requires_grad and [ref() for ref in made] == [None]
    out.sum().backward()
    assert [ref() for ref in made] == [None, None] and linear.weight.grad is not None


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_a_map_or_an_input_that_learns_nothing(frozen: str) -> None:
    linear, x = nn.Linear(8, 4), torch.randn(3, 8, requires_grad=frozen == "weight")
    linear.requires_grad_(frozen == "x")
    out = after(torch.relu, x, linear)
    torch.testing.assert_close(out, linear(torch.relu(x)))
    assert out.requires_grad == (frozen != "both")


def test_hooks_hear_of_a_map_after_an_activation() -> None:
    linear, heard = nn.Linear(8, 4), []
    linear.register_forward_hook(lambda *_: heard.append(1))
    after(torch.relu, torch.randn(3, 8, requires_grad=True), linear)
    together(torch.randn(3, 8, requires_grad=True), [linear, nn.Linear(8, 4)])
    assert len(heard) == 2


def test_a_map_with_a_hook_for_gradients_alone_is_called_too() -> None:
    linear, heard = nn.Linear(8, 4), []
    linear.register_full_backward_hook(lambda *_: heard.append(1))
    after(torch.relu, torch.randn(3, 8, requires_grad=True), linear).sum().backward()
    sum(x.sum() for x in together(torch.randn(3, 8, requires_grad=True), [linear, nn.Linear(8, 4)])).backward()
    assert heard == [1, 1]


def test_gradients_under_checkpoints_and_by_finite_differences() -> None:
    linear, x = nn.Linear(5, 3).double(), torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    whole = lambda x: after(squared, x, linear)  # noqa: E731
    assert torch.autograd.gradcheck(whole, (x,))
    plain = torch.autograd.grad(whole(x).sum(), [x, *linear.parameters()])
    again = torch.autograd.grad(checkpoint(whole, x, use_reentrant=False).sum(), [x, *linear.parameters()])
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)
