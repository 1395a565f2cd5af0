"""Weights that golden values were made with, the same wherever and whenever they are drawn."""

import numpy as np
import torch
from torch import Tensor


def drawn(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of these names and shapes from one generator whose numbers no release of numpy changes."""
    numbers, out = np.random.RandomState(0), {}
    for name in sorted(named):
        shape = tuple(named[name].shape)
        x = torch.from_numpy(numbers.standard_normal(shape)).float()
        out[name] = x * 0.3 + float(name.endswith("weight")) if len(shape) == 1 else x * shape[-1] ** -0.5
    return out
