"""Packed products against the maps they stand for, what they do on the way, and where torch has no such products."""

import pytest
import torch
from torch import nn

from sightline.layers import packed
from sightline.layers.packed import PackedLinear, added


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_products_that_add_and_multiply(monkeypatch: pytest.MonkeyPatch, bias: bool, there: bool) -> None:
    if not there:
        monkeypatch.setattr(packed, "_RUN_WITH", None)
    linear, x, other = nn.Linear(24, 40, bias=bias), torch.randn(2, 3, 24), torch.randn(2, 3, 40)
    with torch.inference_mode():
        wanted, product = linear(x), PackedLinear((linear,))
        torch.testing.assert_close(product(x), wanted)
        torch.testing.assert_close(product.plus(x, other), wanted + other)
        torch.testing.assert_close(product.times(x, other), wanted * other)
        for each in (linear, product):
            torch.testing.assert_close(added(each, x, other), wanted + other)
            torch.testing.assert_close(added(each, x, None), wanted)


def test_several_maps_of_one_input() -> None:
    maps, x = [nn.Linear(24, size, bias=bias) for size, bias in ((40, True), (8, False))], torch.randn(5, 24)
    with torch.inference_mode():
        found = PackedLinear(maps).parts(x)
        for part, linear in zip(found, maps, strict=True):
            torch.testing.assert_close(part, linear(x))
