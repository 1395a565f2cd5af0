"""The Perceiver resampler: frames have places in time, and videos that are too long are refused."""

from typing import Any

import pytest
import torch

from sightline.core.errors import ConfigError
from sightline.core.patches import Patches
from sightline.fusion.resampler import Resampler, ResamplerConfig

SIZES: Any = {"inputs": 8, "latents": 3, "depth": 1, "heads": 2, "head_dim": 4}


@torch.no_grad()
def test_without_a_decoder_s_width_latents_come_as_they_are() -> None:
    fusion = Resampler(ResamplerConfig(**SIZES))
    x = Patches(torch.randn(12, 8), ((1, 2, 3), (1, 3, 2)))
    tokens = fusion(x).tokens
    assert tokens is not None and tokens.shape == (6, 8)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(6), atol=1e-6, rtol=0.0)  # they have been normed


@torch.no_grad()
def test_only_with_embeddings_of_frames_does_their_order_count() -> None:
    frames = torch.randn(2, 4, 8)
    video = Patches(frames.flatten(0, 1), ((2, 2, 2),))
    backwards = Patches(frames.flip(0).flatten(0, 1), ((2, 2, 2),))
    without = Resampler(ResamplerConfig(**SIZES))
    torch.testing.assert_close(without(video).tokens, without(backwards).tokens)
    timed = Resampler(ResamplerConfig(**SIZES, frames=2))
    assert timed.frames is not None
    timed.frames.normal_()
    assert not torch.allclose(timed(video).tokens, timed(backwards).tokens, atol=1e-3)  # type: ignore[arg-type]


def test_a_video_of_more_frames_than_there_are_embeddings_is_refused() -> None:
    fusion = Resampler(ResamplerConfig(**SIZES, frames=2))
    assert fusion.num_tokens((2, 5, 5)) == 3
    with pytest.raises(ConfigError, match="a video of 3 frames, this resampler has embeddings for 2"):
        fusion(Patches(torch.randn(3, 8), ((3, 1, 1),)))


@pytest.mark.parametrize("name", ["latents", "depth", "heads", "head_dim"])
def test_sizes_are_at_least_one(name: str) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        ResamplerConfig(**{**SIZES, name: 0})
