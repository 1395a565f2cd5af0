"""Several linear maps of one input as one product."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def together(x: Tensor, maps: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """What each map makes of x [..., width]."""
    both = joined(x, maps)
    if both is None:
        return tuple(m(x) for m in maps)
    return both.split([m.out_features for m in maps if isinstance(m, nn.Linear)], dim=-1)


def joined(x: Tensor, maps: Sequence[nn.Module]) -> Tensor | None:
    """What the maps make of x [..., width], side by side; None where they are to be applied one by one.

    In training the weights are joined on the fly: the input is read, and under autocast converted, once instead of
    once per map, and the product is larger. Parameters keep their own names. At inference, joining would copy weights
    at every step (or they are joined once, beforehand: `layers.packed`). Maps with hooks are applied one by one as
    well: hooks only hear of a map that is called.
    """
    linear = [m for m in maps if type(m) is nn.Linear and not m._forward_pre_hooks]
    biased = sum(m.bias is not None for m in linear)
    if not torch.is_grad_enabled() or len(linear) < len(maps) or 0 < biased < len(linear):
        return None
    bias = torch.cat([m.bias for m in linear]) if biased else None
    return F.linear(x, torch.cat([m.weight for m in linear]), bias)


def working_precision(x: Tensor) -> Tensor:
    """x in the precision that autocast computes in, if it is on, so that sums and norms move half the bytes."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device knows none
    return x.to(torch.get_autocast_dtype(kind)) if on else x
