"""The loop: what learns moves, what is frozen stays bit for bit, and a stopped run goes on as if it had not."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sightline.core.config import override
from sightline.core.errors import CheckpointError, ConfigError, SightlineError
from sightline.data.batch import Batch
from sightline.fusion.qformer import QFormerConfig
from sightline.grounding.heads import BoxHeadConfig
from sightline.language.tokenizer import Tokenizer
from sightline.training import checkpoints
from sightline.training.export import export
from sightline.training.loader import Batches, assemble
from sightline.training.objectives import Objective
from sightline.training.plan import plan
from sightline.training.recipe import Recipe
from sightline.training.run import final_model, initial_model, objective_of, processor_of, run
from sightline.training.settings import DEFAULTS, READS
from sightline.training.sources import FilesSource
from sightline.training.trainer import NonFinite, Step, Trainer
from sightline.zoo import own

Fresh = Callable[[str], Path]
Alone = Callable[..., Recipe]


def losses(steps: Iterator[Step]) -> list[tuple[str, int, float]]:
    return [(step.stage, step.step, step.loss) for step in steps]


def weights(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    return final_model(recipe, folder)[0].state_dict()


def trainer_of(recipe: Recipe, folder: Path, tokenizer: Tokenizer) -> tuple[Trainer, Batches]:
    """A trainer of the recipe's first stage that is driven by hand, and its batches."""
    stage, model = recipe.stages[0], initial_model(recipe)
    objective = objective_of(stage, recipe, tokenizer, model)
    data = Batches(stage, 0, recipe.seed, recipe.sources, processor_of(recipe, tokenizer, model))
    return Trainer(recipe, stage, model, objective, folder), data


# ------------------------------------------------------------------------------------------------------- the whole way


def test_every_stage_learns_and_starts_from_the_one_before(recipe: Recipe, folder: Path) -> None:
    done = list(run(recipe, folder, workers=0))
    assert [step.stage for step in done] == [s.name for s in recipe.stages for _ in range(s.steps)]
    assert all(step.applied and math.isfinite(step.loss) for step in done)
    for stage in recipe.stages:
        assert len(checkpoints.listed(folder / "checkpoints" / stage.name)) == 2
    states = [checkpoints.newest(folder / "checkpoints" / s.name, print) for s in recipe.stages]
    for stage, before, after in zip(recipe.stages[1:], states, states[1:], strict=False):
        assert before is not None and after is not None
        for name, value in after.tensors["model"].items():
            moved = not torch.equal(value, before.tensors["model"][name])
            assert moved == any(name.startswith(p.rstrip("*")) for p in stage.learn), (stage.name, name)
    assert list(run(recipe, folder, workers=0)) == []  # nothing is left to do


def test_loss_falls(recipe: Recipe, folder: Path, alone: Alone) -> None:
    done = list(run(alone(recipe, "language", steps=60, batch=4), folder, workers=0))
    assert sum(s.loss for s in done[-5:]) < 0.7 * sum(s.loss for s in done[:5])


def test_bf16_runs_with_float32_weights(recipe: Recipe, folder: Path, alone: Alone) -> None:
    chosen = alone(recipe, "instruct", precision="bf16")
    assert all(step.applied for step in run(chosen, folder, workers=0))
    assert {value.dtype for value in weights(chosen, folder).values()} == {torch.float32}


def test_metrics_recipe_and_surroundings_are_written(recipe: Recipe, folder: Path, alone: Alone) -> None:
    chosen = alone(recipe, "language")
    done = list(run(chosen, folder, workers=0, evaluate=lambda model: {"score": 0.5}))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == [step.loss for step in done]
    assert [row["step"] for row in rows if "scores" in row] == [2, 4, 6]
    assert (folder / "run.yaml").read_text().startswith("name: tiny\n")
    assert json.loads((folder / "env.json").read_text())["torch"] == torch.__version__


# ---------------------------------------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize("stop", [1, 2, 3, 6])
def test_a_stopped_run_goes_on_bit_for_bit(recipe: Recipe, fresh: Fresh, alone: Alone, stop: int) -> None:
    chosen = alone(recipe, "language", accumulate=2)
    whole = losses(run(chosen, fresh("whole"), workers=0))
    folder, first = fresh("stopped"), []
    for step in run(chosen, folder, workers=0):
        first.append((step.stage, step.step, step.loss))
        if step.step == stop:
            break  # as a kill would: the step is not saved
    saved = (stop - 1) // 2 * 2
    rest = losses(run(chosen, folder, workers=0))
    assert first == whole[:stop]
    assert rest == whole[saved:]
    one, other = weights(chosen, folder), weights(chosen, fresh("whole2").parent / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_worker_makes_the_same_batches(recipe: Recipe, fresh: Fresh, alone: Alone) -> None:
    chosen = alone(recipe, "instruct")
    assert losses(run(chosen, fresh("zero"), workers=0)) == losses(run(chosen, fresh("one"), workers=1))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_exits(
    recipe: Recipe, folder: Path, alone: Alone, number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = alone(recipe, "language", save_every=100)
    before = signal.getsignal(number)
    steps = (os.kill(os.getpid(), number) for step in run(chosen, folder, workers=0) if step.step == 3)
    with pytest.raises(SystemExit) as left:
        list(steps)
    assert left.value.code == code
    name = signal.Signals(number).name
    assert capsys.readouterr().err == (
        f"stopped by {name} after step 3 of stage 'language', saved in {folder}; the same command goes on\n"
    )
    assert signal.getsignal(number) is before
    assert [path.name for path in checkpoints.listed(folder / "checkpoints" / "language")] == ["step-0000003"]
    next(run(chosen, folder, workers=0))
    assert capsys.readouterr().err == "stage 'language' goes on from step 3\n"


def test_a_damaged_last_checkpoint_costs_steps_not_the_run(
    recipe: Recipe, fresh: Fresh, alone: Alone, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = alone(recipe, "language")
    folder = fresh("run")
    whole = losses(run(chosen, folder, workers=0))
    place = folder / "checkpoints" / "language"
    (place / "step-0000006" / "model.safetensors").write_bytes(b"")
    assert losses(run(chosen, folder, workers=0)) == whole[4:]
    assert "passed over a damaged checkpoint" in capsys.readouterr().err
    assert [path.name for path in checkpoints.listed(place)] == ["step-0000004", "step-0000006"]
    assert checkpoints.load(place / "step-0000006").state["step"] == 6


# ------------------------------------------------------------------------------------------------------------ one step


def test_two_halves_are_one_whole(recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, alone: Alone) -> None:
    """Text of uneven lengths in 2 micro-batches of 16 against 1 of 32: same loss, gradients and weights."""
    found = []
    for batch, accumulate in [(32, 1), (16, 2)]:
        chosen = alone(recipe, "language", batch=batch, accumulate=accumulate, optimizer="adamw")
        trainer, data = trainer_of(chosen, tmp_path, tokenizer)
        steps = [trainer.learn([data[k * accumulate + i] for i in range(accumulate)]) for k in range(3)]
        found.append((steps, trainer.model.state_dict()))
    (one, first), (two, second) = found
    for a, b in zip(one, two, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.norm == pytest.approx(b.norm, rel=1e-5)
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-5), name


def test_terms_are_divided_by_their_own_counts(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, alone: Alone
) -> None:
    """The dense terms of two halves, each with its own number of objects, are those of the whole."""
    chosen = alone(recipe, "encoder", objective={"dense": 1.0}, batch=4, accumulate=2)
    halves, data = trainer_of(chosen, tmp_path, tokenizer)
    split = halves.learn([data[0], data[1]])
    whole, joined = trainer_of(alone(recipe, "encoder", objective={"dense": 1.0}, batch=8), tmp_path, tokenizer)
    assert whole.learn([joined[0]]).terms == pytest.approx(split.terms, rel=1e-5)


class Broken(Objective):
    """An objective that is not a number at chosen calls, in value or only in its gradient."""

    def __init__(self, inner: Objective, when: set[int], where: str) -> None:
        super().__init__()
        self.inner, self.when, self.where, self.calls = inner, when, where, 0

    def counts(self, batch: Batch) -> dict[str, int]:
        return self.inner.counts(batch)

    def forward(self, model: torch.nn.Module, batch: Batch) -> dict[str, tuple[Tensor, int]]:
        terms = self.inner(model, batch)
        self.calls += 1
        if self.calls not in self.when:
            return terms
        if self.where == "loss":
            return {name: (total * float("nan"), count) for name, (total, count) in terms.items()}
        weight = next(p for p in model.parameters() if p.requires_grad)
        bad = torch.sqrt(weight.flatten()[0] * 0)  # zero, with an infinite gradient
        return {name: (total + bad, count) for name, (total, count) in terms.items()}


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_a_number_is_not_applied(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, alone: Alone, where: str, precision: str
) -> None:
    trainer, data = trainer_of(alone(recipe, "language", precision=precision), tmp_path, tokenizer)
    trainer.objective = Broken(trainer.objective, {2}, where)
    assert trainer.learn([data[0]]).applied
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    moments = {name: value.clone() for name, value in trainer.optimizers.tensors().items()}
    refused = trainer.learn([data[1]])
    assert not refused.applied and trainer.refused == 1 and trainer.step == 2
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    assert all(torch.equal(moments[name], value) for name, value in trainer.optimizers.tensors().items())
    assert trainer.learn([data[2]]).applied and trainer.refused == 0


def test_three_refused_steps_end_the_run_and_name_the_samples(
    recipe: Recipe, folder: Path, alone: Alone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sightline.training import run as module

    made = module.objective_of
    monkeypatch.setattr(module, "objective_of", lambda *a: Broken(made(*a), {4, 5, 6}, "loss"))
    chosen = alone(recipe, "language", steps=10)
    with pytest.raises(NonFinite, match=r"3 steps in a row .* scene 1000010") as failure:
        list(run(chosen, folder, workers=0))
    assert failure.value.exit_code == 65
    assert "step 4 not applied" in capsys.readouterr().err
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["applied"] for row in rows] == [True] * 3 + [False] * 3
    assert rows[-1]["loss"] is None and rows[-1]["terms"] == {"next-token": None}
    saved = checkpoints.newest(folder / "checkpoints" / "language", print)
    assert saved is not None
    assert all(torch.isfinite(value).all() for value in saved.tensors["model"].values())


def test_a_checkpoint_from_elsewhere_is_passed_over(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, alone: Alone, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, _ = trainer_of(alone(recipe, "language"), tmp_path / "a", tokenizer)
    mine.step = 2
    mine.save()
    for i, change in enumerate(["model.decoder.mlp=64", "stages.0.name=language2", "name=other"]):
        other, _ = trainer_of(override(alone(recipe, "language"), [change]), tmp_path / f"b{i}", tokenizer)
        other.save()
        shutil.copytree(other.saved / "step-0000000", mine.saved / f"step-000000{i + 3}")
    again, _ = trainer_of(alone(recipe, "language"), tmp_path / "a", tokenizer)
    assert again.resume() and again.step == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("passed over a checkpoint")]
    assert [line.split("(")[1].split()[0] for line in told] == ["recipe", "stage", "design"]


def test_what_is_frozen_has_no_gradient(recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, alone: Alone) -> None:
    trainer, data = trainer_of(alone(recipe, "align"), tmp_path, tokenizer)
    trainer.learn([data[0]])
    for name, parameter in trainer.model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("fusion."), name


def test_a_pattern_that_the_data_never_reaches_is_told(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, alone: Alone
) -> None:
    learn = {"encoder.*": 1e-4, "decoder.*": 1e-3}
    trainer, data = trainer_of(alone(recipe, "encoder", learn=learn), tmp_path, tokenizer)
    with pytest.raises(ConfigError, match=r"learns 'decoder\.\*', but its data and objective never reach it"):
        trainer.learn([data[0]])


def test_what_reads_pictures_is_checked_in_the_first_step_that_has_some(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, alone: Alone
) -> None:
    mixed = alone(recipe, "align", data={"text": 1.0, "questions": 1.0}, batch=2, optimizer="adamw")
    trainer, data = trainer_of(mixed, tmp_path, tokenizer)
    made = [data.made(k) for k in range(4)]
    words, both = [each for each in made if not each.example.pixels], [each for each in made if each.example.pixels]
    assert len(words) == len(both) == 2
    batches = [assemble(each, data.processor, "conversations") for each in (words, both)]
    before = trainer.model.fusion.layers[0].weight.clone()
    trainer.learn([batches[0]])
    assert not trainer.checked and torch.equal(trainer.model.fusion.layers[0].weight, before)
    trainer.learn([batches[1]])
    assert trainer.checked and not torch.equal(trainer.model.fusion.layers[0].weight, before)


def test_a_stage_whose_data_lacks_pictures_is_told_before_anything_begins(
    recipe: Recipe, fresh: Callable[[str], Path], alone: Alone, tmp_path: Path
) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    files = FilesSource(kind="conversations", format="openai", path=str(tmp_path / "rows.jsonl"))
    for name, source in (("rows", files), ("text", recipe.sources["text"])):
        chosen = alone(replace(recipe, sources={name: source}), "align", data={name: 1.0})
        told = rf"stage 'align' learns 'fusion\.\*', but there are no pictures in its data '{name}'"
        with pytest.raises(ConfigError, match=told):
            next(run(chosen, tmp_path / "run", workers=0))
        with pytest.raises(ConfigError, match=told):
            list(plan(chosen))
        assert not (tmp_path / "run").exists()


def test_of_a_table_of_words_only_some_rows_learn(
    recipe: Recipe, fresh: Callable[[str], Path], tokenizer: Tokenizer, alone: Alone
) -> None:
    """OpenFlamingo's; all else that the stage names learns as before."""
    ends = ("<eos>", "<user>")
    chosen = alone(recipe, "language", optimizer="adamw", weight_decay=0.1, trainable_tokens=ends)
    folder = fresh("run")
    list(run(chosen, folder, workers=0))
    before, after = initial_model(chosen).state_dict(), weights(chosen, folder)
    moved = (after["decoder.embedding.weight"] != before["decoder.embedding.weight"]).any(1).nonzero()[:, 0]
    assert set(moved.tolist()) == {tokenizer.control(name) for name in ends}
    assert not torch.equal(after["decoder.norm.weight"], before["decoder.norm.weight"])
    with pytest.raises(ConfigError, match="has trainable_tokens, but no table of words learns"):
        next(run(alone(recipe, "align", trainable_tokens=ends), fresh("align")))
    with pytest.raises(ConfigError, match="no control token '<oes>'; did you mean '<eos>'"):
        next(run(alone(recipe, "language", trainable_tokens=("<oes>",)), fresh("wrong")))


def test_a_frozen_parameter_with_a_gradient_is_told(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, alone: Alone
) -> None:
    trainer, data = trainer_of(alone(recipe, "align"), tmp_path, tokenizer)
    trainer.model.decoder.norm.weight.requires_grad_(True)
    with pytest.raises(SightlineError, match=r"frozen parameter 'decoder\.norm\.weight' got a gradient"):
        trainer.learn([data[0]])


# -------------------------------------------------------------------------------------------------------- wrong folders


def test_a_recipe_without_stages_is_told(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no stages, expected one at least"):
        next(run(replace(recipe, stages=()), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_later_stage_waits_for_the_one_before(recipe: Recipe, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="stage 'encoder' is not finished; train it before 'language'"):
        list(run(recipe, folder, "language", workers=0))


def test_a_run_goes_on_only_as_it_began(recipe: Recipe, folder: Path, alone: Alone) -> None:
    chosen = alone(recipe, "language")
    next(iter(run(chosen, folder, workers=0)))
    (folder / "tokenizer" / "kept").touch()
    next(iter(run(override(chosen, ["stages.0.steps=4", "max_length=400"]), folder, workers=0)))
    list(run(override(chosen, ["stages.0.steps=4"]), folder, workers=0))  # nothing was saved yet: all may change
    assert (folder / "tokenizer" / "kept").exists()  # which hangs on neither
    list(run(override(chosen, ["stages.0.steps=4", "stages.0.save_every=3"]), folder, workers=0))
    for change in ["stages.0.steps=8", "seed=1", "model.decoder.depth=2", "sources.text.turns=2"]:
        with pytest.raises(ConfigError, match="a run goes on only as it began"):
            list(run(override(chosen, ["stages.0.steps=4", change]), folder, workers=0))
    list(run(override(chosen, ["stages.0.steps=4", "sources.captions.first=3"]), folder, workers=0))  # not used yet


def test_a_checkpoint_of_another_model_is_told(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, alone: Alone
) -> None:
    trainer, _ = trainer_of(alone(recipe, "language"), tmp_path, tokenizer)
    trainer.save()
    other = override(alone(recipe, "language"), ["model.decoder.mlp=64"])
    stranger, _ = trainer_of(other, tmp_path, tokenizer)
    with pytest.raises(CheckpointError, match="belongs to another model or stage"):
        stranger.resume()


def test_pictures_and_conversations_do_not_mix(recipe: Recipe, folder: Path, alone: Alone) -> None:
    for data in ({"pictures": 1.0}, {"pictures": 1.0, "text": 1.0}):
        with pytest.raises(ConfigError, match=r"reads (conversations and )?pictures, its objective learns from"):
            list(run(alone(recipe, "language", data=data), folder, workers=0))
    with pytest.raises(ConfigError, match="has no source 'txet'; did you mean 'text'"):
        list(run(replace(alone(recipe, "language", data={"txet": 1.0})), folder, workers=0))


# --------------------------------------------------------------------------------------------- starting from a folder


def test_a_run_starts_from_a_model_folder(recipe: Recipe, fresh: Callable[[str], Path], tmp_path: Path) -> None:
    """A later stage alone, from what another run exported; its tokenizer comes along."""
    first = fresh("first")
    begun = replace(recipe, stages=recipe.stages[:2])
    for _ in run(begun, first, workers=0):
        pass
    exported = export(begun, first, tmp_path / "model")
    shutil.rmtree(first)
    later = replace(recipe, start=str(exported))
    folder = tmp_path / "later"
    steps = list(run(later, folder, "align", workers=0))
    assert (steps[0].stage, steps[0].step) == ("align", 1)
    kept = checkpoints.newest(folder / "checkpoints" / "align", print)
    wanted = own.load_model(exported).state_dict()
    assert kept is not None
    same = [name for name, tensor in wanted.items() if torch.equal(kept.tensors["model"][name], tensor)]
    assert set(same) >= {name for name in wanted if not name.startswith("fusion.")}
    theirs = (exported / "tokenizer.json").read_text()
    assert (folder / "tokenizer" / "tokenizer.json").read_text() == theirs


def test_a_start_of_another_design_is_refused(recipe: Recipe, folder: Path, tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="of another design than recipe 'tiny'"):
        next(run(replace(recipe, start=str(tiny_folder)), folder, "align", workers=0))


# ---------------------------------------------------------------------------------------------------- every objective


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(READS))
def test_every_objective_trains(recipe: Recipe, folder: Path, name: str, precision: str) -> None:
    form = READS[name]
    source = {"pictures": "pictures", "conversations": "questions"}.get(form, "pairs")
    part = "fusion" if name in ("words", "qformer") else "encoder" if form == "pictures" else "decoder"
    objective: object = {name: 1.0}
    if name in ("ppo", "grpo"):
        objective = replace(DEFAULTS[name], max_new_tokens=4)
    stage = replace(recipe.stages[0], name=name, learn={f"{part}.*": 1e-3}, data={source: 1.0}, steps=2)
    head = BoxHeadConfig(recipe.model.decoder.width, hidden=16) if name == "box-head" else None
    model = replace(recipe.model, box_head=head)
    if name == "qformer":
        fusion = QFormerConfig(inputs=16, width=24, queries=3, hidden=8, depth=2, heads=2, mlp=16)
        model = replace(model, fusion=fusion)
    chosen = replace(recipe, model=model, stages=(replace(stage, objective=objective, precision=precision),))
    done = list(run(chosen, folder, workers=0))
    assert len(done) == 2 and all(step.applied and math.isfinite(step.loss) for step in done)
