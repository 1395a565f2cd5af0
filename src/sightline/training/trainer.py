"""The training loop: an iterator of steps that can be killed at any instant and goes on bit for bit."""

import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CapacityError, CheckpointError, ConfigError
from ..data.batch import Batch, tokens_of
from ..data.processor import Processor
from ..model import VLM
from . import checkpoints, distributed, sharding
from .budget import Memory, budget_of, recompute
from .dropping import leave_out
from .features import GIGABYTE, FeatureStore, repeats
from .guard import Guard
from .loader import Batches, Share, batches
from .objectives import Objective, Term
from .optim import Optimizers, check_gradients, only_rows
from .recipe import Recipe, Stage, freeze, layered, learning_rates
from .records import Metrics, PassedOver, tell
from .saving import NonFinite, Unsaved, bytes_of, check_room, design, not_numbers
from .settings import COMPARES, GATHERED, PREPARES
from .signals import Signals
from .validation import Validation, evaluating, mean_terms
from .workers import short_of_memory

EVAL = "eval loss"  # the note of a step after which the loss on `eval_data` was measured


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


class Trainer:
    """One stage of a recipe in one folder.

    `objective` holds the terms of the loss and their own weights, which are trained and kept in the training state
    only. A run that finds checkpoints of its stage in the folder goes on from the newest whole one. Several processes
    that are one run (`training.distributed`) share out each step's samples, and with `shard` the model as well. store:
    where features of a frozen encoder are shared with other runs; without one the run keeps its own where that helps.
    tensor_parallel: how many processes compute each block of a model in shards together. rows: ids of words, where only
    those of a table learn.
    """

    PATIENCE = 3  # steps in a row that may be refused, or checkpoints that cannot be saved, before a run stops
    KEEP = 2  # checkpoints of a stage

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        model: VLM,
        objective: Objective,
        folder: Path,
        shard: bool = False,
        store: FeatureStore | None = None,
        tensor_parallel: int = 1,
        rows: Sequence[int] = (),
    ) -> None:
        self.rows = rows
        self.recipe, self.stage, self.model, self.objective = recipe, stage, model, objective
        self.folder, self.saved = folder, folder / "checkpoints" / stage.name
        self.number, self.groups = recipe.stage(stage.name), distributed.Groups(tensor_parallel)
        self.share = Share(self.groups.rank, self.groups.size)
        self.peers = distributed.Peers()
        if GATHERED & set(stage.terms):
            self.peers = distributed.peers(self.groups, self.share.lanes(stage))
            objective.among(self.peers)
        rates = learning_rates(model, stage.learn)
        freeze(model, rates)
        self.store, self.warned = store, False
        scaling = getattr(model.config.decoder, "rope_scaling", None)
        if stage.packing and scaling is not None and scaling.by_length:
            raise ConfigError(f"stage {stage.name!r} packs rows, but its model stretches with a row's length")
        leave_out(model, objective, stage)
        if stage.recompute:
            recompute(model)
        self.sharded: sharding.Sharded | None = None
        if shard:
            sharding.check_shards(stage)
            self.sharded = sharding.Sharded(model, objective, stage.precision, self.groups)
        learned = {name: p for name, p in model.named_parameters() if name in rates}
        own = {f"objective.{name}": p for name, p in objective.named_parameters() if p.requires_grad}
        self.parameters, top = learned | own, max(rates.values())
        self.optimizers = Optimizers(
            self.parameters, layered(rates, stage.layer_decay) | dict.fromkeys(own, top), stage
        )
        self.step, self.refused, self.unsaved, self.checked = 0, 0, 0, False
        self.data: Batches | None = None  # where the samples of a step can be had again
        self.design = design(model, objective)

    # ------------------------------------------------------------------------------------------- saving and resuming

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint of this stage, if there is one."""
        if distributed.first():
            checkpoints.sweep(self.saved)
        found = checkpoints.newest(self.saved, tell, self.strange, self.part)
        if found is None:
            return False
        put = nn.Module.load_state_dict if self.sharded is None else sharding.put
        try:
            put(self.model, found.tensors["model"])
            put(self.objective, found.tensors.get("objective", {}))
            self.optimizers.load(found.tensors["optimizer"])
            self.step, self.refused = found.state["step"], found.state["refused"]
        except (KeyError, RuntimeError) as error:
            line = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"{found.path}: belongs to another model or stage ({line})") from None
        return True

    def strange(self, state: dict[str, Any]) -> str:
        """What shows that a checkpoint with this state is not of this stage, if anything does."""
        mine = {"recipe": self.recipe.name, "stage": self.stage.name, "design": self.design}
        found = {key: state.get(key, mine[key]) for key in mine}
        return next((f"{key} {found[key]}, here it is {mine[key]}" for key in mine if found[key] != mine[key]), "")

    def part(self, group: str, name: str) -> checkpoints.Box | None:
        """The part that this process has of what a checkpoint calls so; None for all of it."""
        if self.sharded is None or name.endswith("/step"):
            return None
        whose = self.objective if group == "objective" else self.model
        known = self.parameters if group == "optimizer" else dict(whose.named_parameters())
        return sharding.box(known.get(name.rsplit("/", 1)[0]))

    def save(self) -> bool:
        """Write a checkpoint; a full disk is told and the run goes on with the last good one, for a while.

        Weights that are not numbers are never saved: they stay so, and the run goes on from the last good one instead.
        """
        bad = not_numbers((self.model, self.objective))
        if distributed.most(int(bool(bad))):
            raise NonFinite(f"step {self.step}: weights are not numbers{bad and f', such as {bad}'}; it is not saved")
        everything = {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizers.tensors(),
        }
        tensors = everything
        if self.sharded is not None:
            tensors = {group: sharding.written(content) for group, content in everything.items()}
        cut = {name: box for content in everything.values() for name, x in content.items() if (box := sharding.box(x))}
        boxes = None if self.sharded is None else cut
        mine = {"step": self.step, "refused": self.refused, "stage": self.stage.name, "recipe": self.recipe.name}
        name = f"step-{self.step:07d}"
        try:
            checkpoints.save(self.saved, name, tensors, mine | {"design": self.design}, boxes)
            if distributed.first():
                checkpoints.prune(self.saved, name, self.KEEP)
        except OSError as error:
            self.unsaved += 1
            tell(f"could not save step {self.step} ({error.strerror}); the last checkpoint stays, training goes on")
            if self.unsaved >= self.PATIENCE:
                size = sum(x.nbytes for content in tensors.values() for x in content.values())
                told = f"{self.unsaved} checkpoints in a row could not be saved ({error.strerror})"
                raise Unsaved(f"{told}; each takes {size:,} bytes in {self.saved}") from None
            return False
        self.unsaved = 0
        return True

    # ------------------------------------------------------------------------------------------------------ one step

    def learn(self, micro: list[Batch]) -> Step:
        """One step over some micro-batches: one update, or several where the objective wants to learn them so often."""
        chance = (self.recipe.seed, self.number, self.step, *([self.groups.rank] if self.groups.rank else []))
        torch.manual_seed(hash(chance))  # a step's own, wherever a run resumes
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
        that compare the pairs of a micro-batch, such as SigLIP.
        """
        terms = self.gradients(micro, self.counts(micro))
        loss = torch.stack(list(terms.values())).sum()
        if not self.checked:  # where no process had pictures, what reads them is checked in the next step
            self.checked = bool(distributed.most(int(any(batch.patches is not None for batch in micro))))
            check_gradients(self.model, self.parameters, self.stage, self.checked)
        if self.rows:
            only_rows(self.parameters, self.rows)
        norm = sharding.clip(list(self.parameters.values()), self.stage.clip)
        applied = bool(torch.isfinite(norm)) and bool(torch.isfinite(loss))
        if applied:
            self.optimizers.step(self.step)
        self.refused = 0 if applied else self.refused + 1
        values = {name: float(value) for name, value in terms.items()}
        notes = dict(self.objective.notes)
        return Step(self.stage.name, self.step + 1, float(loss), values, float(norm), applied=applied, notes=notes)

    def counts(self, micro: list[Batch]) -> dict[str, int]:
        """How much each term learns from a step, over all groups of processes."""
        counts: Counter[str] = Counter()
        for batch in micro:
            counts.update(self.objective.counts(batch))
        return dict(zip(counts, self.groups.summed(torch.tensor(list(counts.values()))).tolist(), strict=True))

    def gradients(self, micro: list[Batch], counts: dict[str, int]) -> dict[str, Tensor]:
        """Give the parameters the gradients of a step, of all processes; return its terms.

        Where memory does not suffice, or will not, the same samples are computed in smaller parts, from then on.
        """
        while True:
            short_of, begun = self.foreseen(micro), False
            if not short_of:
                try:
                    found = self.accumulated(micro, counts)
                    break
                except (MemoryError, RuntimeError) as error:
                    if not short_of_memory(error):
                        raise
                short_of, begun = "are too many for the memory", True
            micro = self.smaller(short_of, begun)
        got = {name for name, p in self.parameters.items() if p.grad is not None}
        present = got if self.sharded is None else self.sharded.present
        distributed.share_gradients(self.parameters, present, self.groups)
        values = self.groups.summed(torch.stack(list(found.values())))
        return dict(zip(found, values, strict=True))

    @cached_property
    def memory(self) -> Memory:
        """What batches take, and what there is."""
        device = self.model.device
        return Memory(budget_of(self.recipe, self.stage, self.groups.each, device.type), device)

    def foreseen(self, micro: list[Batch]) -> str:
        """What is wrong with a step that memory will not suffice for, before any of it is computed.

        Processes with a model in shards cannot begin a pass again, so all know of one that has no room.
        """
        own = sum(sharding.local(p).numel() for p in self.parameters.values())
        # gradients, and moments that are not there yet
        told = self.memory.lacks(micro, (4 if self.step else 12) * own)
        if self.sharded is None or not distributed.most(int(bool(told))):
            return told
        return told or "are too many for the memory of another process"

    def accumulated(self, micro: list[Batch], counts: dict[str, int]) -> dict[str, Tensor]:
        """The gradients of this process's part of a step alone, and its share of each term."""
        self.optimizers.zero()
        if self.sharded is not None:
            self.sharded.present.clear()
        terms: dict[str, Tensor] = {}
        for batch in micro:
            for name, value in self.backward(batch, counts).items():
                terms[name] = terms[name] + value if name in terms else value
        return terms

    def smaller(self, short_of: str, begun: bool) -> list[Batch]:
        """The samples of this step again, half as many at a time; CapacityError where they cannot be cut.

        short_of: what is wrong with as many as now; begun: whether a pass with them was begun.
        """
        self.optimizers.zero()
        data, together = self.data, (COMPARES | PREPARES) & set(self.stage.terms)
        now = 0 if data is None else data.share.largest(self.stage)
        apart = begun and self.sharded is not None
        if data is None or now == 1 or together or apart:
            reason = "a pass in shards cannot be begun again" if apart else "they cannot be cut further"
            reason = f"{min(together)!r} needs them together" if together else reason
            told = f"{now or self.stage.batch} samples at a time {short_of}, and {reason}"
            raise CapacityError(f"stage {self.stage.name!r}: {told}; set batch lower and accumulate higher")
        self.data = data.shared(replace(data.share, pieces=2 * data.share.pieces))
        tell(f"{now} samples at a time {short_of}; {self.data.share.largest(self.stage)} from now on")
        with closing(self.batches(workers=0)) as source:
            return [batch.to(self.model.device) for batch in islice(source, self.data.share.per_step(self.stage))]

    def batches(self, workers: int) -> Generator[Batch, None, None]:
        """This process's batches from the next step on."""
        assert self.data is not None
        return batches(self.data, self.step * self.stage.accumulate, workers, self.stage.group)

    def backward(self, batch: Batch, counts: dict[str, int]) -> dict[str, Tensor]:
        """Add a micro-batch's gradients; return its share of each term."""
        with self.autocast():
            found = self.terms(batch)
        terms = {name: total.float() / max(counts[name], 1) for name, (total, _) in found.items()}
        total = torch.stack(list(terms.values())).sum()
        if total.requires_grad:  # text alone does not reach a projector
            total.backward()
        return {name: value.detach() for name, value in terms.items()}

    def terms(self, batch: Batch) -> dict[str, Term]:
        """The terms of a batch's loss; of a model in shards all processes ask for them together."""
        found: dict[str, Term] = self.objective(self.model, batch) if self.sharded is None else self.sharded(batch)
        return found

    def autocast(self) -> torch.autocast:
        """The precision that the stage computes in."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.stage.precision == "bf16")

    # ---------------------------------------------------------------------------------------------------------- loop

    def run(
        self, processor: Processor, workers: int = 1, evaluate: Callable[[VLM], dict[str, float]] | None = None
    ) -> Iterator[Step]:
        """Steps until the stage is done; a TERM, INT or USR1 finishes the step, saves and ends the process."""
        given = self.stage, self.number, self.recipe.seed, self.recipe.sources, processor
        validation = Validation(*given) if self.stage.eval_data else None
        self.data = Batches(*given, self.share)  # last: its files stay open for processes that load
        metrics, passed = Metrics(self.folder), PassedOver(self.folder, self.stage.max_bad)
        unseen = PassedOver(self.folder, self.stage.max_bad)  # those on which the loss is measured are counted apart
        if self.step < self.stage.steps:
            size = bytes_of((self.model, self.objective), self.parameters.values())
            distributed.led(lambda: check_room(self.saved, size))
        self.keep_features()
        guard = Guard(self.data) if self.stage.guard_every else None
        if guard is not None and guard.idle:
            held = f"of the samples that it holds out {len(guard.samples)} can be used and show pictures"
            tell(f"WARNING: stage {self.stage.name!r}: guard_every measures nothing; {held}, it takes 2")
        with Signals() as signals, ExitStack() as stack:
            data, source = self.data, stack.enter_context(closing(self.batches(workers)))
            while self.step < self.stage.steps:
                began = time.perf_counter()
                micro = [next(source).to(self.model.device) for _ in range(data.share.per_step(self.stage))]
                waited = time.perf_counter() - began
                passed.count([] if self.groups.place else micro)
                step = self.learn(micro)
                took = time.perf_counter() - began
                speed = self.stage.batch * self.stage.accumulate / took
                tokens = sum(map(tokens_of, micro)) * self.groups.size / took
                step = replace(step, samples_per_second=speed, tokens_per_second=tokens, waited=waited)
                metrics.write(asdict(step))
                if guard is not None and self.step % self.stage.guard_every == 0:
                    self.look(guard, metrics)
                if validation is not None and self.evaluates:
                    loss = self.validate(validation, metrics, unseen)
                    step = replace(step, notes=step.notes | {EVAL: loss})
                if not step.applied:
                    self.refuse(step, micro)
                yield step
                caught = distributed.most(signals.caught)
                if self.step == self.stage.steps or caught or self.step % self.stage.save_every == 0:
                    saved = self.save()
                    if evaluate is not None and not caught:
                        distributed.led(lambda: metrics.write(self.scores(evaluate)))
                if caught:
                    how = f"saved in {self.folder}; the same command goes on" if saved else "not saved"
                    name = signal.Signals(caught).name
                    tell(f"stopped by {name} after step {self.step} of stage {self.stage.name!r}, {how}")
                    sys.exit(128 + caught)
                if data is not self.data:  # memory did not suffice for what has been made ahead
                    source.close()
                    data, source = self.data, stack.enter_context(closing(self.batches(workers)))

    def scores(self, evaluate: Callable[[VLM], dict[str, float]]) -> dict[str, Any]:
        """A line of metrics that says how good the model is by now."""
        return {"stage": self.stage.name, "step": self.step, "scores": evaluate(self.model)}

    def keep_features(self) -> None:
        """Read a frozen encoder's features from the disk from now on, where the stage meets samples again."""
        frozen = not any(parameter.requires_grad for parameter in self.model.encoder.parameters())
        if self.store is None and self.stage.feature_store and repeats(self.stage, self.recipe.sources) > 1:
            self.store = FeatureStore(self.folder / "features", int(self.stage.feature_store * GIGABYTE))
        if self.store is not None and frozen:
            self.store.serve(self.model.encoder, self.recipe.pixels)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Within this context losses are looked at and not learned from: in the stage's precision, without chance."""
        with evaluating((self.model, self.objective)), self.autocast():
            yield
        if self.sharded is not None:
            self.sharded.part()  # which gradients do otherwise

    def look(self, guard: Guard, metrics: Metrics) -> None:
        """Write down whether the model looks at its pictures; warn, once, when it does not."""
        with self.looking():
            found = guard.look(self.terms, self.model.device)
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

    @property
    def evaluates(self) -> bool:
        """Whether the loss on `eval_data` is measured after this step."""
        every = self.stage.eval_every
        return self.step == self.stage.steps or (every > 0 and self.step % every == 0)

    def validate(self, validation: Validation, metrics: Metrics, passed: PassedOver) -> float:
        """Write down the loss on `eval_data` and return it; training goes on as if nothing had been.

        Every process reads all batches, so that those with parts of a model gather it as often as one another.
        """
        assert self.data is not None

        def batches() -> Iterator[Batch]:
            for batch in validation.batches(self.data.share.largest(self.stage)):
                passed.count([batch] if distributed.first() else [])
                yield batch.to(self.model.device)

        self.objective.prepare(self.model, [], f"{self.recipe.seed} {self.number} eval")  # the same chance each time
        self.objective.among(distributed.Peers())
        kept = nullcontext() if self.store is None else self.store.only_read()
        with self.looking(), kept:
            terms = mean_terms(batches(), self.terms)
        self.objective.among(self.peers)
        loss = sum(terms.values())
        row = {"stage": self.stage.name, "step": self.step, "eval": {"loss": loss, "terms": terms}}
        metrics.write_once(row)
        return loss

    def refuse(self, step: Step, micro: list[Batch]) -> None:
        """Name the samples of a step that was not applied; stop after several in a row."""
        here = [] if self.groups.place else [name for batch in micro for name in batch.extra["names"]][:8]
        names = [name for there in distributed.gathered(here) for name in there][:8]
        tell(f"step {step.step} not applied: loss {step.loss}, gradient norm {step.norm}; samples {', '.join(names)}")
        if self.refused >= self.PATIENCE:
            raise NonFinite(f"{self.refused} steps in a row were not numbers, last samples {', '.join(names)}")
