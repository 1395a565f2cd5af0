"""Linear maps as they are run: several of one input as one product, weights in the order that the kernel reads.

At batch 1 a product is a walk over the weights, and torch's plain one reaches a third of the memory's speed on a CPU;
oneDNN's blocked order reaches twice to four times as much. Packed maps are for inference only: they give no gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapted import merge
from .linear import after

Precision = Literal["fp32", "bf16", "int8"]
ROWS = 8  # the packed order is chosen for products of about so many rows; it serves one and hundreds as well


class PackedLinear(nn.Module):
    """One or several linear maps [outputs, inputs] of one input as a single product, then an activation."""

    def __init__(self, maps: Sequence[nn.Linear], activation: str | None = None) -> None:
        super().__init__()
        self.sizes = [m.out_features for m in maps]
        weight = maps[0].weight.detach() if len(maps) == 1 else torch.cat([m.weight.detach() for m in maps])
        biases = [m.bias for m in maps]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            zeros = [weight.new_zeros(size) for size in self.sizes]
            joined = [zero if b is None else b.detach() for b, zero in zip(biases, zeros, strict=True)]
            self.bias = torch.cat(joined).to(weight.dtype)
        self.packed = can_pack(weight)
        self.weight = _PACK(weight, ROWS) if self.packed else weight
        self.fused = _FUSED[activation]
        self.joins = self.packed and activation is None and _RUN_WITH is not None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] to [..., sum of the outputs]."""
        if self.packed:
            out: Tensor = _RUN(x, self.weight, self.bias, *self.fused)
            return out
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, base: Tensor) -> Tensor:
        """The product added to `base`, of its shape, while it is still in registers."""
        return self._with(x, base, "add") if self.joins else base + self(x)

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """The product multiplied by `factor`, of its shape, while it is still in registers."""
        return self._with(x, factor, "mul") if self.joins else self(x) * factor

    def _with(self, x: Tensor, other: Tensor, how: str) -> Tensor:
        out: Tensor = _RUN_WITH(x, other, self.weight, self.bias, how)
        return out

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each of the maps makes of x."""
        return self(x).split(self.sizes, dim=-1)


def added(linear: nn.Module, x: Tensor, base: Tensor | None, act: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """What a map makes of x, or of act(x), added to `base` where there is one."""
    if isinstance(linear, PackedLinear):
        x = x if act is None else act(x)
        return linear(x) if base is None else linear.plus(x, base)
    out: Tensor = linear(x) if act is None else after(act, x, linear)
    return out if base is None else base + out


# how oneDNN's products name the activations that they apply while a result is still in registers
_FUSED: dict[str | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "relu": ("relu", [], ""),
    "silu": ("swish", [], ""),
}


def can_fuse(activation: str, weight: Tensor) -> bool:
    """Whether a packed product with weights like this one can apply an activation."""
    return activation in _FUSED and can_pack(weight)


def pack(model: nn.Module, kernels: bool = False) -> None:
    """Turn every linear map inside a model into a packed one; modules that know how join theirs first.

    Adapters are merged before, or a product would leave them out.
    kernels: whether they may call `layers.native` for what lies between products.
    """
    merge(model)
    for module in list(model.modules()):
        if callable(join := getattr(module, "pack", None)):
            join(kernels)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear((child,)))


# torch gives these products no public name; where a release lacks them the plain ones are used
_PACK: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_RUN: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
_RUN_WITH: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "binary", None)


def can_pack(weight: Tensor) -> bool:
    """Whether this machine and this release of torch have packed products for weights like this one."""
    if _PACK is None or _RUN is None or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _bf16_on_chip())


def _bf16_on_chip() -> bool:
    """Whether oneDNN has bfloat16 products here."""
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(check()) if check is not None else False
