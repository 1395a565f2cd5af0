"""Normalisations of the encoders and decoders."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import gradients, native


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, its statistics in float32 (arXiv:1910.07467).

    With `offset` the weight is stored as its difference from one, as Gemma does.
    """

    def __init__(self, width: int, eps: float = 1e-6, offset: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.zeros(width) if offset else torch.ones(width))
        self.packed: Tensor | None = None  # the weight in float32 as it is multiplied, once packed for inference

    def pack(self, kernels: bool = False) -> None:
        """Let the norm be one pass over memory; for inference, there is no way back."""
        if kernels:
            self.packed = self.factors()

    def factors(self) -> Tensor:
        """What is multiplied with, in float32, whichever way the weight is stored."""
        return (self.weight.detach().float() + int(self.offset)).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return native.normalise(x, self.packed, self.eps)
        if torch.is_grad_enabled():
            weight = self.weight + 1 if self.offset else self.weight
            if gradients.fit(x):
                return gradients.normed(x, weight, self.eps)
            out: Tensor = _RootMeanSquare.apply(x, weight, self.eps)
            return out
        if self.offset:  # Gemma multiplies before it rounds to the activations' precision
            return F.rms_norm(x.float(), x.shape[-1:], self.weight.float() + 1, self.eps).to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class AcrossHeads(RMSNorm):
    """The same over all heads of a token at once, of queries or keys [batch, heads, length, dim] (InternViT)."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = super().forward(x.transpose(1, 2).flatten(2))
        return tokens.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


class LayerAcrossHeads(nn.LayerNorm):
    """A layer norm over all heads of a token at once, of queries or keys [batch, heads, length, dim] (MosaicGPT)."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = super().forward(x.transpose(1, 2).flatten(2))
        return tokens.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


class _RootMeanSquare(torch.autograd.Function):
    """The same with its gradient written out: torch's own is a chain of a dozen passes over memory on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
        unit = x * scale.to(x.dtype)
        ctx.save_for_backward(unit, weight, scale)
        return unit * weight.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        unit, weight, scale = ctx.saved_tensors
        weighted = None
        if ctx.needs_input_grad[1]:
            weighted = (grad * unit).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        inner = grad * weight.to(grad.dtype)
        along = torch.linalg.vecdot(inner.float(), unit.float())[..., None] / unit.shape[-1]
        out = torch.addcmul(inner, unit, along.to(unit.dtype), value=-1)
        return out.mul_(scale.to(out.dtype)), weighted, None


class HeadNorm(nn.Module):
    """A layer norm over each head of x [batch, heads, length, dim], with weights and biases of its own for each."""

    def __init__(self, heads: int, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, dim))
        self.bias = nn.Parameter(torch.zeros(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight[:, None] + self.bias[:, None]


class UnitNorm(nn.Module):
    """Root-mean-square normalisation without weights, in float32."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)
