"""Several maps of one input: joined or apart, they are the same numbers and the same gradients."""

import pytest
import torch
from torch import nn

from sightline.layers.linear import together, working_precision

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
