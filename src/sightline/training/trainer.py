"""The training loop: an iterator of steps that can be killed at any instant and goes on bit for bit."""

import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import save_yaml
from ..core.errors import CapacityError, SightlineError
from ..data.batch import Batch
from ..data.processor import Processor
from ..model import VLM
from . import checkpoints
from .loader import Batches, batches
from .optim import Optimizers
from .recipe import Recipe, Stage, freeze, learning_rates


@dataclass(frozen=True)
class Step:
    """One step that was done: its number from 1, its loss and terms, and how fast it went."""

    stage: str
    step: int
    loss: float
    terms: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    samples_per_second: float = 0.0
    applied: bool = True


class NonFinite(SightlineError):
    """The loss or its gradients were not numbers, several times in a row."""

    exit_code = 65


class Trainer:
    """One stage of a recipe in one folder.

    `objective` holds the terms of the loss and their own weights, which are trained and kept in the training state
    only. `saved` names the folder of checkpoints; a run that finds one there goes on from it.
    """

    PATIENCE = 3  # steps in a row that may be refused before a run stops

    def __init__(self, recipe: Recipe, stage: Stage, model: VLM, objective: nn.Module, folder: Path) -> None:
        self.recipe, self.stage, self.model, self.objective = recipe, stage, model, objective
        self.folder, self.saved = folder, folder / "checkpoints" / stage.name
        rates = learning_rates(model, stage.learn)
        freeze(model, rates)
        fastest = max(stage.learn.values())
        learned = {name: p for name, p in model.named_parameters() if name in rates}
        own = {f"objective.{name}": p for name, p in objective.named_parameters()}
        self.parameters = learned | own
        self.optimizers = Optimizers(self.parameters, rates | dict.fromkeys(own, fastest), stage)
        self.step, self.refused = 0, 0

    # ------------------------------------------------------------------------------------------- saving and resuming

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint of this stage, if there is one."""
        found = checkpoints.newest(self.saved, warn=tell)
        if found is None:
            return False
        self.model.load_state_dict(found.tensors["model"])
        self.objective.load_state_dict(found.tensors["objective"])
        self.optimizers.load(found.tensors["optimizer"])
        self.step, self.refused = found.state["step"], found.state["refused"]
        return True

    def save(self) -> bool:
        """Write a checkpoint; a full disk is told and the run goes on with the last good one."""
        tensors = {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizers.tensors(),
        }
        state = {"step": self.step, "refused": self.refused, "stage": self.stage.name, "recipe": self.recipe.name}
        try:
            checkpoints.save(self.saved, f"step-{self.step:07d}", tensors, state)
        except OSError as error:
            tell(f"could not save step {self.step} ({error.strerror}); the last checkpoint stays, training goes on")
            return False
        checkpoints.prune(self.saved, keep=2)
        return True

    # ------------------------------------------------------------------------------------------------------ one step

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of each term over what it learned, and their sum."""
        kind = self.model.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.stage.precision == "bf16"):
            terms = self.objective(self.model, batch)
        means = {name: total.float() / count.clamp(min=1) for name, (total, count) in terms.items()}
        return torch.stack(list(means.values())).sum(), means

    def learn(self, micro: list[Batch]) -> Step:
        """One step over some micro-batches; refused, and counted, when anything in it is not a number."""
        began = time.perf_counter()
        self.optimizers.zero()
        counts: dict[str, float] = {}
        sums: dict[str, Tensor] = {}
        if len(micro) == 1:
            loss, means = self.loss(micro[0])
            loss.backward()
        else:
            loss, means = self.accumulate(micro, counts, sums)
        if self.step == 0:
            self.check_gradients()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.stage.clip)
        applied = bool(torch.isfinite(norm)) and bool(torch.isfinite(loss))
        if applied:
            self.optimizers.step(self.stage.rate(self.step))
        self.refused = 0 if applied else self.refused + 1
        self.step += 1
        seconds = time.perf_counter() - began
        values = {name: float(value.detach()) for name, value in means.items()}
        count = self.stage.batch * len(micro)
        return Step(self.stage.name, self.step, float(loss.detach()), values, float(norm), count / seconds, applied)

    def accumulate(
        self, micro: list[Batch], counts: dict[str, float], sums: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of several micro-batches, each term divided by its count over all of them."""
        kind = self.model.device.type
        with torch.no_grad():  # labels alone tell the counts of next-token terms; others need the pass itself
            for batch in micro:
                with torch.autocast(kind, torch.bfloat16, enabled=self.stage.precision == "bf16"):
                    for name, (_, count) in self.objective(self.model, batch).items():
                        counts[name] = counts.get(name, 0.0) + float(count)
        for batch in micro:
            with torch.autocast(kind, torch.bfloat16, enabled=self.stage.precision == "bf16"):
                terms = self.objective(self.model, batch)
            parts = {name: total.float() / max(counts[name], 1.0) for name, (total, _) in terms.items()}
            torch.stack(list(parts.values())).sum().backward()
            for name, value in parts.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach()
        return torch.stack(list(sums.values())).sum(), sums

    def check_gradients(self) -> None:
        """Hold the stage to its word: what it learns got a gradient, what it froze did not."""
        silent = [name for name, p in self.parameters.items() if p.grad is None]
        used = [name for name in silent if not name.startswith("objective.")]
        if len(used) == len(self.parameters):
            raise SightlineError(f"stage {self.stage.name!r} learns nothing: no parameter got a gradient")
        moved = [n for n, p in self.model.named_parameters() if n not in self.parameters and p.grad is not None]
        if moved:
            raise SightlineError(f"frozen parameter {moved[0]!r} got a gradient in stage {self.stage.name!r}")
        if used:
            tell(f"{len(used)} parameters got no gradient in stage {self.stage.name!r}, such as {used[0]}")

    # ---------------------------------------------------------------------------------------------------------- loop

    def run(
        self, processor: Processor, workers: int = 1, evaluate: Callable[[VLM], dict[str, float]] | None = None
    ) -> Iterator[Step]:
        """Steps until the stage is done; a TERM or INT signal finishes the step, saves and ends the process."""
        number = self.recipe.stage(self.stage.name)
        data = Batches(self.stage, number, self.recipe.seed, self.recipe.sources, processor)
        every = self.stage.accumulate
        source = batches(data, self.step * every, workers)
        with _Signals() as signals, (self.folder / "metrics.jsonl").open("a") as log:
            while self.step < self.stage.steps:
                micro = [next(source).to(self.model.device) for _ in range(every)]
                step = self.learn(micro)
                _record(log, asdict(step))
                if not step.applied:
                    self.refuse(step, micro)
                yield step
                last = self.step == self.stage.steps
                if last or signals.caught or self.step % self.stage.save_every == 0:
                    self.save()
                    if evaluate is not None and not signals.caught:
                        _record(log, {"stage": self.stage.name, "step": self.step, "scores": evaluate(self.model)})
                if signals.caught:
                    sys.exit(128 + signals.caught)

    def refuse(self, step: Step, micro: list[Batch]) -> None:
        """Name the samples of a step that was not applied; stop after several in a row."""
        names = [name for batch in micro for name in batch.extra["names"]][:8]
        tell(f"step {step.step} not applied: loss {step.loss}, gradient norm {step.norm}; samples {', '.join(names)}")
        if self.refused >= self.PATIENCE:
            raise NonFinite(f"{self.refused} steps in a row were not numbers, last samples {', '.join(names)}")


class _Signals:
    """Remembers a TERM or INT instead of dying in the middle of a step."""

    def __init__(self) -> None:
        self.caught = 0

    def __enter__(self) -> "_Signals":
        self.before = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._catch)
        except ValueError:  # signals can be caught in the main thread only
            pass
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            sys.exit(128 + number)
        self.caught = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _record(log: Any, row: dict[str, Any]) -> None:
    """One line of metrics; what is not a number is written as null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    log.write(json.dumps(clean) + "\n")
    log.flush()


def tell(line: str) -> None:
    """A line for the person at the terminal, away from results."""
    print(line, file=sys.stderr, flush=True)


def prepare(recipe: Recipe, folder: Path) -> None:
    """Write what identifies a run: its recipe and its surroundings. Another recipe's folder is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    if path.exists():
        first = path.read_text().splitlines()[0]
        if first != f"name: {recipe.name}":
            raise CapacityError(f"{folder} holds a run with {first!r}, expected 'name: {recipe.name}'")
    save_yaml(recipe, path)
    surroundings = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    (folder / "env.json").write_text(json.dumps(surroundings, indent=1))
