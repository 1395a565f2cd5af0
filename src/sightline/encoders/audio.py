"""An encoder of sound: the log-mel spectrogram and the transformer of Whisper (arXiv:2212.04356)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import config
from ..core.errors import ConfigError
from ..core.patches import Patches, join
from ..layers.attention import Attention
from ..layers.feedforward import FeedForward
from ..layers.linear import working_precision

RATE = 16_000  # samples per second
WINDOW = 400  # samples that a frame looks at
HOP = 160  # samples from one frame to the next
SECONDS = 30  # what Whisper was trained on; shorter sounds are filled up with silence


def mel_filters(bins: int) -> Tensor:
    """Weights [bins, WINDOW / 2 + 1] of triangular bands in float64, equally wide in mels from 0 Hz to RATE / 2.

    The scale is Slaney's: linear up to 1000 Hz (15 mels), logarithmic above; each band is divided by half its width.
    """
    most = 15 + 27 / math.log(6.4) * math.log(RATE / 2 / 1000)
    mels = torch.linspace(0, most, bins + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) * math.log(6.4) / 27))
    heard = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = torch.minimum((heard - left) / (centre - left), (right - heard) / (right - centre)).clamp(min=0)
    return triangles * 2 / (right - left)


def log_mel(samples: Tensor, bins: int = 80, seconds: int = SECONDS) -> Tensor:
    """Samples [items, n] in [-1, 1] at RATE to [items, bins, seconds * RATE / HOP], cut or filled up with silence.

    Powers are in tens of decibels, at most 8 below the loudest of the item, then (x + 4) / 4.
    """
    length = seconds * RATE
    samples = F.pad(samples[:, :length].float(), (0, max(length - samples.shape[1], 0)))
    window = torch.hann_window(WINDOW, device=samples.device)
    waves = torch.stft(samples, WINDOW, HOP, window=window, return_complex=True)
    power = waves[..., :-1].abs().square()  # the last frame is centred on what comes after the end
    logs = (mel_filters(bins).to(samples.device, torch.float32) @ power).clamp(min=1e-10).log10()
    return (torch.maximum(logs, logs.amax((1, 2), keepdim=True) - 8) + 4) / 4


def resampled(samples: Tensor, rate: int) -> Tensor:
    """Samples [n] at `rate` a second to RATE a second; what no sampling at both rates can hold is left out."""
    if rate == RATE:
        return samples
    length = max(1, round(len(samples) * RATE / rate))
    waves = torch.fft.rfft(samples.float())
    kept = waves[: length // 2 + 1]
    kept = F.pad(kept, (0, length // 2 + 1 - len(kept)))
    return torch.fft.irfft(kept, length) * (length / len(samples))


def heard(samples: Tensor, rate: int, bins: int) -> Tensor:
    """Samples [n] in [-1, 1] as frames [100 a second, bins] of a log-mel spectrogram, filled up to a whole second."""
    samples = resampled(samples, rate)
    seconds = max(1, -(-len(samples) // RATE))
    return log_mel(samples[None], bins, seconds)[0].T


@dataclass(frozen=True)
class Sounds:
    """Spectrograms that tokens are made of.

    slots: int64 [n], where the tokens go, in order. frames: [n, bins], those of each sound on a grid (frames, 1, 1).
    """

    slots: Tensor
    frames: Patches

    def moved(self, slots: int) -> "Sounds":
        """The same in a sequence whose beginning lies so many tokens further."""
        return Sounds(self.slots + slots, self.frames)

    @staticmethod
    def joined(parts: "Sequence[Sounds]") -> "Sounds":
        """Several as one."""
        return Sounds(torch.cat([part.slots for part in parts]), join([part.frames for part in parts]))

    def to(self, device: torch.device | str) -> "Sounds":
        return Sounds(self.slots.to(device), self.frames.to(device))


@config
class AudioConfig:
    """Sizes of an audio encoder."""

    width: int
    depth: int
    heads: int
    mlp: int
    bins: int = 80  # of the spectrogram
    activation: str = "gelu"
    eps: float = 1e-5
    positions: int = 1500  # the most tokens of one sound; one token is two frames of the spectrogram

    def num_tokens(self, frames: int) -> int:
        """Tokens of a sound of so many frames; ConfigError where there are fewer positions."""
        tokens = (frames + 1) // 2
        if tokens > self.positions:
            raise ConfigError(f"a sound of {frames} frames, this encoder reads at most {2 * self.positions}")
        return tokens


class AudioBlock(nn.Module):
    """Pre-norm attention and feed-forward; keys have no bias, which would add the same to all scores of a query."""

    def __init__(self, cfg: AudioConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, cfg.eps)
        self.attention = Attention(cfg.width, cfg.heads)
        self.attention.k = nn.Linear(cfg.width, cfg.width, bias=False)
        self.norm2 = nn.LayerNorm(cfg.width, cfg.eps)
        self.feedforward = FeedForward(cfg.width, cfg.mlp, cfg.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feedforward(self.norm2(x))


class AudioEncoder(nn.Module):
    """Two convolutions, the second of which halves the frames, sinusoidal positions, blocks and a norm."""

    def __init__(self, cfg: AudioConfig) -> None:
        super().__init__()
        if cfg.width % 2 or cfg.width < 4:
            raise ConfigError(f"a width of {cfg.width}, expected an even one of at least 4 for sines and cosines")
        self.config = cfg
        self.conv1 = nn.Conv1d(cfg.bins, cfg.width, 3, padding=1)
        self.conv2 = nn.Conv1d(cfg.width, cfg.width, 3, stride=2, padding=1)
        self.positions: Tensor
        self.register_buffer("positions", sinusoids(cfg.positions, cfg.width))  # published with the weights
        self.blocks = nn.ModuleList(AudioBlock(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, cfg.eps)

    def forward(self, mels: Tensor) -> Patches:
        """Spectrograms [items, bins, frames] to features [items * tokens, width], two frames each, on (tokens, 1, 1).

        ConfigError for another number of bins or for more frames than there are positions.
        """
        cfg = self.config
        items, bins, frames = mels.shape
        tokens = (frames + 1) // 2
        if bins != cfg.bins or tokens > cfg.positions:
            wanted = f"{cfg.bins} bins and at most {2 * cfg.positions} frames"
            raise ConfigError(f"a spectrogram of {bins} bins and {frames} frames, this encoder reads {wanted}")
        x = F.gelu(self.conv1(mels.to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2) + self.positions[:tokens]
        x = working_precision(x)
        for block in self.blocks:
            x = block(x)
        return Patches(self.norm(x).flatten(0, 1), ((tokens, 1, 1),) * items)

    def listen(self, frames: Patches) -> Patches:
        """Frames [n, bins] of sounds of any lengths to their features in order; those of one length go together."""
        parts, done = frames.items(), {}
        for length in dict.fromkeys(grid[0] for grid in frames.grids):
            where = [i for i, grid in enumerate(frames.grids) if grid[0] == length]
            out: Patches = self(torch.stack([parts[i].T for i in where]))
            done |= {i: Patches(item, out.grids[:1]) for i, item in zip(where, out.items(), strict=True)}
        return join([done[i] for i in range(len(parts))])


def sinusoids(count: int, width: int) -> Tensor:
    """Positions [count, width]: sines, then cosines, of wavelengths from 2 pi to 20000 pi."""
    steps = torch.arange(width // 2) / (width // 2 - 1)
    angles = torch.arange(count)[:, None] * torch.exp(-math.log(10_000) * steps)
    return torch.cat((angles.sin(), angles.cos()), dim=1)
