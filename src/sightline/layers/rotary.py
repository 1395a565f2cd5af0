"""Rotary position embedding (arXiv:2104.09864), the half-split convention of GPT-NeoX and LLaMA."""

import torch
from torch import Tensor


def rotary_table(position: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., dim] for integer positions [...]; angles are taken in float32."""
    frequency = theta ** -(torch.arange(0, dim, 2, device=position.device, dtype=torch.float32) / dim)
    angle = position[..., None].float() * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [batch, heads, length, dim] by tables that broadcast to it, in the precision of x."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos.to(x.dtype), torch.cat((-second, first), dim=-1), sin.to(x.dtype))
