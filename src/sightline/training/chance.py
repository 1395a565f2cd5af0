"""Chance that hangs on a text alone, such as (seed, stage, step, place): the same wherever and whenever it is drawn."""

import hashlib

import torch
from torch import Tensor


def luck(text: str, count: int) -> Tensor:
    """Numbers [count] in [0, 1) that hang on a text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def drawn(scores: Tensor, luck: Tensor) -> Tensor:
    """A choice for each row of scores [rows, choices]: where its luck in [0, 1) falls among the probabilities."""
    upto = scores.double().softmax(-1).cumsum(-1)
    return (upto <= luck[:, None] * upto[:, -1:]).sum(-1).clamp(max=scores.shape[-1] - 1)
