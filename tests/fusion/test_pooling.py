"""Single-layer pools: places of two dimensions, numbers of queries, sizes that contradict each other."""

from typing import Any

import pytest
import torch

from sightline.core.errors import ConfigError
from sightline.core.patches import Patches
from sightline.fusion.pooling import (
    LatentPoolConfig,
    PositionPool,
    PositionPoolConfig,
    SizedPool,
    SizedPoolConfig,
    sine_table,
)

SIZES: Any = {"inputs": 6, "width": 8, "heads": 2}


def test_the_first_half_of_a_place_is_its_column() -> None:
    table = sine_table(3, 8).reshape(3, 3, 8)
    assert torch.equal(table[0, :, :4], table[2, :, :4]) and torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    angles = torch.tensor([2.0, 2.0 * 10_000**-0.5])
    torch.testing.assert_close(table[1, 2, :4], torch.cat((angles.sin(), angles.cos())))


@torch.no_grad()
def test_places_are_in_keys_but_not_in_values() -> None:
    """If every patch is the same, so are all values, and tokens cannot depend on where the queries look."""
    pool = PositionPool(PositionPoolConfig(**SIZES, side=2))
    tokens = pool(Patches(torch.randn(1, 6).expand(9, -1), ((1, 3, 3),))).tokens
    assert tokens is not None
    torch.testing.assert_close(tokens, tokens[:1].expand(4, -1))
    moved = torch.randn(9, 6)
    assert not torch.allclose(  # without places a picture that is turned would be the same set of patches
        pool(Patches(moved, ((1, 3, 3),))).tokens, pool(Patches(moved.flip(0), ((1, 3, 3),))).tokens, atol=1e-4
    )


def test_features_as_wide_as_the_decoder_are_not_projected() -> None:
    assert isinstance(PositionPool(PositionPoolConfig(inputs=8, width=8, heads=2)).project, torch.nn.Identity)


def test_places_are_saved_but_never_learned() -> None:
    pool = PositionPool(PositionPoolConfig(**SIZES, side=2))
    assert "positions" in pool.state_dict() and "positions" not in dict(pool.named_parameters())


def test_a_picture_has_the_queries_of_the_square_around_it() -> None:
    pool = SizedPool(SizedPoolConfig(**{**SIZES, "heads": 3}, queries={4: 2, 9: 3}))
    assert pool.num_tokens((1, 2, 2)) == 2 and pool.num_tokens((1, 2, 1)) == 2 and len(pool.queries) == 3
    assert pool.num_tokens((1, 3, 3)) == pool.num_tokens((1, 1, 3)) == 3
    with pytest.raises(ConfigError, match="a picture in a square of 25 patches, this pool knows 4, 9"):
        pool(Patches(torch.randn(10, 6), ((1, 2, 5),)))


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="divisible by 4, not 10"):
        PositionPoolConfig(inputs=6, width=10, heads=2)
    with pytest.raises(ConfigError, match="not 0 along a side"):
        PositionPoolConfig(**SIZES, side=0)
    with pytest.raises(ConfigError, match="at least one query, not 0"):
        LatentPoolConfig(**SIZES, queries=0)
    for queries in ({}, {4: 0}):
        with pytest.raises(ConfigError, match="at least one query"):
            SizedPoolConfig(**SIZES, queries=queries)
    with pytest.raises(ConfigError, match="a width of 8 cannot be shared by 3 heads alike"):
        LatentPoolConfig(**{**SIZES, "heads": 3}).build()
