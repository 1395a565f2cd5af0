"""A run that is stopped anywhere goes on with the same samples and bits: in epochs, between stages, elsewhere."""

import hashlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sightline.data.batch import Batch
from sightline.language.tokenizer import Tokenizer
from sightline.training import checkpoints, run as module
from sightline.training.loader import Batches, Share, batches
from sightline.training.recipe import Recipe, Stage, learning_rates
from sightline.training.run import final_model, initial_model, processor_of, run
from sightline.training.sources import FilesSource
from sightline.training.trainer import Trainer

Fresh = Callable[[str], Path]
ROWS, STEPS = 12, 7  # four samples a step: two epochs of the file and a third of another


@pytest.fixture
def rows(recipe: Recipe, tmp_path: Path) -> Recipe:
    """A recipe of one stage that reads rows of a file, in two micro-batches a step, and saves every step."""
    path = tmp_path / "rows.jsonl"
    talk = '[{{"from": "human", "value": "which?"}}, {{"from": "gpt", "value": "word {}"}}]'
    path.write_text("".join(f'{{"conversations": {talk.format(i)}}}\n' for i in range(ROWS)))
    source = FilesSource(kind="conversations", format="llava", path=str(path))
    stage = replace(recipe.stages[1], data={"mine": 1.0}, batch=2, accumulate=2, steps=STEPS, save_every=1)
    return replace(recipe, sources={"mine": source}, stages=(stage,))


class Killed(BaseException):
    """Stands for a kill, in this process."""


def learned(monkeypatch: pytest.MonkeyPatch, stop: tuple[int, int] | None = None) -> list[tuple[int, tuple[str, ...]]]:
    """Number and samples of every step that is learned from now on; `stop`: the step and part that is killed."""
    found: list[tuple[int, tuple[str, ...]]] = []
    learn, backward, part = Trainer.learn, Trainer.backward, Counter[int]()

    def told(self: Trainer, micro: list[Batch]) -> Any:
        step = learn(self, micro)
        found.append((step.step, tuple(name for batch in micro for name in batch.extra["names"])))
        return step

    def killed(self: Trainer, *given: Any) -> Any:
        part[self.step] += 1
        if (self.step, part[self.step] - 1) == stop:
            raise Killed
        return backward(self, *given)

    monkeypatch.setattr(Trainer, "learn", told)
    monkeypatch.setattr(Trainer, "backward", killed)
    return found


# ------------------------------------------------------------------------------------------------------------- epochs

STOPS = {
    "before anything": (0, 0),
    "in the first step": (0, 1),
    "after one step": (1, 0),
    "in accumulation": (2, 1),
    "at the end of an epoch": (3, 0),
    "in the next epoch": (4, 1),
    "at the end of the next": (6, 0),
    "in the last batch": (6, 1),
    "after the last": (7, 0),
}
SHORT = {0: STOPS, 1: (), 2: ("in accumulation", "at the end of an epoch")}  # what `make test` does
PLACES = [
    pytest.param(stop, workers, id=f"{name}-{workers}", marks=() if name in SHORT[workers] else pytest.mark.slow)
    for name, stop in STOPS.items()
    for workers in (0, 1, 2)
]


@pytest.mark.parametrize("stop, workers", PLACES)
def test_every_sample_of_every_epoch_is_learned_once_wherever_a_run_resumes(
    rows: Recipe, fresh: Fresh, monkeypatch: pytest.MonkeyPatch, stop: tuple[int, int], workers: int
) -> None:
    with monkeypatch.context() as patch:
        wanted = learned(patch)
        whole = [step.loss for step in run(rows, fresh("whole"), workers=0)]
    folder, losses = fresh("killed"), []
    with monkeypatch.context() as patch:
        first = learned(patch, stop)
        try:
            losses.extend(step.loss for step in run(rows, folder, workers=workers))
        except Killed:
            losses = whole[: len(first)]  # which the steps below show
    with monkeypatch.context() as patch:
        rest = learned(patch)
        after = [step.loss for step in run(rows, folder, workers=workers)]
    assert first + rest == wanted and losses + after == whole
    assert [step for step, _ in first] == list(range(1, stop[0] + 1))
    names = [int(name.rpartition(":")[2]) for _, some in first + rest for name in some]
    for epoch in range(2):
        assert sorted(names[epoch * ROWS : (epoch + 1) * ROWS]) == list(range(1, ROWS + 1))
    assert len(set(names[2 * ROWS :])) == 4 * STEPS - 2 * ROWS


# -------------------------------------------------------------------------------------------------- from stage to stage

SWITCH = [
    *((checkpoints, name) for name in ("save", "write_tensors", "flush", "digest", "prune", "check", "read")),
    *((module, name) for name in ("write_report", "finished", "initial_model", "weights_before", "restore", "adapt")),
    *((module, name) for name in ("objective_of", "processor_of")),
    *((Trainer, name) for name in ("__init__", "resume", "run", "learn", "save")),
]


def killed_in_the_switch(recipe: Recipe, folder: Path, call: int) -> bool:
    """Train in a child that is killed before the `call`-th thing it does from the last save of a stage on."""
    child = os.fork()
    if child == 0:
        left, begun = call, False
        torch.set_num_threads(1)

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*args: Any, **more: Any) -> Any:
                nonlocal left, begun
                trainer = args[0] if args and isinstance(args[0], Trainer) else None
                begun |= trainer is not None and getattr(trainer, "step", 0) == recipe.stages[0].steps
                left -= begun
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **more)

            return counting

        try:
            for owner, name in SWITCH:
                setattr(owner, name, counted(getattr(owner, name)))
            for step in run(recipe, folder, workers=0):
                if step.stage == recipe.stages[1].name and step.step == 2:
                    break
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("calls", [range(2, 100, 8), pytest.param(range(1, 100), marks=pytest.mark.slow)], ids=str)
def test_a_run_killed_between_two_stages_goes_on_in_the_right_one(
    recipe: Recipe, fresh: Fresh, monkeypatch: pytest.MonkeyPatch, calls: range
) -> None:
    """Another rate, other data and other parameters: each stage begins with an optimiser of its own."""
    stages = (replace(recipe.stages[1], steps=2), replace(recipe.stages[3], steps=4))
    chosen, learn = replace(recipe, stages=stages), Trainer.learn
    whole = fresh("whole")
    wanted = {(step.stage, step.step): step.loss for step in run(chosen, whole, workers=0)}
    weights = final_model(chosen, whole)[0].state_dict()

    def checked(self: Trainer, micro: list[Batch]) -> Any:
        rates = learning_rates(self.model, self.stage.learn)
        assert {name for name, p in self.model.named_parameters() if p.requires_grad} == set(rates)
        assert {key.rpartition("/")[0] for key in self.optimizers.tensors()} <= set(rates)
        assert self.step or not self.optimizers.tensors()
        return learn(self, micro)

    kills = 0
    for call in calls:
        folder = fresh(f"killed{call}")
        if not killed_in_the_switch(chosen, folder, call):
            break
        kills += 1
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "learn", checked)
            found = {(step.stage, step.step): step.loss for step in run(chosen, folder, workers=0)}
        assert found and all(wanted[step] == loss for step, loss in found.items()), call
        mine = final_model(chosen, folder)[0].state_dict()
        assert all(torch.equal(weights[name], mine[name]) for name in weights), call
    assert kills >= (3 if calls.step > 1 else 30)


# ------------------------------------------------------------------------------------------ other processes and workers


def step_of(
    stage: Stage, data: Callable[[Share], Batches], size: int, step: int, workers: int
) -> list[tuple[str, str]]:
    """Names and digests of what `size` processes read in a step, in the order of the samples in it."""
    found: list[tuple[int, str, str]] = []
    for rank in range(size):
        share = Share(rank, size)
        source: Iterator[Batch] = batches(data(share), step * stage.accumulate, workers)
        for _ in range(share.per_step(stage)):
            batch = next(source)
            assert batch.patches is not None
            each = batch.patches.values.chunk(len(batch.ids))
            for i, (name, pixels) in enumerate(zip(batch.extra["names"], each, strict=True)):
                digest = hashlib.sha1(pixels.contiguous().numpy().tobytes()).hexdigest()
                found.append((batch.extra["first"] + i, name, digest))
        source.close()  # type: ignore[attr-defined]
    return [(name, digest) for _, name, digest in sorted(found)]


def test_what_a_step_reads_does_not_hang_on_processes_or_workers(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """4 micro-batches on one process, 2 on each of two, one on each of four, halves on each of eight."""
    stage = replace(recipe.stages[2], batch=2, accumulate=4)
    processor = processor_of(recipe, tokenizer, initial_model(recipe))

    def data(share: Share) -> Batches:
        return Batches(stage, 2, recipe.seed, recipe.sources, processor, share)

    for step in (0, 3):
        wanted = step_of(stage, data, 1, step, 0)
        assert len({digest for _, digest in wanted}) == 8
        for size, workers in ((2, 0), (4, 0), (8, 0), (1, 2), (2, 2)):
            assert step_of(stage, data, size, step, workers) == wanted, (step, size, workers)
