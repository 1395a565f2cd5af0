"""A model in shards: every process keeps a part of each weight, of its gradient and of its state (FSDP2).

Blocks of the decoder are gathered one at a time, all the rest once a pass: how often an encoder runs hangs on the
pictures that a process has, and whatever is gathered must be gathered by all of them, in one order.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..core.errors import ConfigError
from ..data.batch import Batch
from ..model import VLM
from . import distributed
from .objectives import Objective, Term
from .recipe import Stage
from .settings import PREPARES


def check_shards(stage: Stage) -> None:
    """ConfigError for a stage that cannot learn in shards."""
    if stage.optimizer == "muon":
        raise ConfigError(f"stage {stage.name!r} learns by muon, which needs whole matrices; shard with adamw")
    for name in PREPARES & set(stage.terms):
        raise ConfigError(f"stage {stage.name!r}: {name!r} runs its model by itself before each step, not in shards")


class Sharded(nn.Module):
    """Model and objective as one pass in shards; parameters and their names stay those of both.

    present: the parameters that what was computed since it was emptied depends on. Others have gradients of zero.
    """

    def __init__(self, model: VLM, objective: Objective, precision: str) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.present: set[str] = set()
        self.names: dict[int, str] = {}  # of parameters that are gathered
        self.anchor: Tensor | None = None
        mesh = init_device_mesh(model.device.type, (distributed.size(),))
        scalars = {p for p in self.parameters() if p.dim() == 0}  # cannot be cut; every process keeps them
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = half if precision == "bf16" else MixedPrecisionPolicy()
        blocks = dict(self._blocks())
        for prefix, block in blocks.items():
            block.register_forward_hook(lambda module, *_, prefix=prefix: self._meet(module, prefix))
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=scalars)
        next(iter(blocks.values())).register_forward_pre_hook(self._hold, prepend=True)  # seen by what FSDP does then
        fully_shard(self, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)
        for module in self.modules():
            if isinstance(module, FSDPModule):  # sums, as every term has been divided by its count over all processes
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                module.set_reduce_scatter_unused_params(True)

    def _blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """The decoder's blocks by name; where one reads and one writes, those that read come first."""
        for name in ("encoder_blocks", "blocks"):
            for i, block in enumerate(getattr(self.model.decoder, name, ())):
                yield f"decoder.{name}.{i}.", block

    def _meet(self, module: nn.Module, prefix: str) -> None:
        """Take note of what has been gathered."""
        self.names |= {id(p): f"{prefix}{name}" for name, p in module.named_parameters()}

    def _hold(self, module: nn.Module, given: tuple[Any, ...]) -> Any:
        """Let what enters the decoder depend on all that learns before it.

        Gradients then take the same way through the blocks on a process without pictures as on the others.
        """
        return given if self.anchor is None else (given[0] + self.anchor, *given[1:])

    def forward(self, batch: Batch) -> dict[str, Term]:
        gathered = {
            name: p
            for prefix, part in (("", self.model), ("objective.", self.objective))
            for name, p in ((f"{prefix}{name}", p) for name, p in part.named_parameters())
            if p.requires_grad and not isinstance(p, DTensor)
        }
        self.names |= {id(p): name for name, p in gathered.items()}
        parts = [p.flatten()[:0].sum() for name, p in gathered.items() if not name.startswith("objective.")]
        self.anchor = torch.stack(parts).sum() if parts else None
        terms = self.objective(self.model, batch)
        total = torch.stack([value.float() for value, _ in terms.values()]).sum()
        self.present |= {self.names[id(leaf)] for leaf in _leaves(total, self.anchor) if id(leaf) in self.names}
        name, (value, count) = next(iter(terms.items()))
        for p in gathered.values():
            value = value + p.flatten()[:0].sum()
        return terms | {name: (value, count)}


def _leaves(total: Tensor, anchor: Tensor | None) -> Iterator[Tensor]:
    """The parameters that a result depends on, not counting what is only in the anchor."""
    seen = {None if anchor is None else anchor.grad_fn, None}
    todo = [total.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        todo += [after for after, _ in node.next_functions]
        if hasattr(node, "variable"):
            yield node.variable


def local(x: Tensor) -> Tensor:
    """What of a tensor is on this process."""
    return x.to_local() if isinstance(x, DTensor) else x


def rows(x: Tensor | None) -> tuple[int, int] | None:
    """From which to before which row of a tensor this process has it; None for all of it."""
    if not isinstance(x, DTensor):
        return None
    shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    low = offset[0] if shape[0] else 0
    return low, low + shape[0]


def like(x: Tensor, parameter: Tensor) -> Tensor:
    """This process's rows as a part of what is in shards as the parameter is; x itself if that is not, or no rows."""
    if not isinstance(parameter, DTensor) or x.dim() == 0:
        return x
    mesh, cut = parameter.device_mesh, parameter.placements
    return DTensor.from_local(x, mesh, cut, run_check=False, shape=parameter.shape, stride=parameter.stride())


@torch.no_grad()
def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load this process's rows of a module's state; RuntimeError where it is another module's."""
    state = module.state_dict()
    if different := sorted(state.keys() ^ tensors.keys()):
        raise RuntimeError(f"{len(different)} names differ, such as {different[0]}")
    for name, value in state.items():
        mine = local(value)
        if mine.shape != tensors[name].shape:
            raise RuntimeError(f"{name} is {list(tensors[name].shape)}, expected {list(mine.shape)}")
        mine.copy_(tensors[name])


@torch.no_grad()
def clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """The norm of all gradients, which are made shorter where it is above the limit; the same on every process."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not any(isinstance(grad, DTensor) for grad in grads):
        return nn.utils.clip_grad_norm_(parameters, limit)
    cut = [local(grad) for grad in grads if isinstance(grad, DTensor)]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    square = distributed.summed(torch.stack([grad.square().sum() for grad in cut]).sum())
    norm = (square + sum(grad.square().sum() for grad in whole)).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for grad in cut + whole:
        grad.mul_(factor)
    return norm
