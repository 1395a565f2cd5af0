"""Models of any size in no memory: every parameter has its shape and no content, and a pass through one is counted."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class _Shapes(TorchFunctionMode):
    """Finds shapes where torch would import its compiler to do so, which takes longer than all else of a model."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _FILLS and (x := args[0] if args else given["tensor"]).is_meta:
            return x
        if func is torch.arange and str(given.get("device", "meta")) == "meta":
            return _without_content(func(*args, **given | {"device": "cpu"}))
        empty = [x for x in _tensors((*args, *given.values())) if x.is_meta]
        if not empty or (torch.is_grad_enabled() and any(x.requires_grad for x in empty)):
            return func(*args, **given)
        out = _shaped(func, args, given)
        if out is None and name in _IN_PYTHON:
            return tree_map(_without_content, func(*tree_map(_zeros, args), **tree_map(_zeros, given)))
        return func(*args, **given) if out is None else out


@contextmanager
def hollow() -> Iterator[None]:
    """While it is on, new tensors live on the meta device: modules are built and run at any size, in milliseconds."""
    with torch.device("meta"), _Shapes():
        yield


class Operations(TorchFunctionMode):
    """Counts multiplications and additions, apart, of matrix products, attention and convolutions while it is on.

    Torch's own counter agrees (a test holds it to that) but takes seconds for a large model.
    """

    on: ClassVar[list["Operations"]] = []  # those that count at the moment, the innermost last

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __enter__(self) -> "Operations":
        super().__enter__()  # type: ignore[no-untyped-call]
        self.on.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self.on.remove(self)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _COUNTED:
            self.count += 2 * _COUNTED[func](out, *args)
        return out


def share_alike(model: nn.Module) -> None:
    """Let the first of several blocks of a kind stand for all: it alone is run, once for each shape of what it reads.

    For a model without content that is run to be counted, and for nothing else.
    """
    for name, blocks in model.named_modules():
        if not (isinstance(blocks, nn.ModuleList) and name.rpartition(".")[2].endswith("blocks")):
            continue
        kinds: dict[Any, dict[torch.Size, tuple[Any, int]]] = {}
        for block in blocks:
            kind = type(block), tuple((key, p.shape) for key, p in block.named_parameters())
            block.forward = partial(_run_once, block.forward, kinds.setdefault(kind, {}))


def _run_once(
    forward: Callable[..., Any], known: dict[torch.Size, tuple[Any, int]], x: Tensor, *args: Any, **more: Any
) -> Any:
    """What a block of a kind makes of an input of this shape, and how many operations it takes: run, or remembered."""
    counter = Operations.on[-1] if Operations.on else None
    if x.shape in known:
        out, count = known[x.shape]
        if counter is not None:
            counter.count += count
        return out
    before = 0 if counter is None else counter.count
    out = forward(x, *args, **more)
    known[x.shape] = out, 0 if counter is None else counter.count - before
    return out


def _shaped(func: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Tensor | None:
    """What the commonest functions make of tensors without content; None wherever it is not plain."""
    x = args[0] if args else None
    if func is torch.cat and len({(part.dtype, part.dim()) for part in args[0]}) == 1:
        dim, shape = args[1] if len(args) > 1 else given.get("dim", 0), list(args[0][0].shape)
        shape[dim] = sum(part.shape[dim] for part in args[0])
        return torch.empty(shape, dtype=args[0][0].dtype, device="meta")
    if not isinstance(x, Tensor):
        return None
    if func is F.linear and x.shape[-1] == args[1].shape[1]:
        return x.new_empty(*x.shape[:-1], args[1].shape[0])
    if func is F.scaled_dot_product_attention and args[1].shape[:-1] == args[2].shape[:-1]:
        return x.new_empty(*x.shape[:-1], args[2].shape[-1])
    if func is F.embedding:
        return torch.empty(*x.shape, args[1].shape[1], dtype=args[1].dtype, device="meta")
    if func is F.conv2d:  # of no pictures, which takes no time
        return x.new_empty(len(x), *func(_zeros(x)[:0], *map(_zeros, args[1:3]), *args[3:]).shape[1:])
    if func in (torch.matmul, Tensor.matmul):  # over the first number instead of all
        return torch.empty_like(torch.matmul(_zeros(x)[..., :1], _zeros(args[1])[..., :1, :]), device="meta")
    if func in _ALIKE and x.is_floating_point() and (len(args) < 2 or not isinstance(args[1], Tensor)):
        return x.new_empty(x.shape)
    if func is Tensor.index_copy:
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    if func in _JOINED and all(isinstance(each, Tensor) and each.dtype == x.dtype for each in args):
        return x.new_empty(np.broadcast_shapes(*(each.shape for each in args)))
    return None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in the lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _zeros(x: Any) -> Any:
    """Zeros of the shape of a tensor without content, in no more memory than one of them; all else as it is."""
    if not isinstance(x, Tensor) or not x.is_meta:
        return x
    return torch.zeros((), dtype=x.dtype, device="cpu").expand(x.shape)


def _without_content(x: Any) -> Any:
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


def _attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Scores of every query with every key, then the weighted sum of values; nothing is saved by a mask."""
    return query.shape[:-1].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1])


_FILLS = {
    "fill_", "kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_", "zero_",
}  # fmt: skip
_ALIKE = {F.rms_norm, F.layer_norm, F.silu, F.gelu, torch.sigmoid, Tensor.neg, Tensor.mul}
_JOINED = {Tensor.add, Tensor.mul, torch.addcmul}
# torch finds their shapes in Python: they are done to zeros instead
_IN_PYTHON = {
    "__and__", "__eq__", "__floordiv__", "__getitem__", "__invert__", "__neg__", "__or__", "__rpow__", "__rsub__",
    "__truediv__", "abs", "add", "amax", "any", "argmin", "argsort", "cat", "ceil", "clamp", "cos", "div", "eq",
    "exp", "ge", "group_norm", "gt", "index_add", "index_fill", "interpolate", "le", "log", "log2",
    "lt", "masked_fill", "mul", "neg", "normalize", "pow", "relu", "repeat", "sigmoid", "sin", "softmax", "square",
    "stack", "sub", "sum", "tanh", "topk", "tril", "where", "zeros_like",
}  # fmt: skip
_COUNTED: dict[Callable[..., Any], Callable[..., int]] = {
    F.linear: lambda out, x, *_: out.numel() * x.shape[-1],
    F.conv2d: lambda out, x, weight, *_: out.numel() * weight[0].numel(),
    F.scaled_dot_product_attention: _attention,
    torch.matmul: lambda out, x, *_: out.numel() * x.shape[-1],
    torch.bmm: lambda out, x, *_: out.numel() * x.shape[-1],
    Tensor.matmul: lambda out, x, *_: out.numel() * x.shape[-1],
}
