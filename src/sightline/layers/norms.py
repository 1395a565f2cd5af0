"""Normalisations of the encoders and decoders."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 (arXiv:1910.07467).

    With `offset` the weight is stored as its difference from one, as Gemma does.
    """

    def __init__(self, width: int, eps: float = 1e-6, offset: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.zeros(width) if offset else torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.offset:  # Gemma multiplies before it rounds to the activations' precision
            return F.rms_norm(x.float(), x.shape[-1:], self.weight.float() + 1, self.eps).to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
