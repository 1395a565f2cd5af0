"""The spectrogram of sounds whose content is known, and what the encoder's grids, positions and refusals are."""

import math

import pytest
import torch

from sightline.core.errors import ConfigError
from sightline.core.patches import Patches
from sightline.encoders.audio import (
    RATE,
    AudioConfig,
    AudioEncoder,
    Sounds,
    heard,
    log_mel,
    mel_filters,
    resampled,
    sinusoids,
)
from sightline.zoo.prepared import prepared

SMALL = AudioConfig(width=16, depth=2, heads=2, mlp=24, bins=20, positions=25)


def tone(pitch: float, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(2 * math.pi * pitch * torch.arange(int(seconds * RATE)) / RATE)[None]


@pytest.mark.parametrize("pitch", [480.0, 1000.0, 3000.0, 6000.0])
def test_a_tone_is_loudest_in_the_band_that_holds_it(pitch: float) -> None:
    found = log_mel(tone(pitch), seconds=1)
    assert found.shape == (1, 80, 100)
    loudest = found[0, :, 10:90].mean(1).argmax()
    band = (mel_filters(80)[loudest] > 0).nonzero()[:, 0] * RATE / 400
    assert band.min() <= pitch <= band.max()


def test_bands_cover_what_is_heard_and_weigh_alike() -> None:
    """A band's area is one: its height is two over its width in Hz."""
    filters = mel_filters(80)
    assert bool((filters[:, 1:-1].sum(0) > 0).all())
    wide = filters[40:]  # narrow bands are sampled too coarsely for their sum to be their area
    torch.testing.assert_close(wide.sum(1) * RATE / 400, torch.ones(40, dtype=torch.float64), atol=0.1, rtol=0)


def test_silence_and_what_is_beyond_the_end() -> None:
    """Silence is the floor, a longer sound is cut, a shorter one is filled up; nothing is 8 below the loudest."""
    assert torch.equal(log_mel(torch.zeros(1, 10), seconds=1), torch.full((1, 80, 100), -1.5))
    long = tone(700, 1.5)
    torch.testing.assert_close(log_mel(long, seconds=1), log_mel(long[:, :RATE], seconds=1))
    short = log_mel(tone(700, 0.5), seconds=1)
    assert float(short[:, :, 60:].max()) == float(short.min()) == pytest.approx(float(short.max()) - 2)


@torch.no_grad()
def test_tokens_are_pairs_of_frames_with_a_place_in_time() -> None:
    model, mels = AudioEncoder(SMALL).eval(), torch.randn(3, 20, 50)
    out = model(mels)
    assert out.grids == ((25, 1, 1),) * 3 and out.values.shape == (75, 16)
    assert model(mels[:, :, :31]).grids == ((16, 1, 1),) * 3
    still = model(mels[:, :, :1].expand(-1, -1, 50)).dense()[:, 5:20]  # away from the convolutions' edges
    assert float((still[:, 1:] - still[:, :-1]).abs().max()) > 1e-3
    assert torch.allclose(prepared(model)(mels).values, out.values, atol=2e-5)


def test_positions_are_waves() -> None:
    table = sinusoids(7, 6)
    for place, (first, last) in enumerate(zip(table[:, 0], table[:, -1], strict=True)):
        assert float(first) == pytest.approx(math.sin(place), abs=1e-6)
        assert float(last) == pytest.approx(math.cos(place / 10_000), abs=1e-6)


def test_what_does_not_fit_is_told() -> None:
    model = AudioEncoder(SMALL)
    for shape, told in (((1, 21, 50), "21 bins and 50 frames"), ((1, 20, 52), "20 bins and 52 frames")):
        with pytest.raises(ConfigError, match=f"{told}, this encoder reads 20 bins and at most 50 frames"):
            model(torch.zeros(shape))
    with pytest.raises(ConfigError, match="a width of 15"):
        AudioEncoder(AudioConfig(width=15, depth=1, heads=3, mlp=8))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_a_tone_at_another_rate_is_the_same_tone(rate: int) -> None:
    angle = 2 * math.pi * torch.arange(rate, dtype=torch.float64) / rate
    torch.testing.assert_close(resampled((440 * angle).sin().float(), rate), tone(440.0)[0], atol=1e-3, rtol=0)
    if rate > 18_000:  # a tone beyond what RATE can hold
        assert float(resampled((9_000 * angle).sin().float(), rate).abs().max()) < 1e-3


@pytest.mark.parametrize("samples, frames", [(1, 100), (RATE, 100), (RATE + 1, 200)])
def test_a_sound_is_filled_up_to_a_second(samples: int, frames: int) -> None:
    assert heard(torch.randn(samples), RATE, 20).shape == (frames, 20)


@torch.no_grad()
def test_sounds_of_several_lengths_are_heard_as_alone() -> None:
    encoder = AudioEncoder(SMALL).eval()
    lengths = (50, 30, 50, 7)
    parts = [Patches(torch.randn(n, 20), ((n, 1, 1),)) for n in lengths]
    sounds = Sounds.joined([Sounds(torch.arange(3) + 3 * i, part) for i, part in enumerate(parts)])
    assert sounds.slots.tolist() == list(range(12))
    found = encoder.listen(sounds.frames)
    assert found.grids == tuple((SMALL.num_tokens(n), 1, 1) for n in lengths)
    wanted = torch.cat([encoder(part.values.T[None]).values for part in parts])
    torch.testing.assert_close(found.values, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="a sound of 51 frames, this encoder reads at most 50"):
        SMALL.num_tokens(51)
