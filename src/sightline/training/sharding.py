"""A model in shards: every process keeps a part of each weight, of its gradient and of its state (FSDP2).

Blocks of the decoder are gathered one at a time, all the rest once a pass: how often an encoder runs hangs on the
pictures that a process has, and whatever is gathered must be gathered by all of them, in one order. With tensor
parallelism a block is gathered from those at the same place of their groups, all the rest from everyone, so that
nothing that all compute can drift apart.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from ..core.errors import ConfigError
from ..data.batch import Batch
from ..model import VLM
from . import checkpoints, distributed
from .objectives import Objective, Term
from .recipe import Stage
from .reference import Frozen
from .settings import PREPARES
from .tensor_parallel import cut


def check_shards(stage: Stage) -> None:
    """ConfigError for a stage that cannot learn in shards."""
    if stage.optimizer == "muon":
        raise ConfigError(f"stage {stage.name!r} learns by muon, which needs whole matrices; shard with adamw")
    for name in PREPARES & set(stage.terms):
        raise ConfigError(f"stage {stage.name!r}: {name!r} runs its model by itself before each step, not in shards")


def blocks_of(model: VLM) -> Iterator[tuple[str, nn.Module]]:
    """The decoder's blocks by name; where one reads and one writes, those that read come first."""
    for name in ("encoder_blocks", "blocks"):
        for i, block in enumerate(getattr(model.decoder, name, ())):
            yield f"decoder.{name}.{i}.", block


def share_out(reference: Frozen, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Leave on each process a part of a model that does not learn; its blocks are gathered whole, one at a time."""
    scorer = reference.scorer
    scalars = {p for p in scorer.parameters() if p.dim() == 0}
    for _, block in blocks_of(scorer.model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=scalars)
    fully_shard(scorer, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)


class Sharded(nn.Module):
    """Model and objective as one pass in shards; parameters and their names stay those of both.

    present: the parameters that what was computed since it was emptied depends on. Others have gradients of zero.
    """

    def __init__(self, model: VLM, objective: Objective, precision: str, groups: distributed.Groups) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.present: set[str] = set()
        self.names: dict[int, str] = {}  # of parameters that are gathered
        self.anchor: Tensor | None = None
        everyone = init_device_mesh(model.device.type, (distributed.size(),))
        mesh = everyone
        if groups.each > 1:
            both = init_device_mesh(model.device.type, (groups.size, groups.each), mesh_dim_names=("data", "tensor"))
            mesh = both["data"]
        scalars = {p for p in self.parameters() if p.dim() == 0}  # cannot be cut; every process keeps them
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = half if precision == "bf16" else MixedPrecisionPolicy()
        for part in objective.modules():
            reference = getattr(part, "reference", None)
            if isinstance(reference, Frozen):
                share_out(reference, everyone, policy)
        blocks = dict(blocks_of(model))
        for prefix, block in blocks.items():
            if groups.each > 1:
                cut(block, both["tensor"])
            block.register_forward_hook(lambda module, *_, prefix=prefix: self._meet(module, prefix))
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=scalars)
        next(iter(blocks.values())).register_forward_pre_hook(self._hold, prepend=True)  # seen by what FSDP does then
        fully_shard(self, mesh=everyone, reshard_after_forward=False, ignored_params=scalars)
        for module in self.modules():
            if isinstance(module, FSDPModule):  # sums, as every term has been divided by its count over all groups
                module.set_gradient_divide_factor(groups.each if module is self else 1.0)
                module.set_force_sum_reduction_for_comms(True)
                module.set_reduce_scatter_unused_params(True)

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

    def part(self) -> None:
        """Leave on each process its part only of what a pass without gradients has gathered."""
        assert isinstance(self, FSDPModule)
        self.reshard()


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


def box(x: Tensor | None) -> checkpoints.Box | None:
    """From which to before which place along each dimension this process has a tensor; None for all of it."""
    if not isinstance(x, DTensor):
        return None
    coordinate, found = x.device_mesh.get_coordinate(), [(0, size) for size in x.shape]
    assert coordinate is not None
    for count, at, placement in reversed(list(zip(x.device_mesh.shape, coordinate, x.placements, strict=True))):
        if not isinstance(placement, Replicate):  # within a group first, as FSDP cuts what it is given
            low, high = found[placement.dim]  # type: ignore[attr-defined]
            step = -(-(high - low) // count)
            low = min(low + at * step, high)
            found[placement.dim] = low, min(low + step, high)  # type: ignore[attr-defined]
    return tuple(found)


def counts(x: Tensor) -> bool:
    """Whether of all processes with the same part of a tensor this is the one that counts."""
    if not isinstance(x, DTensor):
        return distributed.first()
    coordinate, mesh = x.device_mesh.get_coordinate(), x.device_mesh
    assert coordinate is not None
    copies = (at for at, placement in zip(coordinate, x.placements, strict=True) if isinstance(placement, Replicate))
    return not any(copies) and int(mesh.mesh.min()) == 0


def written(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of some tensors this process writes: its part, and of what several have one of them."""
    return {name: local(x) for name, x in content.items() if counts(x)}


def like(x: Tensor, parameter: Tensor) -> Tensor:
    """This process's part as one of what is in shards as the parameter is; x itself if that is not, or a number."""
    if not isinstance(parameter, DTensor) or x.dim() == 0:
        return x
    mesh, cut = parameter.device_mesh, parameter.placements
    return DTensor.from_local(x, mesh, cut, run_check=False, shape=parameter.shape, stride=parameter.stride())


@torch.no_grad()
def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load this process's part of a module's state; RuntimeError where it is another module's."""
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
    parts = [local(grad) for grad in grads if isinstance(grad, DTensor)]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    once = [local(grad).square().sum() * counts(grad) for grad in grads if isinstance(grad, DTensor)]
    square = distributed.summed(torch.stack(once).sum())
    norm = (square + sum(grad.square().sum() for grad in whole)).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for grad in parts + whole:
        grad.mul_(factor)
    return norm
