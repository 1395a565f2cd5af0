"""Optimisers with one rate per parameter, their state as named tensors, and whether gradients are those of a stage."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, SightlineError
from ..layers.adapted import OWN
from . import sharding
from .loader import of_pictures
from .recipe import Stage, learning_rates
from .records import tell

TABLES = ("embedding", "positions", "registers")  # matrices whose rows are looked up or added, never multiplied


class Optimizers:
    """AdamW alone, or Muon for the weight matrices inside blocks and AdamW for everything else.

    Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix. Its rate is `MUON` times the stage's.
    """

    MUON = 10.0

    def __init__(self, parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float], stage: Stage) -> None:
        self.parameters, self.stage = dict(parameters), stage
        matrices = [n for n, p in self.parameters.items() if stage.optimizer == "muon" and _orthogonal(n, p)]
        others = [n for n in self.parameters if n not in set(matrices)]
        self.names: list[list[str]] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self._add(torch.optim.AdamW, others, rates, stage, 1.0, betas=stage.betas, eps=stage.eps, fused=True)
        self._add(torch.optim.Muon, matrices, rates, stage, self.MUON, momentum=0.95)

    def _add(
        self,
        kind: type,
        names: list[str],
        rates: Mapping[str, float],
        stage: Stage,
        factor: float,
        **more: object,
    ) -> None:
        """One parameter group per rate, decay and warm-up; norms, biases and embeddings do not decay."""
        groups: dict[tuple[float, float, object, int], list[str]] = {}
        for name in names:
            decays = self.parameters[name].dim() > 1 and not any(table in name for table in TABLES)
            decays = decays and not (stage.trainable_tokens and tables_of([name]))  # rows that do not learn stay
            mesh = getattr(self.parameters[name], "device_mesh", None)  # shards are reckoned with those of their kind
            decay = stage.decay_of(name) if decays else 0.0
            groups.setdefault((rates[name] * factor, decay, mesh, stage.warmup_of(name)), []).append(name)
        if not groups:
            return
        self.names.append([name for group in groups.values() for name in group])
        self.optimizers.append(
            kind(
                [
                    {
                        "params": [self.parameters[n] for n in group],
                        "lr": rate,
                        "peak": rate,
                        "weight_decay": decay,
                        "warmup": warmup,
                    }
                    for (rate, decay, _, warmup), group in groups.items()
                ],
                **more,
            )
        )

    def step(self, number: int) -> None:
        """One step at the rates that the stage has at this one, counted from 0."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.stage.rate(number, group["warmup"])
            optimizer.step()

    def zero(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as "parameter/field" tensors."""
        found: dict[str, Tensor] = {}
        for names, optimizer in zip(self.names, self.optimizers, strict=True):
            for name in names:
                for key, value in optimizer.state[self.parameters[name]].items():
                    found[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        state: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, field = key.rsplit("/", 1)
            value = value.clone().to(self.parameters[name].device)
            state.setdefault(name, {})[field] = sharding.like(value, self.parameters[name])
        for names, optimizer in zip(self.names, self.optimizers, strict=True):
            for name in names:
                if name in state:
                    optimizer.state[self.parameters[name]] = state[name]


def check_gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter], stage: Stage, sees: bool) -> None:
    """Hold a stage to its word with real gradients: every pattern it learns got some, what it froze did not.

    sees: whether there were pictures; else what reads them need not have any.
    """
    silent = {name for name, p in parameters.items() if p.grad is None}
    for pattern, how in stage.learn.items():
        names = [name for name in learning_rates(model, {pattern: how}) if name in parameters]
        if not sees and of_pictures(names):
            continue
        if all(name in silent for name in names):
            raise ConfigError(f"stage {stage.name!r} learns {pattern!r}, but its data and objective never reach it")
    moved = [name for name, p in model.named_parameters() if name not in parameters and p.grad is not None]
    if moved:
        raise SightlineError(f"stage {stage.name!r}: frozen parameter {moved[0]!r} got a gradient")
    if silent and sees:
        tell(f"stage {stage.name!r}: {len(silent)} parameters got no gradient, such as {min(silent)}")


@torch.no_grad()
def only_rows(parameters: Mapping[str, nn.Parameter], ids: Sequence[int]) -> None:
    """Leave of the gradients of tables of words those of some rows, on whichever process has them."""
    for name in tables_of(parameters):
        table = parameters[name]
        if table.grad is None:
            continue
        (low, high), *_ = sharding.box(table) or ((0, len(table)),)
        rows = [index - low for index in ids if low <= index < high]
        grad = sharding.local(table.grad)
        kept = grad[rows].clone()
        grad.zero_()
        grad[rows] = kept


def tables_of(names: Iterable[str]) -> list[str]:
    """The tables of words among parameters."""
    return [name for name in names if name in ("decoder.embedding.weight", "decoder.head.weight")]


def _orthogonal(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix inside a block. A projector is none: whole steps of Muon undo its alignment.

    Nor is half of an adapter, whose product is what should be orthogonal.
    """
    return parameter.dim() == 2 and "blocks" in name and not name.endswith(OWN)
