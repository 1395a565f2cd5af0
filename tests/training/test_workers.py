"""Loader processes that are killed, end, raise, stop or run out of memory: the same batches come, or a sample less."""

import mmap
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sightline.core.errors import CapacityError, DataError
from sightline.training import loader, workers
from sightline.training.loader import TRIES, made_of
from sightline.training.recipe import Recipe
from sightline.training.run import run
from sightline.training.workers import ahead, at


class Shared:
    """A few numbers that forks of this process share."""

    def __init__(self, count: int = 8) -> None:
        self.memory = np.frombuffer(mmap.mmap(-1, 8 * count), dtype=np.int64)

    def more(self, which: int = 0) -> int:
        """One more of them, and how many there were before."""
        self.memory[which] += 1
        return int(self.memory[which]) - 1


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def left() -> None:
    os._exit(3)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def without_memory() -> None:
    raise MemoryError


def beyond_its_limit() -> None:
    """What the system refuses, not what Python was told to."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), now + (64 << 20)))
    torch.zeros(1 << 30)


ENDS = {
    killed: "was killed by signal 9",
    left: "ended with exit code 3",
    stopped: "did nothing for 0.4 seconds",
    without_memory: "ran out of memory",
    beyond_its_limit: "ran out of memory",
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SILENT", 0.4)


def value_of(task: int) -> dict[str, Any]:
    """Something of every kind that a batch holds."""
    made = torch.Generator().manual_seed(task)
    return {
        "task": task,
        "float": torch.randn(3, 5, generator=made),
        "half": torch.randn(4, generator=made).bfloat16(),
        "turned": torch.randn(3, 5, generator=made).T,
        "flags": torch.rand(7, generator=made) > 0.5,
        "none": torch.zeros(0, 4, dtype=torch.int64),
        "one": torch.tensor(task),
        "array": np.arange(task),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride()
        if isinstance(x, torch.Tensor)
        else np.array_equal(x, y)
        for x, y in zip(one.values(), other.values(), strict=True)
    )


def children() -> list[str]:
    """Processes of this one that are still there."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


# ----------------------------------------------------------------------------------------------------- work of any kind


@pytest.mark.parametrize("count, each", [(1, 4), (2, 1), (3, 2)])
def test_what_comes_is_whole_and_in_order(count: int, each: int) -> None:
    def make(task: int) -> dict[str, Any]:
        time.sleep(0.003 * (task % 3))
        return value_of(task)

    before = children()
    found = list(ahead(make, 20, count, each, print))  # type: ignore[arg-type]
    assert all(same(value, value_of(task)) for task, value in enumerate(found)) and len(found) == 20
    assert all(value["float"].data_ptr() % 64 == 0 for value in found)
    assert children() == before


def test_no_more_is_made_ahead_than_was_asked_for() -> None:
    made = Shared()
    with closing(ahead(lambda task: made.more(), 100, 2, 3, print)) as source:
        assert next(source) is not None
        time.sleep(0.2)
        assert 6 <= made.memory[0] <= 7


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_process_that_ends_is_replaced_and_its_work_is_the_same(
    end: Callable[[], None], count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = Shared(20)

    def make(task: int) -> dict[str, Any]:
        if tried.more(task) == 0 and task in (2, 5):
            end()
        return value_of(task)

    began, given_up = time.monotonic(), []
    found = list(ahead(make, 8, count, 3, lambda *told: given_up.append(told)))
    assert all(same(value, value_of(task)) for task, value in enumerate(found)) and len(found) == 8
    assert time.monotonic() - began < 5 and not given_up
    told = capsys.readouterr().err.splitlines()
    assert told == [f"a loader process {ENDS[end]}; another one does its work again"] * 2


def test_the_third_that_ends_at_a_place_gives_it_up(capsys: pytest.CaptureFixture[str]) -> None:
    given_up: dict[int, str] = {}

    def make(task: int) -> str:
        for place in (10 * task, 10 * task + 1):
            if place not in given_up:
                at(place)
                if place in (20, 30):
                    killed()
                return f"{place}"
        raise AssertionError

    assert list(ahead(make, 5, 2, 2, given_up.__setitem__)) == ["0", "10", "21", "31", "40"]
    assert given_up == dict.fromkeys((20, 30), "3 loader processes ended over it; the last was killed by signal 9")
    assert capsys.readouterr().err.count("another one") == 6


def test_three_that_end_at_no_place_end_the_run() -> None:
    before = children()
    with pytest.raises(DataError, match="3 loader processes ended over batch 1; the last ended with exit code 3"):
        list(ahead(lambda task: left() if task == 1 else task, 5, 2, 2, print))
    assert children() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_processes_that_others_end_at_any_time_cost_nothing(number: int) -> None:
    """One after the other, idle or not, from outside; more often than three are ended over one place."""
    source, found, before = ahead(value_of, 12, 2, 2, print), [], set(children())  # type: ignore[arg-type]
    with closing(source):
        for value in source:
            found.append(value)
            for child in set(children()) - before if len(found) % 3 == 0 else ():
                os.kill(int(child), number)
    assert all(same(value, value_of(task)) for task, value in enumerate(found)) and len(found) == 12


def test_one_that_computes_for_long_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    def make(task: int) -> int:
        until = time.process_time() + 1.2
        while time.process_time() < until:
            pass
        return task

    assert list(ahead(make, 1, 1, 1, print)) == [0]
    assert not capsys.readouterr().err


class Odd(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


@pytest.mark.parametrize("error", [CapacityError("too long"), ValueError("odd"), Odd(1, 2)])
def test_what_is_raised_there_is_raised_here(error: Exception) -> None:
    def make(task: int) -> int:
        if task == 2:
            raise error
        return task

    found, before = [], children()
    with pytest.raises(Exception, match=str(error)) as failure:
        found.extend(task for task in ahead(make, 4, 2, 2, print))
    assert type(failure.value) is (RuntimeError if isinstance(error, Odd) else type(error))  # as far as it can be sent
    assert children() == before
    assert "in make" in "".join((str(failure.value), *getattr(failure.value, "__notes__", ())))


def test_workers_end_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    trainer = os.fork()
    if trainer == 0:
        with suppress(BaseException):
            for task in ahead(lambda task: os.getpid(), 100_000, 3, 2, print):
                (tmp_path / str(task)).touch()
        os._exit(0)
    while len(list(tmp_path.iterdir())) < 3:
        time.sleep(0.01)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    until = time.monotonic() + 5
    while any(alive(int(path.name)) for path in tmp_path.iterdir()):
        assert time.monotonic() < until
        time.sleep(0.01)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------- samples


@pytest.fixture
def rows(recipe: Recipe, tmp_path: Path) -> Recipe:
    """A recipe of one stage that reads twelve rows of a file for two epochs."""
    from sightline.training.sources import FilesSource

    path = tmp_path / "rows.jsonl"
    talk = '[{{"from": "human", "value": "which?"}}, {{"from": "gpt", "value": "word {}"}}]'
    path.write_text("".join(f'{{"conversations": {talk.format(i)}}}\n' for i in range(12)))
    source = FilesSource(kind="conversations", format="llava", path=str(path))
    stage = replace(recipe.stages[1], data={"mine": 1.0}, batch=2, accumulate=2, steps=6, max_bad=0.5)
    return replace(recipe, sources={"mine": source}, stages=(stage,))


def broken(monkeypatch: pytest.MonkeyPatch, how: Callable[[], None], word: str, times: int) -> None:
    """Let a worker end, so many times in all, while it makes the sample with this answer."""
    tried, trainer = Shared(), os.getpid()

    def made(sample: Any, *more: Any) -> Any:
        if os.getpid() != trainer and sample.conversation[-1].text == word and tried.more() < times:
            how()
        return made_of(sample, *more)

    monkeypatch.setattr(loader, "made_of", made)


def losses(recipe: Recipe, folder: Path, count: int) -> list[float]:
    return [step.loss for step in run(recipe, folder, workers=count)]


@pytest.mark.parametrize("end", [killed, stopped])
def test_a_run_whose_workers_end_learns_the_same_bits(
    rows: Recipe, fresh: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, end: Callable[[], None]
) -> None:
    whole = losses(rows, fresh("whole"), 0)
    broken(monkeypatch, end, "word 7", 2)
    folder = fresh("hurt")
    assert losses(rows, folder, 2) == whole
    assert not (folder / "passed-over.txt").exists()


@pytest.mark.parametrize("end", [killed, left])
def test_a_sample_over_which_three_end_is_passed_over_told_and_counted(
    rows: Recipe,
    fresh: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    end: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same sample comes in its place as in that of one that cannot be read."""

    def unreadable(sample: Any, *more: Any) -> Any:
        if sample.conversation[-1].text == "word 7":
            raise DataError("cannot be read")
        return made_of(sample, *more)

    monkeypatch.setattr(loader, "made_of", unreadable)
    wanted = losses(rows, fresh("unreadable"), 0)
    broken(monkeypatch, end, "word 7", 1000)
    folder = fresh("deadly")
    assert losses(rows, folder, 1) == wanted
    (line,) = (folder / "passed-over.txt").read_text().splitlines()
    assert line.endswith(f"rows.jsonl:8: 3 loader processes ended over it; the last {ENDS[end]}")
    err = capsys.readouterr().err
    assert f"passed over {line}" in err and err.count("another one does its work again") == 6  # of two epochs


def test_what_a_reader_did_not_foresee_is_a_bad_sample(
    rows: Recipe, fresh: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(sample: Any, *more: Any) -> Any:
        if sample.conversation[-1].text == "word 7":
            raise ZeroDivisionError("division by zero")
        return made_of(sample, *more)

    monkeypatch.setattr(loader, "made_of", made)
    one, other = fresh("zero"), fresh("one")
    assert losses(rows, one, 0) == losses(rows, other, 1)
    told = [(folder / "passed-over.txt").read_text() for folder in (one, other)]
    assert told[0] == told[1] and told[0].endswith("rows.jsonl:8: ZeroDivisionError: division by zero\n")


def test_a_sample_without_another_in_its_place_ends_the_run(
    recipe: Recipe, folder: Path, alone: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A world has no end, and its samples are asked for by their number."""
    monkeypatch.setattr(loader, "made_of", lambda *_: killed())
    with pytest.raises(DataError, match="sample 0 of source 'text': 3 loader processes ended over it"):
        losses(alone(recipe, "language"), folder, 1)
    assert TRIES > 1
