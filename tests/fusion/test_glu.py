"""CogVLM's adapter: every picture stands between two learned tokens."""

import pytest
import torch

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
    with pytest.raises(ConfigError, match="at least 1"):
        GLUConfig(inputs=5, width=8, hidden=0)
