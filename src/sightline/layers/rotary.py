"""Rotary position embedding (arXiv:2104.09864), the half-split convention of GPT-NeoX and LLaMA."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.config import config
from ..core.errors import ConfigError
from . import gradients


@config
class RopeScaling:
    """How frequencies are lowered for texts longer than those a model was first trained on.

    linear: all by `factor` (arXiv:2306.15595). llama3: by `factor` where a wave is longer than `original` / `low`
    tokens, not at all where it is shorter than `original` / `high`, blended between (arXiv:2407.21783). dynamic: by a
    base that grows with a row beyond `original` tokens. ntk: by a base that grows with each doubling beyond `original`
    and is settled by what is read first (Qwen, arXiv:2309.16609).
    """

    kind: Literal["linear", "llama3", "dynamic", "ntk"]
    factor: float = 1.0
    original: int = 8192
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original < 1:
            raise ConfigError(f"frequencies lowered by {self.factor} from {self.original} tokens, expected at least 1")
        if self.low > self.high:
            raise ConfigError(f"waves from {self.low} up to {self.high} in {self.original} tokens, expected a range")

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on how long a row is."""
        return self.kind in ("dynamic", "ntk")

    def __call__(self, frequency: Tensor, length: Tensor | None) -> Tensor:
        """Frequencies [dim / 2] scaled; by the length [batch] of rows to [batch, 1, dim / 2]."""
        if self.kind == "linear":
            return frequency / self.factor
        if self.kind == "llama3":
            waves = self.original * frequency / (2 * math.pi)  # that fit into the original context
            kept = ((waves - self.low) / max(self.high - self.low, 1e-9)).clamp(0, 1)  # a step where both are equal
            return frequency * (kept + (1 - kept) / self.factor)
        assert length is not None
        times = length[:, None, None].float() / self.original
        if self.kind == "dynamic":
            growth = self.factor * times.clamp(min=1) - (self.factor - 1)
        else:
            growth = (2 ** (times.log2() + 1).ceil() - 1).clamp(min=1)
        # theta grown by growth^(dim / (dim - 2)), of which each frequency is a power
        dim = 2 * len(frequency)
        power = torch.arange(len(frequency), device=frequency.device) * 2 / (dim - 2)
        return frequency * growth**-power


def rotary_table(
    position: Tensor,
    dim: int,
    theta: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
    length: Tensor | None = None,
    sections: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., dim] for integer positions [...]; angles are taken in float32.

    length: tokens of each row [batch], for a scaling that depends on them; positions are then [batch, tokens].
    sections: how many pairs of numbers each of several axes turns, one after the other; positions are then
    [..., axes], one place on each axis (M-RoPE, arXiv:2409.12191).
    """
    frequency = theta ** -(torch.arange(0, dim, 2, device=position.device, dtype=torch.float32) / dim)
    if scaling is not None:
        frequency = scaling(frequency, length)
    if sections is None:
        places = position[..., None]
    else:
        axes = torch.arange(len(sections), device=position.device)
        places = position[..., axes.repeat_interleave(torch.tensor(sections, device=position.device))]
    angle = places.float() * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [batch, heads, length, dim] by tables that broadcast to it and whose halves are alike.

    Tables narrower than x turn its first numbers only.
    """
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        return torch.cat((rotate(turned, cos, sin), rest), dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if x.requires_grad and cos.shape[1] == 1 and gradients.fit(x):
        return gradients.turned(x, cos, sin)
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Rotation.apply(x, cos, sin)
        return out
    return _turned(x, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-second, first), dim=-1), sin)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: half the passes over memory that torch would make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None
