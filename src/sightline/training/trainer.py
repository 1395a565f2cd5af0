"""The training loop: an iterator of steps that can be killed at any instant and goes on bit for bit."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.errors import CheckpointError, ConfigError, SightlineError
from ..data.batch import Batch
from ..data.processor import Processor
from ..model import VLM
from . import checkpoints
from .features import GIGABYTE, FeatureStore, repeats
from .guard import Guard
from .loader import Batches, batches
from .objectives import Objective
from .optim import Optimizers
from .recipe import Recipe, Stage, freeze, learning_rates
from .records import Metrics, PassedOver, tell
from .signals import Signals


@dataclass(frozen=True)
class Step:
    """One step that was done: its number from 1, its loss and terms, and how fast it went.

    tokens_per_second: without padding, those of pictures among them. waited: seconds that passed before its samples
    were there. applied: False when it was not made of numbers. notes: what else the objective tells, such as the mean
    reward of what it sampled.
    """

    stage: str
    step: int
    loss: float
    terms: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    samples_per_second: float = 0.0
    tokens_per_second: float = 0.0
    waited: float = 0.0
    applied: bool = True
    notes: dict[str, float] = field(default_factory=dict)


class NonFinite(SightlineError):
    """The loss or its gradients were not numbers, several times in a row."""

    exit_code = 65


def recompute(model: VLM) -> None:
    """Let every block keep its input only, and be computed again when its gradients are asked for."""
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def tokens_of(batch: Batch) -> int:
    """Tokens of a batch without its padding; of pictures alone, their patches."""
    if not batch.ids.numel():
        return 0 if batch.patches is None else len(batch.patches.values)
    return int((batch.layout.document >= 0).sum())


class Trainer:
    """One stage of a recipe in one folder.

    `objective` holds the terms of the loss and their own weights, which are trained and kept in the training state
    only. A run that finds checkpoints of its stage in the folder goes on from the newest whole one. store: where
    features of a frozen encoder are shared with other runs; without one the run keeps its own where that helps.
    """

    PATIENCE = 3  # steps in a row that may be refused before a run stops
    KEEP = 2  # checkpoints of a stage

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        model: VLM,
        objective: Objective,
        folder: Path,
        store: FeatureStore | None = None,
    ) -> None:
        self.recipe, self.stage, self.model, self.objective = recipe, stage, model, objective
        self.folder, self.saved = folder, folder / "checkpoints" / stage.name
        self.number = recipe.stage(stage.name)
        rates = learning_rates(model, stage.learn)
        freeze(model, rates)
        learned = {name: p for name, p in model.named_parameters() if name in rates}
        own = {f"objective.{name}": p for name, p in objective.named_parameters() if p.requires_grad}
        self.parameters = learned | own
        self.optimizers = Optimizers(self.parameters, rates | dict.fromkeys(own, max(rates.values())), stage)
        self.step, self.refused, self.checked = 0, 0, False
        self.store, self.warned = store, False
        scaling = getattr(model.config.decoder, "rope_scaling", None)
        if stage.packing and scaling is not None and scaling.by_length:
            raise ConfigError(f"stage {stage.name!r} packs rows, but its model stretches with a row's length")
        if stage.recompute:
            recompute(model)

    # ------------------------------------------------------------------------------------------- saving and resuming

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint of this stage, if there is one."""
        checkpoints.sweep(self.saved)
        found = checkpoints.newest(self.saved, warn=tell)
        if found is None:
            return False
        try:
            self.model.load_state_dict(found.tensors["model"])
            self.objective.load_state_dict(found.tensors.get("objective", {}))
            self.optimizers.load(found.tensors["optimizer"])
            self.step, self.refused = found.state["step"], found.state["refused"]
        except (KeyError, RuntimeError) as error:
            line = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"{found.path}: belongs to another model or stage ({line})") from None
        return True

    def save(self) -> bool:
        """Write a checkpoint; a full disk is told and the run goes on with the last good one."""
        tensors = {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizers.tensors(),
        }
        state = {"step": self.step, "refused": self.refused, "stage": self.stage.name, "recipe": self.recipe.name}
        name = f"step-{self.step:07d}"
        try:
            checkpoints.save(self.saved, name, tensors, state)
            checkpoints.prune(self.saved, name, self.KEEP)
        except OSError as error:
            tell(f"could not save step {self.step} ({error.strerror}); the last checkpoint stays, training goes on")
            return False
        return True

    # ------------------------------------------------------------------------------------------------------ one step

    def learn(self, micro: list[Batch]) -> Step:
        """One step over some micro-batches: one update, or several where the objective wants to learn them so often."""
        torch.manual_seed(hash((self.recipe.seed, self.number, self.step)))  # a step's chance, wherever a run resumes
        with self.autocast():
            micro = self.objective.prepare(self.model, micro, f"{self.recipe.seed} {self.number} {self.step}")
        step = self.update(micro)
        for _ in range(1, self.objective.updates):
            step = self.update(micro) if step.applied else step
        self.step += 1
        return step

    def update(self, micro: list[Batch]) -> Step:
        """One update; refused, and counted, when anything in it is not a number.

        Every term is divided by its count over all micro-batches, so that two of 16 are one of 32; apart from those
        that compare the pairs of one micro-batch only, such as SigLIP.
        """
        self.optimizers.zero()
        counts: Counter[str] = Counter()
        for batch in micro:
            counts.update(self.objective.counts(batch))
        terms: dict[str, Tensor] = {}
        for batch in micro:
            for name, value in self.backward(batch, counts).items():
                terms[name] = terms[name] + value if name in terms else value
        loss = torch.stack(list(terms.values())).sum()
        if not self.checked:
            self.check_gradients()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.stage.clip)
        applied = bool(torch.isfinite(norm)) and bool(torch.isfinite(loss))
        if applied:
            self.optimizers.step(self.stage.rate(self.step))
        self.refused = 0 if applied else self.refused + 1
        values = {name: float(value) for name, value in terms.items()}
        notes = dict(self.objective.notes)
        return Step(self.stage.name, self.step + 1, float(loss), values, float(norm), applied=applied, notes=notes)

    def backward(self, batch: Batch, counts: Counter[str]) -> dict[str, Tensor]:
        """Add a micro-batch's gradients; return its share of each term."""
        with self.autocast():
            found = self.objective(self.model, batch)
        terms = {name: total.float() / max(counts[name], 1) for name, (total, _) in found.items()}
        torch.stack(list(terms.values())).sum().backward()
        return {name: value.detach() for name, value in terms.items()}

    def autocast(self) -> torch.autocast:
        """The precision that the stage computes in."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.stage.precision == "bf16")

    def check_gradients(self) -> None:
        """Hold the stage to its word with real gradients: every pattern it learns got some, what it froze did not."""
        self.checked, stage = True, self.stage.name
        silent = {name for name, p in self.parameters.items() if p.grad is None}
        for pattern, how in self.stage.learn.items():
            if all(name in silent for name in learning_rates(self.model, {pattern: how}) if name in self.parameters):
                raise ConfigError(f"stage {stage!r} learns {pattern!r}, but its data and objective never reach it")
        moved = [n for n, p in self.model.named_parameters() if n not in self.parameters and p.grad is not None]
        if moved:
            raise SightlineError(f"stage {stage!r}: frozen parameter {moved[0]!r} got a gradient")
        if silent:
            tell(f"stage {stage!r}: {len(silent)} parameters got no gradient, such as {min(silent)}")

    # ---------------------------------------------------------------------------------------------------------- loop

    def run(
        self, processor: Processor, workers: int = 1, evaluate: Callable[[VLM], dict[str, float]] | None = None
    ) -> Iterator[Step]:
        """Steps until the stage is done; a TERM or INT signal finishes the step, saves and ends the process."""
        data = Batches(self.stage, self.number, self.recipe.seed, self.recipe.sources, processor)
        every = self.stage.accumulate
        source = batches(data, self.step * every, workers, self.stage.group)
        metrics, passed = Metrics(self.folder), PassedOver(self.folder, self.stage.max_bad)
        self.keep_features()
        guard = Guard(data) if self.stage.guard_every else None
        with Signals() as signals, closing(source):
            while self.step < self.stage.steps:
                began = time.perf_counter()
                micro = [next(source).to(self.model.device) for _ in range(every)]
                waited = time.perf_counter() - began
                for batch in micro:
                    passed.count(batch)
                step = self.learn(micro)
                took = time.perf_counter() - began
                speed, tokens = self.stage.batch * every / took, sum(map(tokens_of, micro)) / took
                step = replace(step, samples_per_second=speed, tokens_per_second=tokens, waited=waited)
                metrics.write(asdict(step))
                if guard is not None and self.step % self.stage.guard_every == 0:
                    self.look(guard, metrics)
                if not step.applied:
                    self.refuse(step, micro)
                yield step
                if self.step == self.stage.steps or signals.caught or self.step % self.stage.save_every == 0:
                    self.save()
                    if evaluate is not None and not signals.caught:
                        scores = evaluate(self.model)
                        metrics.write({"stage": self.stage.name, "step": self.step, "scores": scores})
                if signals.caught:
                    sys.exit(128 + signals.caught)

    def keep_features(self) -> None:
        """Read a frozen encoder's features from the disk from now on, where the stage meets samples again."""
        frozen = not any(parameter.requires_grad for parameter in self.model.encoder.parameters())
        if self.store is None and self.stage.feature_store and repeats(self.stage, self.recipe.sources) > 1:
            self.store = FeatureStore(self.folder / "features", int(self.stage.feature_store * GIGABYTE))
        if self.store is not None and frozen:
            self.store.serve(self.model.encoder, self.recipe.pixels)

    def look(self, guard: Guard, metrics: Metrics) -> None:
        """Write down whether the model looks at its pictures; warn, once, when it does not."""
        with self.autocast():
            found = guard.look(self.model, self.objective)
        if found is None:
            return
        metrics.write({"stage": self.stage.name, "step": self.step, "guard": found.to_dict()})
        if not found.sees and not self.warned and self.step >= self.stage.warmup:
            self.warned = True
            tell(
                f"WARNING: stage {self.stage.name!r}, step {self.step}: pictures make no clear difference. The loss on "
                f"held samples is {found.real:.4f} with them, {found.blank:.4f} with blank ones, {found.shuffled:.4f} "
                "with those of others: the model does not look, or its questions need no picture"
            )

    def refuse(self, step: Step, micro: list[Batch]) -> None:
        """Name the samples of a step that was not applied; stop after several in a row."""
        names = [name for batch in micro for name in batch.extra["names"]][:8]
        tell(f"step {step.step} not applied: loss {step.loss}, gradient norm {step.norm}; samples {', '.join(names)}")
        if self.refused >= self.PATIENCE:
            raise NonFinite(f"{self.refused} steps in a row were not numbers, last samples {', '.join(names)}")
