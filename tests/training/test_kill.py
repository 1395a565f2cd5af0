"""Runs that are killed with SIGKILL at random instants end as if nothing had happened; `make crash` kills a thousand.

Each attempt is a fork of this process, which has torch loaded already: dozens of starts take seconds.
"""

import json
import os
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sightline.training import checkpoints
from sightline.training.recipe import Recipe
from sightline.training.run import final_model, run

Fresh = Callable[[str], Path]


def start(recipe: Recipe, folder: Path, workers: int) -> int:
    """A process that trains and writes the bits of each loss into the folder's `trace`; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        trace = os.open(folder / "trace", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for step in run(recipe, folder, workers=workers):
            os.write(trace, f"{step.stage} {step.step} {struct.pack('<d', step.loss).hex()}\n".encode())
        code = 0
    finally:
        os._exit(code)  # nothing of the test runner may run twice


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def trace_of(folder: Path) -> list[tuple[str, str]]:
    """(stage and step, bits of the loss) of every step that was done, those done again too."""
    path = folder / "trace"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line.rpartition(" ")[0], line.rpartition(" ")[2]) for line in lines]


def seen(folder: Path, steps: int, process: int) -> None:
    """Wait until so many lines are in a trace: a start takes longer than many steps, and how long says the machine."""
    while len(trace_of(folder)) < steps:
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "ended before it was killed"
        time.sleep(0.001)


def survives(recipe: Recipe, whole: Path, folder: Path, kills: int, workers: int) -> None:
    """Train once in one go, once killed so often, and compare every step and the last weights bit for bit."""
    assert ended(start(recipe, whole, workers)) == 0
    wanted = dict(trace_of(whole))
    rng = random.Random(1)
    most = 2 * len(wanted) // kills - 1  # all of them together do fewer steps than there are: none comes too late
    for _ in range(kills):
        before = len(trace_of(folder))
        process = start(recipe, folder, workers)
        seen(folder, before + rng.randint(0, most), process)
        time.sleep(rng.choice((0.0, rng.uniform(0, 0.02))))
        os.kill(process, signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL
    assert ended(start(recipe, folder, workers)) == 0

    found = trace_of(folder)
    assert [pair for pair in found if wanted[pair[0]] != pair[1]] == []
    assert set(dict(found)) == set(wanted) and len(wanted) == sum(stage.steps for stage in recipe.stages)
    assert len(found) > len(wanted)  # the kills did cost steps
    one, other = (final_model(recipe, place)[0].state_dict() for place in (whole, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for stage in recipe.stages:
        place = folder / "checkpoints" / stage.name
        assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []
        assert all(checkpoints.load(path) for path in checkpoints.listed(place))
    logged = [row for row in map(parsed, (folder / "metrics.jsonl").read_text().splitlines()) if row]
    assert {f"{row['stage']} {row['step']}" for row in logged} == set(wanted)


def parsed(line: str) -> dict[str, object] | None:
    """A line of metrics, or None for one that a kill cut short."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return None


def endless(recipe: Recipe, steps: int) -> Recipe:
    """Two stages, the second from the weights of the first, with both optimisers and accumulated steps."""
    first, second = recipe.stages[recipe.stage("language")], recipe.stages[recipe.stage("instruct")]
    stages = (
        replace(first, steps=steps, accumulate=2, batch=1, save_every=3),
        replace(second, steps=steps, save_every=5),
    )
    return replace(recipe, stages=stages)


@pytest.mark.parametrize("kills, steps, workers", [(50, 150, 0), (6, 60, 1)])
def test_killed_runs_end_bit_for_bit_as_whole_ones(
    recipe: Recipe, fresh: Fresh, kills: int, steps: int, workers: int
) -> None:
    survives(endless(recipe, steps), fresh("whole"), fresh("killed"), kills, workers)


def test_a_run_that_finds_no_whole_checkpoint_says_so_and_starts_again_without_them(
    recipe: Recipe, fresh: Fresh
) -> None:
    chosen = replace(recipe, stages=recipe.stages[1:2])
    whole, folder = fresh("whole"), fresh("hurt")
    assert ended(start(chosen, whole, 0)) == 0
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    (folder / "trace").unlink()
    place = folder / "checkpoints" / "language"
    for path in checkpoints.listed(place):
        (path / checkpoints.MANIFEST).unlink()
    with pytest.raises(checkpoints.NoneWhole, match="none of its checkpoints is whole") as failure:
        next(run(chosen, folder, workers=0))
    assert failure.value.exit_code == 66 and len(checkpoints.listed(place)) == 2
    shutil.rmtree(place)
    assert ended(start(chosen, folder, 0)) == 0
    assert trace_of(folder) == trace_of(whole)
