"""Linear maps as training has them: several of one input as one product, and what a map reads made again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
    linear = [m for m in maps if _bare(m)]
    biased = sum(m.bias is not None for m in linear)
    if not torch.is_grad_enabled() or len(linear) < len(maps) or 0 < biased < len(linear):
        return None
    bias = torch.cat([m.bias for m in linear]) if biased else None
    return F.linear(x, torch.cat([m.weight for m in linear]), bias)


def _bare(module: nn.Module) -> bool:
    """Whether a module is a linear map and nothing more, which need not be called to do what it does."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return type(module) is nn.Linear and not any(getattr(module, name) for name in hooks)


def after(act: Callable[[Tensor], Tensor], x: Tensor, linear: nn.Module) -> Tensor:
    """What a map makes of act(x), which is made again for the gradient of its weights instead of being kept.

    In a feed-forward branch act(x) is as large as x, or half of it, and costs next to nothing beside the product.
    """
    if torch.is_grad_enabled() and x.requires_grad and _bare(linear) and linear.weight.requires_grad:
        bias = None if linear.bias is None else working_precision(linear.bias)
        out: Tensor = _After.apply(act, working_precision(x), working_precision(linear.weight), bias)
    else:
        out = linear(act(x))
    return out


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, act: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.act = act
        # as where it is learned from, so that it takes the same way then; but nothing is kept for it
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: weight):
            made = act(x.detach().requires_grad_())
        return F.linear(made, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            made = ctx.act(x)
        rows = grad.flatten(0, -2)
        to_weight = rows.t() @ made.detach().flatten(0, -2)
        to_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        (to_x,) = torch.autograd.grad(made, x, grad @ weight)
        return None, to_x, to_weight, to_bias


def working_precision(x: Tensor) -> Tensor:
    """x in the precision that autocast computes in, if it is on, so that sums and norms move half the bytes."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device knows none
    return x.to(torch.get_autocast_dtype(kind)) if on else x
