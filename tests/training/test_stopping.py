"""Asked to stop at any time, by a signal or by another process that is gone: within bounds, saved, and saying so."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from sightline.core.config import save_yaml
from sightline.training import checkpoints, distributed
from sightline.training.recipe import Recipe
from sightline.training.run import run
from sightline.training.trainer import Trainer

Fresh = Callable[[str], Path]
Alone = Callable[..., Recipe]
Launch = Callable[..., list[int]]
WHERE = "checkpoints/language"


def trainer(recipe: Recipe, folder: Path, before: Callable[[], None] = lambda: None, workers: int = 0) -> int:
    """A child that trains; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        before()
        list(run(recipe, folder, workers=workers))
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        os._exit(code)


def steps_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def until(done: Callable[[], bool], within: float = 60.0) -> None:
    end = time.monotonic() + within
    while not done():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def code_of(process: int, within: float) -> int:
    """How a process ends, which it must do so soon."""
    found: list[int] = []

    def ended() -> bool:
        done, status = os.waitpid(process, os.WNOHANG)
        found.extend([os.waitstatus_to_exitcode(status)] if done else [])
        return bool(done)

    try:
        until(ended, within)
    except AssertionError:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise
    return found[0]


def newest(folder: Path) -> int:
    """The step of the newest checkpoint; all must be whole."""
    found = checkpoints.listed(folder / WHERE)
    return max(int(checkpoints.load(path).state["step"]) for path in found)


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("times", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_signal_at_any_time_finishes_the_step_and_saves(
    recipe: Recipe, fresh: Fresh, alone: Alone, times: int
) -> None:
    """Saving takes about half of this run's time."""
    rng, chosen = random.Random(0), alone(recipe, "language", steps=100_000, save_every=1, accumulate=2)
    folder = fresh("run")
    for i in range(times):
        before, workers = steps_of(folder), i % 2
        process = trainer(chosen, folder, workers=workers)
        until(lambda before=before: steps_of(folder) > before)
        time.sleep(rng.uniform(0, 0.05))
        number = rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        os.kill(process, number)
        assert code_of(process, 5.0) == 128 + number
        assert newest(folder) == json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        assert not [path for path in (folder / WHERE).iterdir() if path.name.startswith(".")]


def in_one_long_computation(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    """The fourth step, in which no Python runs for a minute."""
    backward = Trainer.backward

    def long(self: Trainer, *given: Any) -> Any:
        if self.step == 3:
            told.touch()
            torch.linalg.matrix_power(torch.eye(6000), 1 << 20)
        return backward(self, *given)

    monkeypatch.setattr(Trainer, "backward", long)


def in_a_save(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    """That of the fourth step, with one file written."""
    write = checkpoints.write_tensors

    def slow(path: Path, tensors: Any, *notes: Any) -> None:
        write(path, tensors, *notes)
        if "step-0000004" in str(path):
            told.touch()
            time.sleep(60)

    monkeypatch.setattr(checkpoints, "write_tensors", slow)


@pytest.mark.parametrize("busy", [in_one_long_computation, in_a_save])
def test_a_second_signal_ends_it_within_a_second(
    recipe: Recipe, folder: Path, alone: Alone, monkeypatch: pytest.MonkeyPatch, busy: Callable[..., None]
) -> None:
    told = folder / "told"
    process = trainer(
        alone(recipe, "language", steps=100, save_every=1), folder, lambda: busy(monkeypatch, told), workers=1
    )
    until(told.exists)
    os.kill(process, signal.SIGTERM)
    time.sleep(0.8)
    assert os.waitpid(process, os.WNOHANG) == (0, 0)
    os.kill(process, signal.SIGTERM)
    assert code_of(process, 1.0) == 143
    assert newest(folder) == 3
    process = trainer(alone(recipe, "language", steps=5, save_every=1), folder)  # a changed length is refused
    assert code_of(process, 60) == 1


# ------------------------------------------------------------------------------------------------------ lost processes


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_the_other_process_of_one_that_is_gone_says_so_and_a_new_start_goes_on(
    recipe: Recipe,
    fresh: Fresh,
    alone: Alone,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
) -> None:
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=2))
    chosen, folder, whole = alone(recipe, "language", steps=100, save_every=10), fresh("run"), fresh("whole")

    def work(folder: Path) -> Callable[[], None]:
        return lambda: deque(run(chosen, folder, workers=0), maxlen=0).clear()

    processes = launch(work(folder))
    until(lambda: steps_of(folder) >= 15)
    os.kill(processes[1], number)
    assert code_of(processes[0], 15.0) == distributed.Lost.exit_code == 75
    os.kill(processes[1], signal.SIGKILL)
    os.waitpid(processes[1], 0)
    assert "error: rank 1 of 2 is gone, rank 0 waited for it in all_" in capfd.readouterr().err
    done = steps_of(folder)
    assert 15 <= done < 100
    for place in (folder, whole):
        assert [code_of(process, 60) for process in launch(work(place))] == [0, 0]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = {row["step"]: row["loss"] for row in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())}
    assert all(row["loss"] == wanted[row["step"]] for row in rows) and {row["step"] for row in rows} == set(wanted)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_starts_a_run_again_that_lost_a_process(
    recipe: Recipe, fresh: Fresh, alone: Alone, tmp_path: Path
) -> None:
    """The other one names it before torchrun ends both, and the losses are those of a run that lost none."""
    chosen = alone(recipe, "language", steps=400, save_every=10, optimizer="adamw")
    folder, whole = fresh("run"), fresh("whole")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "sightline.train", str(tmp_path / "tiny.yaml"), "--shard"]
    save_yaml(chosen, tmp_path / "tiny.yaml")
    process = subprocess.Popen([*command, "--folder", str(folder)], stderr=subprocess.PIPE, text=True)
    until(lambda: steps_of(folder) >= 25)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [each for each in children if b"\0RANK=1\0" in Path(f"/proc/{each}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert "error: rank 1 of 2 is gone, rank 0 waited for it in " in told
    subprocess.run([*command, "--folder", str(whole)], check=True, capture_output=True, timeout=200)
    rows, wanted = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()] for place in (folder, whole)
    )
    losses = {row["step"]: row["loss"] for row in wanted}
    assert len(losses) == 400 < len(rows) and all(row["loss"] == losses[row["step"]] for row in rows)
