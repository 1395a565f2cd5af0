"""What training does on a CPU between the products, each with its gradient as one pass over memory.

The kernels are `kernels/gradients.h`. On any other device, for small tensors, and where they are not built, the modules
do the same in torch.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .native import KINDS, address, library

ENOUGH = 1 << 18  # numbers from which on a pass over memory costs more than a call, and the kernels' building is repaid

_pointer, _integer, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Turn(ctypes.Structure):
    """Sizes and steps of heads that are turned."""

    _fields_ = [
        *[(name, _integer) for name in ("batch", "heads", "length", "dim")],
        ("source", 3 * _integer), ("target", 3 * _integer), ("tables", _integer),
    ]  # fmt: skip


@cache
def _kernels() -> Any:
    """The built kernels with the types of their arguments; None where there are none."""
    built = library()
    if built is not None:
        built.silu_gated.argtypes = [_pointer] * 2 + [_integer] * 3
        built.silu_gated_back.argtypes = [_pointer] * 3 + [_integer] * 3
        built.quick_gelu.argtypes = [_pointer] * 2 + [_integer, _real, _integer]
        built.quick_gelu_back.argtypes = [_pointer] * 3 + [_integer, _real, _integer]
        built.turn.argtypes = [_pointer] * 4 + [_real, _pointer, _integer]
        built.norm_back.argtypes = [_pointer] * 6 + [_integer] * 3
    return built


def fit(x: Tensor) -> bool:
    """Whether what is done to x is done here: gradients are asked for, and one pass over memory is worth a kernel."""
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return plain and torch.is_grad_enabled() and x.numel() >= ENOUGH and _kernels() is not None


def silu_gated(joined: Tensor) -> Tensor:
    """silu(gate) * up [..., width] of both side by side [..., 2 * width]."""
    out: Tensor = _SiLUGated.apply(joined)
    return out


class _SiLUGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> Tensor:
        joined = joined.contiguous()
        ctx.save_for_backward(joined)
        width = joined.shape[-1] // 2
        out = joined.new_empty(*joined.shape[:-1], width)
        _kernels().silu_gated(*map(address, (joined, out)), out.numel() // width, width, KINDS[out.dtype])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (joined,) = ctx.saved_tensors
        grad, out, width = grad.contiguous(), torch.empty_like(joined), joined.shape[-1] // 2
        rows = grad.numel() // width
        _kernels().silu_gated_back(*map(address, (joined, grad, out)), rows, width, KINDS[out.dtype])
        return out


def quick_gelu(x: Tensor, constant: float) -> Tensor:
    """x * sigmoid(constant * x)."""
    out: Tensor = _QuickGELU.apply(x, constant)
    return out


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, constant: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.constant = constant
        out = torch.empty_like(x)
        _kernels().quick_gelu(*map(address, (x, out)), x.numel(), constant, KINDS[x.dtype])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(x)
        _kernels().quick_gelu_back(*map(address, (x, grad, out)), x.numel(), ctx.constant, KINDS[x.dtype])
        return out, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, heads, length, dim] turned by tables [batch or 1, 1, length, dim] whose halves are alike."""
    out: Tensor = _Turned.apply(x, cos, sin)
    return out


class _Turned(torch.autograd.Function):
    """The gradient of a rotation is the rotation back. Each lies as it is read next: whole heads, then whole tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0, torch.empty_like(x, memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        batch, heads, length, dim = grad.shape
        out = grad.new_empty(batch, length, heads, dim).transpose(1, 2)
        return _turn(grad, *ctx.saved_tensors, -1.0, out), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float, out: Tensor) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    steps = [(3 * _integer)(*each.stride()[:3]) for each in (x, out)]
    cos, sin = cos.float().contiguous(), sin.float().contiguous()  # kept as they came: one table serves all blocks
    about = _Turn(*x.shape, *steps, cos.stride(0) if len(cos) > 1 else 0)
    _kernels().turn(ctypes.byref(about), *map(address, (x, cos, sin)), sign, address(out), KINDS[x.dtype])
    return out


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., width] scaled to a mean square of one, times the weight [width]; in float32, rounded once."""
    out: Tensor = _Normed.apply(x, weight, eps)
    return out


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, factors, width = x.contiguous(), weight.float().contiguous(), x.shape[-1]
        rows = x.numel() // width
        scale, out = x.new_empty(rows, dtype=torch.float32), torch.empty_like(x)
        _kernels().norm(*map(address, (x, factors, scale, out)), rows, width, eps, KINDS[x.dtype])
        ctx.save_for_backward(x, factors, scale)
        ctx.dtype = weight.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x, factors, scale = ctx.saved_tensors
        grad, out, width = grad.contiguous(), torch.empty_like(x), x.shape[-1]
        shares = factors.new_zeros(_kernels().threads(), width) if ctx.needs_input_grad[1] else None
        tensors = map(address, (x, factors, scale, grad, out, shares))
        _kernels().norm_back(*tensors, len(scale), width, KINDS[x.dtype])
        return out, None if shares is None else shares.sum(0).to(ctx.dtype), None
