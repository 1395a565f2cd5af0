"""Feed-forward branches against their formulas, activations against theirs, names told."""

import math

import numpy as np
import pytest
import torch

from sightline.core.errors import ConfigError
from sightline.layers.feedforward import ACTIVATIONS, FeedForward, GatedFeedForward, activation
from sightline.layers.packed import pack

X = np.linspace(-4, 4, 41)
FORMULAS = {
    "gelu": [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in X],
    "gelu_tanh": X * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3))) / 2,
    "quick_gelu": X / (1 + np.exp(-1.702 * X)),
    "silu": X / (1 + np.exp(-X)),
    "relu": np.maximum(X, 0),
    "none": X,
    "relu_squared": np.maximum(X, 0) ** 2,
}


def test_every_activation_has_its_formula_here() -> None:
    assert set(FORMULAS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", FORMULAS)
def test_activations(name: str) -> None:
    assert activation(name)(torch.tensor(X)).numpy() == pytest.approx(np.array(FORMULAS[name]), abs=1e-12)


def test_an_unknown_activation_tells_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown activation 'quickgelu'; did you mean 'quick_gelu'"):
        FeedForward(4, 8, "quickgelu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_plain_and_gated(bias: bool, training: bool) -> None:
    x = torch.randn(2, 3, 8)
    plain, gated = FeedForward(8, 12, "gelu", bias), GatedFeedForward(8, 12, "silu", bias)
    assert len(list(plain.parameters())) == (4 if bias else 2)
    assert len(list(gated.parameters())) == (6 if bias else 3)
    with torch.set_grad_enabled(training):
        found = plain(x), gated(x)
    torch.testing.assert_close(found[0], plain.down(activation("gelu")(plain.up(x))))
    torch.testing.assert_close(found[1], gated.down(activation("silu")(gated.gate(x)) * gated.up(x)))


@pytest.mark.parametrize("name", ["gelu", "quick_gelu"])
def test_a_norm_before_the_output_map(name: str) -> None:
    """Packed as well: quick_gelu's constant must not be moved across a norm, whose eps it would change."""
    x, norm = torch.randn(2, 3, 32) * 0.01, torch.nn.LayerNorm(48)
    layer = FeedForward(32, 48, name, norm=norm)
    wanted = layer.down(norm(activation(name)(layer.up(x))))
    torch.testing.assert_close(layer(x), wanted)
    with torch.inference_mode():
        pack(layer)
        torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "quick_gelu", "relu_squared"])
@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
def test_packed_and_added_to_the_stream(kind: type, name: str, dtype: torch.dtype, most: float) -> None:
    """Whatever a product does on the way (activation, multiplication, addition), the branch stays the same."""
    layer, x = kind(32, 48, name, bias=True), torch.randn(2, 3, 32)
    with torch.inference_mode():
        wanted, added = layer(x), x + layer(x)
        layer.to(dtype)
        pack(layer)
        x = x.to(dtype)
        assert (layer(x).float() - wanted).abs().max() < most * wanted.abs().max()
        assert (layer(x, onto=x).float() - added).abs().max() < most * added.abs().max()
