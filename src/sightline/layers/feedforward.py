"""Feed-forward branches: plain (up, down) and gated (gate, up, down), and the activations by their published names."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import nearest
from ..core.errors import ConfigError
from . import gradients
from .linear import joined
from .packed import PackedLinear, added, can_fuse

QUICK = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with (arXiv:2103.00020, its code)."""
    return gradients.quick_gelu(x, QUICK) if gradients.fit(x) else x * torch.sigmoid(QUICK * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (SigLIP, Gemma)."""
    return F.gelu(x, approximate="tanh")


def relu_squared(x: Tensor) -> Tensor:
    """The square of what is positive (arXiv:2109.08668; Persimmon)."""
    return F.relu(x).square()


def _same(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": relu_squared,
    "none": _same,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name; ConfigError tells the nearest known one."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def scaled(linear: nn.Linear, weight: float, bias: float) -> nn.Linear:
    """A linear map with its weight and bias multiplied."""
    out = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    out.weight = nn.Parameter(linear.weight.detach() * weight)
    if linear.bias is not None:
        out.bias = nn.Parameter(linear.bias.detach() * bias)
    return out


class FeedForward(nn.Module):
    """down(act(up(x))), with a norm before `down` where one is given."""

    def __init__(self, width: int, hidden: int, act: str, bias: bool = True, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.norm = nn.Identity() if norm is None else norm
        self.down = nn.Linear(hidden, width, bias=bias)
        self.name, self.act = act, activation(act)

    def pack(self, kernels: bool = False) -> None:
        """Let the first product apply the activation, where it can; for inference, there is no way back."""
        plain = isinstance(self.norm, nn.Identity)
        if self.name == "quick_gelu" and plain and can_fuse("silu", self.up.weight):
            # x sigmoid(c x) is silu(c x) / c, so that the constant goes into the weights on either side
            up, down = scaled(self.up, QUICK, QUICK), scaled(self.down, 1 / QUICK, 1.0)
            self.up, self.down, self.act = PackedLinear((up,), "silu"), PackedLinear((down,)), _same
        elif can_fuse(self.name, self.up.weight):
            self.up, self.act = PackedLinear((self.up,), self.name), _same

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x [..., width] to the same shape, added to `onto` where it is given."""
        if isinstance(self.norm, nn.Identity):
            return added(self.down, self.up(x), onto, self.act)
        return added(self.down, self.norm(self.act(self.up(x))), onto)


class GatedFeedForward(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, act: str, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.name, self.act = act, activation(act)

    def pack(self, kernels: bool = False) -> None:
        """Let the products apply the activation and multiply, where they can; for inference, there is no way back."""
        if can_fuse(self.name, self.gate.weight):
            self.gate, self.act = PackedLinear((self.gate,), self.name), _same
        self.up = PackedLinear((self.up,))

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x [..., width] to the same shape, added to `onto` where it is given."""
        if isinstance(self.up, PackedLinear):
            return added(self.down, self.up.times(x, self.act(self.gate(x))), onto)
        both = joined(x, (self.gate, self.up))
        if both is None:
            return added(self.down, self.act(self.gate(x)) * self.up(x), onto)
        return added(self.down, both, onto, self.gated)

    def gated(self, both: Tensor) -> Tensor:
        """act(gate) * up [..., hidden] of both side by side [..., 2 * hidden]."""
        if self.name == "silu" and gradients.fit(both):
            return gradients.silu_gated(both)
        gate, up = both.chunk(2, dim=-1)
        return self.act(gate) * up
