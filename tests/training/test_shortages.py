"""Full and read-only disks, little memory, foreign clocks, crowded folders, values that are no numbers."""

import ctypes
import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sightline.core.errors import CapacityError, ConfigError
from sightline.data.batch import Batch
from sightline.language.tokenizer import Tokenizer
from sightline.training import budget, checkpoints, saving
from sightline.training.budget import Budget, budget_of
from sightline.training.loader import Batches
from sightline.training.recipe import Recipe, learning_rates
from sightline.training.records import Metrics
from sightline.training.run import initial_model, objective_of, processor_of, run
from sightline.training.trainer import NonFinite, Trainer, Unsaved

Fresh = Callable[[str], Path]
Alone = Callable[..., Recipe]
WHERE = "checkpoints/language"


def losses(recipe: Recipe, folder: Path, workers: int = 0) -> list[float]:
    return [step.loss for step in run(recipe, folder, workers=workers)]


def trainer_of(recipe: Recipe, folder: Path, tokenizer: Tokenizer) -> tuple[Trainer, Batches]:
    stage, model = recipe.stages[0], initial_model(recipe)
    objective = objective_of(stage, recipe, tokenizer, model)
    data = Batches(stage, 0, recipe.seed, recipe.sources, processor_of(recipe, tokenizer, model))
    return Trainer(recipe, stage, model, objective, folder), data


def filled(path: Path) -> None:
    """Write into a file until nothing is free."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# ------------------------------------------------------------------------------------------------------------- the disk


def test_what_was_saved_is_what_was_there_when_it_was_asked_for(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, alone: Alone
) -> None:
    """Saving is over when `save` returns; nothing that is learned later gets into it."""
    trainer, data = trainer_of(alone(recipe, "language"), tmp_path, tokenizer)
    trainer.learn([data[0]])
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    moments = {name: value.clone() for name, value in trainer.optimizers.tensors().items()}
    assert trainer.save()
    with torch.no_grad():
        for value in (*trainer.model.parameters(), *trainer.optimizers.tensors().values()):
            value.fill_(7)
    found = checkpoints.newest(trainer.saved, print)
    assert found is not None
    assert all(torch.equal(found.tensors["model"][name], value) for name, value in before.items())
    assert all(torch.equal(found.tensors["optimizer"][name], value) for name, value in moments.items())


def test_a_disk_without_room_for_two_checkpoints_is_told_before_anything_is_learned(
    recipe: Recipe, fresh: Fresh, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, folder, other = alone(recipe, "language"), fresh("run"), fresh("other")
    list(run(chosen, other, workers=0))
    last = checkpoints.listed(other / WHERE)[-1]
    size = sum(file.stat().st_size for file in last.iterdir())
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage._replace(free=int(1.9 * size)))
    with pytest.raises(Unsaved, match=r"its checkpoints need [\d,]+ bytes at least, [\d,]+ are free") as failure:
        next(run(chosen, folder, workers=0))
    assert failure.value.exit_code == 75 and not (folder / "metrics.jsonl").exists()
    shutil.copytree(last, folder / WHERE / "step-0000002")  # beside the last one there is room for another
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage._replace(free=int(1.3 * size)))
    saving.check_room(folder / WHERE, size)
    with pytest.raises(Unsaved):
        saving.check_room(folder / "nowhere" / "yet", size)


def test_a_run_goes_on_while_its_disk_is_full_and_saves_again_afterwards(
    recipe: Recipe, fresh: Fresh, alone: Alone, disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = alone(recipe, "language", steps=10, save_every=2)
    whole, place = losses(chosen, fresh("whole")), disk(4 << 20)
    folder, found = fresh(f"{place.name}/run"), []
    for step in run(chosen, folder, workers=0):
        found.append(step.loss)
        if step.step == 3:
            with pytest.raises(OSError, match="No space left"):
                filled(place / "filler")
        if step.step == 7:
            (place / "filler").unlink()
    assert found == whole
    err = capsys.readouterr().err
    assert [step for step in range(11) if f"could not save step {step} (No space" in err] == [4, 6]
    assert [path.name for path in checkpoints.listed(folder / WHERE)] == ["step-0000008", "step-0000010"]
    assert all(checkpoints.load(path) for path in checkpoints.listed(folder / WHERE))


def test_a_full_disk_is_told_and_three_times_in_a_row_end_the_run(
    recipe: Recipe, folder: Path, alone: Alone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, write = alone(recipe, "language", steps=12, save_every=2), checkpoints.write_tensors

    def full(path: Path, tensors: dict[str, Tensor], *notes: dict[str, str]) -> None:
        if "step-0000004" in str(path) or int(path.parent.name[-11:-4]) >= 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, tensors, *notes)

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(
        Unsaved, match=r"3 checkpoints in a row .*No space left on device.*each takes [\d,]+ bytes"
    ) as end:
        list(run(chosen, folder, workers=0))
    assert end.value.exit_code == 75
    err = capsys.readouterr().err
    assert [step for step in range(13) if f"could not save step {step} (No space" in err] == [4, 8, 10, 12]
    names = [path.name for path in checkpoints.listed(folder / "checkpoints" / "language")]
    assert names == ["step-0000002", "step-0000006"]


def test_metrics_on_a_full_disk_cost_lines_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path)
    metrics.write({"step": 1})
    kept, metrics.path = metrics.path, Path("/dev/full")
    metrics.write({"step": 2})
    metrics.write({"step": 3})
    assert capsys.readouterr().err == "/dev/full: No space left on device; training goes on without its metrics\n"
    metrics.path = kept
    metrics.write({"step": 4})
    assert kept.read_text() == '{"step": 1}\n{"step": 4}\n'


def test_a_disk_that_cannot_be_written_to_is_one_line(
    recipe: Recipe, fresh: Fresh, alone: Alone, disk: Callable[[int], Path]
) -> None:
    place = disk(4 << 20)
    folder = fresh(f"{place.name}/run")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    with pytest.raises(checkpoints.Busy, match=r"cannot be written to \(Read-only file system\)") as failure:
        losses(alone(recipe, "language"), folder)
    assert failure.value.exit_code == 73


# --------------------------------------------------------------------------------------------------- clocks and folders


def test_a_clock_that_goes_back_a_crowd_of_files_and_odd_names_change_nothing(
    recipe: Recipe, fresh: Fresh, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, folder = alone(recipe, "language"), fresh("läufe – 1 'x'/run $HOME\n*")
    whole, first = losses(chosen, fresh("whole")), []
    for step in run(chosen, folder, workers=0):
        first.append(step.loss)
        if step.step == 5:
            break
    for i in range(10_000):
        (folder / WHERE / f"file-{i}").touch()
    (folder / WHERE / "file-0.tmp").write_text("mine")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 86_400)
    for path in folder.rglob("step-*"):
        os.utime(path, (now() + 86_400 * (path.name == "step-0000002"), now()))
    assert losses(chosen, folder) == whole[4:] and first == whole[:5]
    assert [path.name for path in checkpoints.listed(folder / WHERE)] == ["step-0000004", "step-0000006"]
    assert len(list((folder / WHERE).glob("file-*"))) == 10_001


# ---------------------------------------------------------------------------------------------------------- no numbers


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_numbers_teach_nothing(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, alone: Alone, precision: str, value: float
) -> None:
    trainer, data = trainer_of(alone(recipe, "instruct", precision=precision), tmp_path, tokenizer)
    assert trainer.learn([data[0]]).applied
    before = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    batch: Batch = data[1]
    assert batch.patches is not None
    hurt = batch.patches.values.clone()
    hurt[1, 3] = value
    assert not trainer.learn([replace(batch, patches=replace(batch.patches, values=hurt))]).applied
    assert all(torch.equal(before[name], each) for name, each in trainer.model.state_dict().items())
    assert trainer.learn([data[2]]).applied


@pytest.mark.parametrize("name", ["decoder.norm.weight", "encoder.blocks.0.attention.query.weight"])
def test_weights_that_are_not_numbers_are_never_saved(
    recipe: Recipe, folder: Path, alone: Alone, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One that learns or is frozen, which the data may not even reach."""
    learn, chosen = Trainer.learn, alone(recipe, "language", save_every=2)

    def hurt(self: Trainer, micro: list[Batch]) -> object:
        step = learn(self, micro)
        if self.step == 4:
            found = dict(self.model.named_parameters())
            found.get(name, next(iter(found.values()))).data.view(-1)[0] = float("nan")
        return step

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "learn", hurt)
        with pytest.raises(NonFinite, match="step 4: weights are not numbers, such as ") as failure:
            losses(chosen, folder)
    assert failure.value.exit_code == 65
    (kept,) = checkpoints.listed(folder / WHERE)
    assert checkpoints.load(kept).state["step"] == 2
    assert len(losses(chosen, folder)) == 4  # started again it goes on from the good one


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0])
def test_rates_that_are_not_numbers_are_refused(recipe: Recipe, alone: Alone, rate: float) -> None:
    with pytest.raises(ConfigError, match="expected from 0 to 1000"):
        alone(recipe, "language", learn={"decoder.*": rate})


# --------------------------------------------------------------------------------------------------------------- memory


def narrow(monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """Let more rows at a time be too many for the memory; the rows of every attempt."""
    backward, tried = Trainer.backward, []

    def limited(self: Trainer, batch: Batch, counts: dict[str, int]) -> dict[str, Tensor]:
        tried.append(len(batch.ids))
        if tried[-1] > rows:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return backward(self, batch, counts)

    monkeypatch.setattr(Trainer, "backward", limited)
    return tried


@pytest.mark.parametrize("workers", [0, 1])
def test_too_little_memory_means_smaller_parts_of_the_same_steps(
    recipe: Recipe,
    fresh: Fresh,
    alone: Alone,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    chosen = alone(recipe, "language", batch=7, accumulate=2, optimizer="adamw")
    whole = losses(chosen, fresh("whole"))
    tried = narrow(monkeypatch, 2)
    found = losses(chosen, fresh("narrow"), workers)
    assert found == pytest.approx(whole, rel=1e-5)
    assert [rows for rows in tried if rows > 2] == [7, 3, 4][: len([rows for rows in tried if rows > 2])]
    assert sum(rows for rows in tried if rows <= 2) >= 6 * 14
    told = [line for line in capsys.readouterr().err.splitlines() if "too many for the memory" in line]
    assert told == [f"{a} samples at a time are too many for the memory; {b} from now on" for a, b in [(7, 4), (4, 2)]]


def test_what_will_not_fit_is_cut_before_any_of_it_is_computed(
    recipe: Recipe,
    fresh: Fresh,
    alone: Alone,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Room for two samples: one that is longer makes its part smaller, and only what fits is tried."""
    chosen = alone(recipe, "language", batch=8, optimizer="adamw", clip=1e9)
    whole = losses(chosen, fresh("whole"))
    tried = narrow(monkeypatch, 1000)
    measured, lasting = budget_of(chosen, chosen.stages[0]), 12 * learned(chosen)
    lengths: list[int] = []
    monkeypatch.setattr(Budget, "of", lambda self, batch: int(measured.text * max(1, len(batch.ids))))
    monkeypatch.setattr(budget, "room", lambda device: lengths.append(1) or lasting + 2.5 * measured.text)
    assert losses(chosen, fresh("narrow")) == pytest.approx(whole, rel=1e-5)
    assert set(tried) == {2} and len(lengths) == 2 * 2 + 1  # what has fitted once is not asked about again
    told = [line for line in capsys.readouterr().err.splitlines() if "from now on" in line]
    assert [line.split(" would")[0] for line in told] == ["8 samples at a time", "4 samples at a time"]
    assert all(re.search(r"would take [\d.]+ \w?B of memory, [\d.]+ \w?B are free; [42] from", line) for line in told)
    monkeypatch.setattr(budget, "room", lambda device: 0)
    with pytest.raises(CapacityError, match=r"1 samples at a time would take .* 0 B are free, and they cannot be cut"):
        losses(chosen, fresh("none"))


def learned(recipe: Recipe) -> int:
    model = initial_model(recipe)
    return sum(dict(model.named_parameters())[name].numel() for name in learning_rates(model, recipe.stages[0].learn))


def test_too_little_memory_for_what_cannot_be_cut(
    recipe: Recipe, fresh: Fresh, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch, 0)
    with pytest.raises(CapacityError, match=r"stage 'language': 1 samples at a time .* they cannot be cut further"):
        list(run(alone(recipe, "language"), fresh("one"), workers=0))
    pictures = alone(recipe, "encoder", objective={"clip": 1.0})
    monkeypatch.setattr(Trainer, "backward", out_of_memory)
    with pytest.raises(CapacityError, match=r"stage 'encoder': 2 samples at a time .* 'clip' needs them together"):
        list(run(pictures, fresh("two"), workers=0))


def out_of_memory(*_: object) -> None:
    raise MemoryError


@pytest.mark.slow
@pytest.mark.parametrize("room", [10, 20, 40])
def test_memory_that_the_system_refuses_means_smaller_parts(
    recipe: Recipe, fresh: Fresh, alone: Alone, capfd: pytest.CaptureFixture[str], room: int
) -> None:
    """A child may take so many MB more than it has after a step of two samples, too few for one of 512."""
    chosen = alone(recipe, "language", batch=512, steps=2, optimizer="adamw")
    whole, folder = losses(chosen, fresh("whole")), fresh("narrow")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            list(run(alone(recipe, "language", steps=1), fresh("small"), workers=0))
            ctypes.CDLL(None).malloc_trim(0)
            (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line]
            limit = (int(line.split()[1]) << 10) + (room << 20)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            code = 0 if losses(chosen, folder) == pytest.approx(whole, rel=1e-5) else 3
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    err = capfd.readouterr().err
    assert code == 0, err
    assert "512 samples at a time " in err and "; 256 from now on" in err
