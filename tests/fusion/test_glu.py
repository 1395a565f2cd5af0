"""CogVLM's adapter: every picture stands between two learned tokens."""

import pytest
import torch
from torch.nn.functional import conv2d

from sightline.core.errors import ConfigError
from sightline.core.patches import Patches
from sightline.fusion.glu import GLUAdapter, GLUConfig


@torch.no_grad()
def test_each_picture_stands_between_two_learned_tokens() -> None:
    adapter = GLUAdapter(GLUConfig(inputs=5, width=8, hidden=12))
    tokens = adapter(Patches(torch.randn(6, 5), ((1, 2, 2), (1, 1, 2)))).tokens
    assert tokens is not None
    for first, last in ((0, 5), (6, 9)):
        assert torch.equal(tokens[first], adapter.begin) and torch.equal(tokens[last], adapter.end)
    assert not torch.equal(adapter.begin, adapter.end)


def test_sizes_are_at_least_one() -> None:
    for sizes in ({"hidden": 0}, {"hidden": 12, "stride": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            GLUConfig(inputs=5, width=8, **sizes)


@torch.no_grad()
def test_a_stride_is_a_convolution_of_each_picture() -> None:
    adapter = GLUAdapter(GLUConfig(inputs=5, width=8, hidden=12, stride=2))
    plain = GLUAdapter(GLUConfig(inputs=5, width=8, hidden=12))
    plain.load_state_dict({key: value for key, value in adapter.state_dict().items() if "conv" not in key})
    features = Patches(torch.randn(24, 5), ((1, 2, 4), (1, 4, 4)))
    assert adapter.conv is not None
    kernel = adapter.conv.weight.unflatten(1, (2, 2, 5)).permute(0, 3, 1, 2)
    made = [
        conv2d(values.view(rows, columns, 5).permute(2, 0, 1), kernel, adapter.conv.bias, stride=2).flatten(1).T
        for values, (_, rows, columns) in zip(features.items(), features.grids, strict=True)
    ]
    wanted = plain(Patches(torch.cat(made), ((1, 1, 2), (1, 2, 2)))).tokens
    torch.testing.assert_close(adapter(features).tokens, wanted, atol=1e-5, rtol=0.0)
    assert adapter.num_tokens((1, 4, 4)) == 6


def test_a_grid_that_squares_do_not_fill_is_told() -> None:
    adapter = GLUAdapter(GLUConfig(inputs=5, width=8, hidden=12, stride=2))
    with pytest.raises(ConfigError, match="a grid of 3x4 patches cannot be convolved in squares of 2"):
        adapter(Patches(torch.randn(12, 5), ((1, 3, 4),)))
