"""Linear maps that learn little: a weight that stays as it is, and an update of low rank beside it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OWN = ("lora_a", "lora_b", "magnitude")  # what an adapted map has besides its weight and bias


class AdaptedLinear(nn.Linear):
    """A linear map whose weight is W + alpha / rank * B A (LoRA, arXiv:2106.09685), W being that of `base`.

    lora_a [rank, inputs] begins at random and lora_b [outputs, rank] at zero, so that nothing is changed at first. With
    `dora` (arXiv:2402.09353) each row of the sum has a length of its own, magnitude [outputs], which begins as W's.
    dropout: the share of inputs that the update does not see in training.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dora: bool = False, dropout: float = 0.0) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = alpha / rank, dropout
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.magnitude = nn.Parameter(_lengths(base.weight.detach())) if dora else None

    def seen(self, x: Tensor) -> Tensor:
        """What the update sees of inputs."""
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(self.scale * F.linear(self.seen(x), self.lora_a), self.lora_b)
        if self.magnitude is None:
            return super().forward(x) + update
        # a row's length is a constant to the gradient (section 4.3)
        stretch = (self.magnitude / _lengths(self._sum())).to(update.dtype)
        out = (F.linear(x, self.weight) + update) * stretch
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The weight with its update, in its own precision."""
        total = self._sum()
        if self.magnitude is not None:
            total = total * (self.magnitude / _lengths(total))[:, None]
        return total.to(self.weight.dtype)

    @torch.no_grad()
    def _sum(self) -> Tensor:
        """W and its update in float32, whatever autocast would make of the product."""
        kind = "cpu" if self.weight.is_meta else self.weight.device.type
        with torch.autocast(kind, enabled=False):
            return torch.addmm(self.weight.float(), self.lora_b.float(), self.lora_a.float(), alpha=self.scale)


def _lengths(weight: Tensor) -> Tensor:
    """The length of each row of a weight [outputs, inputs]."""
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return lengths


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted maps of a model by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model by name, each update added to the weight that it stands beside."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, module in adapted(model).items():
        for own in OWN:
            state.pop(f"{name}.{own}", None)
        state[f"{name}.weight"] = module.whole()
    return state


def merge(model: nn.Module) -> None:
    """Turn every adapted map of a model into the plain one that it is, in place."""
    for name, module in adapted(model).items():
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(module.whole()), module.bias
        model.set_submodule(name, plain)
