"""Several processes are one run: what it learns does not hang on their number, and none is ever waited for in vain."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sightline.core.config import save_yaml
from sightline.core.errors import CapacityError, ConfigError
from sightline.fusion.qformer import QFormerConfig
from sightline.language.tokenizer import Tokenizer
from sightline.training import budget, checkpoints, distributed
from sightline.training.adapters import Lora
from sightline.training.budget import Budget
from sightline.training.loader import Batches, Share
from sightline.training.recipe import Recipe
from sightline.training.run import final_model, initial_model, objective_of, processor_of, run
from sightline.training.settings import DEFAULTS
from sightline.training.trainer import Trainer

Fresh = Callable[[str], Path]
Alone = Callable[..., Recipe]
Launch = Callable[..., list[int]]
Pretended = Callable[..., None]
EVERYTHING = {"encoder.*": 1e-3, "fusion.*": 1e-2, "decoder.*": 1e-3}
MIXED = {"text": 1.0, "questions": 1.0}  # in turn, so that of two processes one has pictures and the other none


def ended(processes: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def trained(recipe: Recipe, folder: Path, launch: Launch, count: int = 2, shard: bool = False) -> None:
    """A run of so many processes in a folder."""

    def work() -> None:
        for _ in run(recipe, folder, workers=0, shard=shard):
            pass

    assert ended(launch(work, count)) == [0] * count


def trace(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def looked(folder: Path) -> list[dict[str, float]]:
    """What the guard found."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["guard"] for row in rows if "guard" in row]


def steps_of(folder: Path) -> list[float]:
    """Losses of steps, where other lines are among them."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def weights(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    return final_model(recipe, folder)[0].state_dict()


def assert_alike(recipe: Recipe, one: Path, other: Path, within: float, besides: str = "") -> None:
    """Losses and weights, without those of a name; a bound of zero asks for the same bits."""
    assert trace(one) == pytest.approx(trace(other), rel=within, abs=0)
    mine, theirs = weights(recipe, one), weights(recipe, other)
    for name, value in mine.items():
        if besides and name.endswith(besides):
            continue
        assert (value - theirs[name]).abs().max() <= within, name


STAGES = {
    "text": {"data": {"text": 1.0}, "learn": {"decoder.*": 1e-2}},
    "pictures on one only": {"data": MIXED, "learn": EVERYTHING},
    "projector only": {"data": MIXED, "learn": {"fusion.*": 1e-2}},
    "adapters": {"data": MIXED, "learn": {"decoder.blocks.*": Lora(4), "fusion.*": 1e-2}},
    "in larger steps": {"data": MIXED, "learn": EVERYTHING, "accumulate": 3, "batch": 4},
    "groups": {"data": MIXED, "learn": EVERYTHING, "group": 3, "batch": 4},
    "recomputed, packed": {"data": MIXED, "learn": EVERYTHING, "recompute": True, "packing": 300, "batch": 4},
    "preferences": {"data": {"pairs": 1.0}, "objective": {"dpo": 1.0}, "learn": {"decoder.*": 1e-3}},
    "some rows of words": {"data": MIXED, "learn": {"decoder.*": 1e-2}, "trainable_tokens": ("<eos>", "<user>")},
    "a term for each source": {"data": MIXED, "learn": EVERYTHING, "loss_weights": {"text": 1.0, "questions": 0.2}},
    "odds": {"data": {"pairs": 1.0}, "objective": {"orpo": 1.0}, "learn": {"decoder.*": 1e-3}},
    "judged": {"data": {"pairs": 1.0}, "objective": {"kto": 1.0}, "learn": {"decoder.*": 1e-3}, "accumulate": 2},
    "a reward model": {"data": {"pairs": 1.0}, "objective": {"reward": 1.0}, "learn": {"decoder.*": 1e-3}},
    "matching": {
        "data": {"pictures": 1.0},
        "objective": {"qformer": 1.0},
        "learn": {"encoder.*": 1e-4, "fusion.*": 1e-4},  # biases of keys have no gradient but what is rounded
        "accumulate": 2,
    },
}
QFORMER = QFormerConfig(inputs=16, width=24, queries=4, hidden=16, heads=2, mlp=32, depth=2)


def within(name: str) -> float:
    """How near; rows of other lengths, as packing makes them of fewer samples, are rounded otherwise."""
    return 1e-5 if "packed" in name else 1e-6


def stage_of(recipe: Recipe, alone: Alone, name: str) -> Recipe:
    if name == "matching":
        recipe = replace(recipe, model=replace(recipe.model, fusion=QFORMER))
    return alone(recipe, "instruct", **({"steps": 4, "objective": {"next-token": 1.0}} | STAGES[name]))


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_are_one(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch, name: str) -> None:
    chosen, one, two = stage_of(recipe, alone, name), fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    trained(chosen, two, launch)
    assert_alike(chosen, two, one, within(name))


@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_every_process_samples_its_part_of_the_answers(
    recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch, objective: str
) -> None:
    settings = replace(DEFAULTS[objective], max_new_tokens=6)
    chosen = alone(recipe, "language", data={"pairs": 1.0}, objective=settings, optimizer="adamw", batch=4, steps=1)
    one, two = fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    trained(chosen, two, launch)
    mine, theirs = (json.loads((folder / "metrics.jsonl").read_text()) for folder in (one, two))
    assert mine["notes"] == pytest.approx(theirs["notes"], rel=1e-6)
    assert mine["terms"] == pytest.approx(theirs["terms"], rel=1e-5, abs=1e-6)
    assert mine["norm"] == pytest.approx(theirs["norm"], rel=1e-4, abs=1e-6)


def test_micro_batches_of_their_own_are_summed_bit_for_bit(
    recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch
) -> None:
    """Two micro-batches a step, on one process or one on each of two, contrast over a micro-batch among them."""
    chosen, one, two = alone(recipe, "encoder", accumulate=2), fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    trained(chosen, two, launch)
    assert_alike(chosen, two, one, 0)


CONTRASTS = {
    "clip": {"objective": {"clip": 1.0}},
    "siglip": {"objective": {"siglip": 1.0}},
    "matching": {"objective": {"itm": 1.0}},
    "matching by a Q-Former": {"objective": {"itm": 1.0}, "learn": {"encoder.*": 1e-3, "fusion.*": 1e-3}},
    "representation": {"objective": {"qformer": 1.0}, "learn": {"encoder.*": 1e-3, "fusion.[qnl]*": 1e-3}},
}


def contrast_of(recipe: Recipe, alone: Alone, name: str, **more: object) -> Recipe:
    """A stage whose loss compares the pairs of a micro-batch, none of which any process has whole."""
    fusion = QFormerConfig(inputs=16, width=24, queries=3, hidden=8, depth=2, heads=2, mlp=16)
    reads = replace(fusion, vocab_size=480, max_length=64)
    fusions = {"representation": fusion, "matching by a Q-Former": reads}
    chosen = replace(recipe, model=replace(recipe.model, fusion=fusions.get(name, recipe.model.fusion)))
    usual = {"learn": {"encoder.*": 1e-3}, "steps": 3, "batch": 4, "optimizer": "adamw"}
    return alone(chosen, "encoder", **(usual | CONTRASTS[name] | more))


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("name", CONTRASTS)
def test_contrast_is_over_all_processes(
    recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch, name: str, shard: bool
) -> None:
    """Each of two has half of the pairs and compares them with all: losses and weights of one that has them all.

    Biases of keys change nothing that is computed: their gradients are rounding, of which Adam makes whole steps.
    """
    chosen, one, two = contrast_of(recipe, alone, name), fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    trained(chosen, two, launch, shard=shard)
    assert_alike(chosen, two, one, 1e-6, besides=".k.bias")


def test_contrast_in_bf16_stays_near(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch) -> None:
    chosen, one, two = contrast_of(recipe, alone, "representation", precision="bf16"), fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    trained(chosen, two, launch)
    assert trace(two) == pytest.approx(trace(one), rel=0.02)


def test_contrast_is_over_those_that_share_a_micro_batch(
    recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch
) -> None:
    """Of four processes the first and the third have one of two micro-batches."""
    chosen, one, four = contrast_of(recipe, alone, "clip", accumulate=2), fresh("one"), fresh("four")
    list(run(chosen, one, workers=0))
    trained(chosen, four, launch, count=4)
    assert_alike(chosen, four, one, 1e-6, besides=".k.bias")


def test_another_number_of_processes_goes_on(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch) -> None:
    chosen, whole, folder = alone(recipe, "language", batch=4, optimizer="muon"), fresh("whole"), fresh("elastic")
    list(run(chosen, whole, workers=0))
    for step in run(chosen, folder, workers=0):
        if step.step == 3:  # of which two are saved
            break
    trained(chosen, folder, launch, count=4)
    assert trace(folder)[3:] == pytest.approx(trace(whole)[2:], rel=1e-5)  # Muon makes more of a last bit


# -------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("name", STAGES)
def test_shards_are_the_whole(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch, name: str) -> None:
    chosen, one, two = stage_of(recipe, alone, name), fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    trained(chosen, two, launch, shard=True)
    assert_alike(chosen, two, one, within(name))


def test_shards_are_read_by_any_number_of_processes(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch) -> None:
    """One saves, three go on and save in shards, one reads: the same bits; then two go on from the three's."""
    chosen, folder = alone(recipe, "instruct", batch=6, learn=EVERYTHING, data=MIXED, steps=2), fresh("run")
    list(run(chosen, folder, workers=0))
    place = folder / "checkpoints" / "instruct"
    before = checkpoints.load(place / "step-0000002")

    def again() -> None:
        Trainer.run = saved_again  # type: ignore[method-assign,assignment]
        list(run(replace(chosen, stages=(replace(chosen.stages[0], steps=3),)), folder, workers=0, shard=True))

    def saved_again(self: object, *_: object) -> list[object]:
        self.save()  # type: ignore[attr-defined]
        return []

    (folder / "run.yaml").unlink()  # which would not let a stage become longer
    for count in (3, 2):
        assert ended(launch(again, count)) == [0] * count
        assert len(list((place / "step-0000002").glob(f"model.*-of-{count}.safetensors"))) == count
        after = checkpoints.load(place / "step-0000002")
        for group in ("model", "optimizer"):
            assert after.tensors[group].keys() == before.tensors[group].keys()
            for key, value in before.tensors[group].items():
                assert torch.equal(after.tensors[group][key], value), key


def test_a_damaged_shard_costs_steps_and_a_missing_one_too(
    recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch
) -> None:
    chosen, folder = alone(recipe, "align", learn={"fusion.*": 1e-2}, data=MIXED), fresh("run")
    trained(chosen, folder, launch, shard=True)
    whole, place = trace(folder), folder / "checkpoints" / "align"
    (place / "step-0000006" / "optimizer.1-of-2.safetensors").unlink()
    trained(chosen, folder, launch, shard=True)
    assert trace(folder) == whole + whole[4:]


def test_in_shards_a_model_is_looked_after_as_one(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch) -> None:
    """The same losses with, without and with other pictures, and no step is another for it."""
    chosen = alone(recipe, "instruct", data=MIXED, learn=EVERYTHING, guard_every=2, save_every=2)
    one, two = fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    trained(chosen, two, launch, shard=True)
    mine, theirs = looked(two), looked(one)
    assert [row.pop("sees") for row in mine] == [row.pop("sees") for row in theirs] and len(mine) == 3
    for own, other in zip(mine, theirs, strict=True):
        assert own == pytest.approx(other, rel=1e-5)
        assert len(set(own.values())) == 3
    assert steps_of(two) == pytest.approx(steps_of(one), rel=1e-6)


@pytest.mark.parametrize("full", [1, 0])
def test_a_disk_that_is_full_for_one_costs_all_of_them_a_checkpoint(
    recipe: Recipe,
    fresh: Fresh,
    alone: Alone,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    full: int,
) -> None:
    """Whichever cannot write its part: told once, the last good one stays, and after three the run ends."""
    folder, chosen = fresh("run"), alone(recipe, "instruct", data=MIXED, steps=20, save_every=2)
    write = checkpoints.write_tensors

    def limited(path: Path, *given: object) -> None:
        if distributed.rank() == full and int(path.parent.name[-11:-4]) not in (2, 6):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "write_tensors", limited)
    processes = launch(lambda: deque(run(chosen, folder, workers=0, shard=True), maxlen=0).clear())
    assert ended(processes) == [75, 75]
    told = capfd.readouterr().err
    for step in (4, 8, 10, 12):
        assert told.count(f"could not save step {step} (No space left on device)") == 1
    place = folder / "checkpoints" / "instruct"
    assert [path.name for path in checkpoints.listed(place)] == ["step-0000002", "step-0000006"]
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("short", [0, 1])
def test_where_one_will_lack_memory_all_cut_their_samples(
    recipe: Recipe,
    fresh: Fresh,
    alone: Alone,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    short: int,
) -> None:
    chosen, one, two = alone(recipe, "instruct", data=MIXED, batch=8, steps=3), fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    monkeypatch.setattr(Budget, "of", lambda self, batch: len(batch.ids) << 40)
    monkeypatch.setattr(budget, "room", lambda device: 2.5 * 2**40 if distributed.rank() == short else 1e18)
    trained(chosen, two, launch, shard=True)
    assert_alike(chosen, two, one, 1e-5)
    told = [line for line in capfd.readouterr().err.splitlines() if "from now on" in line]
    why = (
        "are too many for the memory of another process" if short else "would take 4.40 TB of memory, 2.75 TB are free"
    )
    assert told == [f"4 samples at a time {why}; 2 from now on"]


def test_a_pass_in_shards_that_lacks_memory_ends_with_a_line(
    recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, chosen = fresh("run"), alone(recipe, "instruct", data=MIXED, batch=4)

    def work() -> None:
        if distributed.rank() == 1:

            def backward(self: Trainer, *_: object) -> None:
                raise MemoryError

            Trainer.backward = backward  # type: ignore[method-assign,assignment]
        list(run(chosen, folder, workers=0, shard=True))

    lost, short = ended(launch(work))
    assert short == CapacityError.exit_code and lost == distributed.Lost.exit_code
    told = capfd.readouterr().err
    assert "2 samples at a time are too many for the memory, and a pass in shards cannot be begun again" in told
    assert "error: rank 1 of 2 is gone, rank 0 waited for it in " in told


def test_a_reference_is_in_shards_as_well(
    recipe: Recipe, tokenizer: Tokenizer, alone: Alone, pretended: Pretended
) -> None:
    from torch.distributed.tensor import DTensor

    chosen = alone(recipe, "instruct", data={"pairs": 1.0}, objective={"dpo": 1.0}, batch=4)

    def work() -> None:
        model = initial_model(chosen)
        objective = objective_of(chosen.stages[0], chosen, tokenizer, model)
        Trainer(chosen, chosen.stages[0], model, objective, Path("nowhere"), shard=True)
        scorer = objective.terms["dpo"].reference.scorer  # type: ignore[union-attr]
        for name, p in scorer.named_parameters():
            assert isinstance(p, DTensor) and p.to_local().numel() <= -(-p.shape[0] // 4) * p[0].numel(), name
        assert not [name for name in objective.state_dict() if "reference" in name]

    pretended(work, 1, 4)


def test_in_bf16_shards_stay_near_the_whole(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch) -> None:
    chosen, one, two = alone(recipe, "instruct", data=MIXED, precision="bf16"), fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    trained(chosen, two, launch, shard=True)
    assert trace(two) == pytest.approx(trace(one), rel=0.02)
    assert {value.dtype for value in weights(chosen, two).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer": "muon"}, "learns by muon, which needs whole matrices"),
        ({"objective": {"dino": 1.0}, "data": {"pictures": 1.0}}, "'dino' runs its model by itself"),
        ({"objective": {"grpo": 1.0}, "data": {"pairs": 1.0}}, "'grpo' runs its model by itself"),
        ({}, "shards are of several processes"),
    ],
)
def test_what_cannot_be_in_shards_is_told(
    recipe: Recipe, folder: Path, alone: Alone, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        list(run(alone(recipe, "instruct", **changes), folder, shard=True))


# --------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_every_sample_of_a_step_has_one_process(recipe: Recipe, size: int) -> None:
    stage = replace(recipe.stages[1], batch=6, accumulate=4)
    for pieces in (1, 2):
        shares = [Share(rank, size, pieces) for rank in range(size)]
        for k in (0, 1, 2, 3, 7):
            found = [j for share in shares for low, high in share.cuts(stage, k) for j in range(low, high)]
            assert sorted(found) == list(range(6))
        counts = [sum(b - a for k in range(4) for a, b in share.cuts(stage, k)) for share in shares]
        assert counts == [24 // size] * size
        assert {share.per_step(stage) for share in shares} and max(share.largest(stage) for share in shares) <= 6


def test_what_cannot_be_shared_is_told(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="5 processes cannot share 12 samples of a step alike"):
        Share(0, 5).check(replace(recipe.stages[1], batch=6, accumulate=2))
    kto = replace(recipe.stages[1], data={"pairs": 1.0}, objective={"kto": 1.0}, batch=8)
    with pytest.raises(ConfigError, match=r"'kto' compares the samples .* set accumulate to a multiple of 4"):
        Share(0, 4).check(replace(kto, accumulate=2))
    Share(0, 4).check(replace(kto, accumulate=4))


def test_alone_nothing_is_shared() -> None:
    assert (distributed.rank(), distributed.size(), distributed.first()) == (0, 1, True)
    assert distributed.gathered({"a": [1]}) == [{"a": [1]}] and distributed.most(3) == 3
    assert distributed.summed(torch.ones(2)).tolist() == [1, 1]


# ------------------------------------------------------------------------------------------- what happens to a process


def running(folder: Path, steps: int, within: float = 60.0) -> None:
    """Wait until so many steps are in a run's metrics."""
    path, until = folder / "metrics.jsonl", time.monotonic() + within
    while not path.exists() or path.read_text().count("\n") < steps:
        assert time.monotonic() < until, "no steps"
        time.sleep(0.01)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_is_one_to_all(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch, asked: int) -> None:
    folder, chosen = fresh("run"), alone(recipe, "language", steps=100_000, save_every=100_000)

    def work() -> None:
        list(run(chosen, folder, workers=0))

    processes = launch(work)
    running(folder, 3)
    os.kill(processes[asked], signal.SIGTERM)
    assert ended(processes) == [143, 143]
    (saved,) = checkpoints.listed(folder / "checkpoints" / "language")
    assert checkpoints.load(saved).state["step"] == len(trace(folder))


@pytest.mark.parametrize("dead", [0, 1])
def test_the_others_of_a_process_that_dies_end_and_name_it(
    recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch, capfd: pytest.CaptureFixture[str], dead: int
) -> None:
    folder, chosen = fresh("run"), alone(recipe, "language", steps=100_000)

    def work() -> None:
        list(run(chosen, folder, workers=0))

    processes = launch(work)
    running(folder, 3)
    os.kill(processes[dead], signal.SIGKILL)
    began = time.monotonic()
    codes = ended(processes)
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] == distributed.Lost.exit_code
    told = f"error: rank {dead} of 2 is gone, rank {1 - dead} waited for it in all_"
    assert told in capfd.readouterr().err
    assert time.monotonic() - began < 20
    assert checkpoints.newest(folder / "checkpoints" / "language", print) is not None


def test_of_many_the_one_that_is_gone_is_named(
    recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those that waited for others, which left, do not name these."""
    folder, chosen = fresh("run"), alone(recipe, "language", batch=4, steps=100_000)

    def work() -> None:
        list(run(chosen, folder, workers=0))

    processes = launch(work, 4)
    running(folder, 3)
    os.kill(processes[2], signal.SIGKILL)
    codes = ended(processes)
    assert codes[2] == -signal.SIGKILL and {codes[k] for k in (0, 1, 3)} == {75}
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: rank")]
    assert len(lines) == 3 and all(line.startswith("error: rank 2 of 4 is gone, rank ") for line in lines), lines


def test_nan_on_one_process_is_refused_on_all(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch) -> None:
    folder, chosen = fresh("run"), alone(recipe, "language", steps=3)

    def work() -> None:
        backward = Trainer.backward

        def broken(self: Trainer, batch: object, counts: object) -> dict[str, Tensor]:
            found = backward(self, batch, counts)  # type: ignore[arg-type]
            if distributed.rank() == 1 and self.step == 1:
                next(p for p in self.parameters.values() if p.grad is not None).grad.fill_(float("nan"))  # type: ignore[union-attr]
            return found

        Trainer.backward = broken  # type: ignore[method-assign,assignment]
        applied = [step.applied for step in run(chosen, folder, workers=0)]
        assert applied == [True, False, True]

    assert ended(launch(work)) == [0, 0]
    assert all(torch.isfinite(value).all() for value in weights(chosen, folder).values())


def test_a_folder_in_use_ends_all_with_one_line(
    recipe: Recipe, folder: Path, alone: Alone, launch: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    with checkpoints.locked(folder):
        processes = launch(lambda: list(run(alone(recipe, "language"), folder, workers=0)))  # type: ignore[arg-type,return-value]
        assert 0 not in ended(processes)
    assert capfd.readouterr().err.count("is at work in it\n") == 1


# ---------------------------------------------------------------------------------------------------------- 1,024 ranks


@pytest.mark.parametrize("rank", [0, 1, 1023])
def test_a_thousand_processes_on_a_backend_that_only_pretends(
    recipe: Recipe, tokenizer: Tokenizer, alone: Alone, rank: int, pretended: Pretended
) -> None:
    """A step in shards as one of 1,024 processes sees it: its sample, and its rows of every weight."""
    chosen = alone(recipe, "instruct", batch=256, accumulate=8, learn=EVERYTHING)
    stage = chosen.stages[0]
    every = [(k, low, high) for r in range(1024) for k in range(8) for low, high in Share(r, 1024).cuts(stage, k)]
    assert sorted(every) == [(k, low, low + 2) for k in range(8) for low in range(0, 256, 2)]

    def work() -> None:
        share = Share(rank, 1024)
        share.check(stage)
        parts = {k: share.cuts(stage, k) for k in range(8) if share.cuts(stage, k)}
        part = rank // 8
        assert parts == {rank % 8: [(2 * part, 2 * part + 2)]}
        model = initial_model(chosen)
        whole = {name: tuple(p.shape) for name, p in model.named_parameters()}
        objective = objective_of(stage, chosen, tokenizer, model)
        made = Trainer(chosen, stage, model, objective, Path("nowhere"), shard=True)
        for name, parameter in made.model.named_parameters():
            rows = -(-whole[name][0] // 1024)  # as torch.chunk cuts
            mine = max(0, min(rows, whole[name][0] - rank * rows))
            assert tuple(parameter.to_local().shape) == (mine, *whole[name][1:]), name  # type: ignore[attr-defined]
        data = Batches(stage, 0, 0, chosen.sources, processor_of(chosen, tokenizer, model), share)
        made.learn(data.together([rank % 8]))  # what others would say is missing, so that its numbers mean nothing
        assert made.step == 1
        for name, parameter in made.parameters.items():
            assert parameter.grad is None or parameter.grad.shape == parameter.shape, name

    pretended(work, rank, 1024)


# ------------------------------------------------------------------------------------------------------------- torchrun


def test_torchrun_trains(recipe: Recipe, fresh: Fresh, alone: Alone, tmp_path: Path) -> None:
    chosen, folder = alone(recipe, "instruct", data=MIXED, steps=2), fresh("run")
    save_yaml(chosen, tmp_path / "tiny.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "sightline.train", str(tmp_path / "tiny.yaml"), "--folder", str(folder), "--shard"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "model")
    assert len(trace(folder)) == 2 and (folder / "model" / "model.safetensors").exists()
