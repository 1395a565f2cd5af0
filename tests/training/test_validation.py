"""The loss on other data than what is learned: right, the same whoever computes it, and without a trace in training."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sightline.core.errors import ConfigError, SightlineError
from sightline.fusion.qformer import QFormerConfig
from sightline.language.tokenizer import Tokenizer
from sightline.training.adapters import Lora
from sightline.training.features import FeatureStore
from sightline.training.loader import Batches
from sightline.training.pace import Pace
from sightline.training.plan import plan
from sightline.training.recipe import Recipe
from sightline.training.records import Metrics
from sightline.training.report import report, scalars
from sightline.training.run import final_model, initial_model, objective_of, processor_of, run
from sightline.training.sources import FilesSource
from sightline.training.trainer import EVAL, Trainer
from sightline.training.validation import Validation

Alone = Callable[..., Recipe]
Fresh = Callable[[str], Path]
Launch = Callable[..., list[int]]
MIXED = {"text": 1.0, "questions": 1.0}
EVERYTHING = {"encoder.*": 1e-3, "fusion.*": 1e-2, "decoder.*": 1e-3}
QFORMER = QFormerConfig(inputs=16, width=24, queries=4, hidden=16, heads=2, mlp=32, depth=2)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def looks(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if "eval" in row]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


STAGES: dict[str, dict[str, Any]] = {
    "next token": {},
    "packed, dropout": {"packing": 300, "dropout": 0.1, "batch": 4},
    "answers": {"objective": {"answers": 1.0}},
    "adapters": {"learn": {"decoder.blocks.*": Lora(4, dropout=0.2), "fusion.*": 1e-2}},
    "dpo": {"data": {"pairs": 1.0}, "objective": {"dpo": 1.0}, "learn": {"decoder.*": 1e-2}},
    "kto": {"data": {"pairs": 1.0}, "objective": {"kto": 1.0}, "learn": {"decoder.*": 1e-2}, "accumulate": 2},
    "reward": {"data": {"pairs": 1.0}, "objective": {"reward": 1.0}, "learn": {"decoder.*": 1e-2}},
    "contrast": {"data": {"pictures": 1.0}, "objective": {"siglip": 1.0, "dense": 1.0}, "learn": {"encoder.*": 1e-2}},
    "matching": {
        "data": {"pictures": 1.0},
        "objective": {"qformer": 1.0},
        "learn": {"encoder.*": 1e-4, "fusion.*": 1e-4},
        "batch": 4,
    },
}


def stage_of(recipe: Recipe, alone: Alone, name: str, **more: Any) -> Recipe:
    if name == "matching":
        recipe = replace(recipe, model=replace(recipe.model, fusion=QFORMER))
    usual = {"steps": 4, "eval_data": STAGES[name].get("data", MIXED), "eval_every": 2, "eval_samples": 9}
    return alone(recipe, "instruct", **(usual | {"data": MIXED, "learn": EVERYTHING} | STAGES[name] | more))


@pytest.mark.parametrize("name", STAGES)
def test_it_leaves_no_trace_in_training(recipe: Recipe, fresh: Fresh, alone: Alone, name: str) -> None:
    """The same losses and weights, bit for bit, and lines in between, of numbers that training changes."""
    chosen, one, other = stage_of(recipe, alone, name), fresh("one"), fresh("other")
    list(run(chosen, one, workers=0))
    list(run(replace(chosen, stages=(replace(chosen.stages[0], eval_data={}, eval_every=0),)), other, workers=0))
    assert losses(one) == losses(other)
    mine, theirs = (final_model(chosen, folder)[0].state_dict() for folder in (one, other))
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    found = looks(one)
    assert [(row["stage"], row["step"]) for row in found] == [("instruct", 2), ("instruct", 4)] and not looks(other)
    assert found[0]["eval"]["loss"] != found[1]["eval"]["loss"]
    for row in found:
        assert row["eval"]["loss"] == pytest.approx(sum(row["eval"]["terms"].values()))


@pytest.mark.parametrize("name", ["next token", "packed, dropout", "answers", "reward"])
def test_it_is_the_objective_on_those_samples(
    recipe: Recipe, tokenizer: Tokenizer, folder: Path, alone: Alone, name: str
) -> None:
    """All in one batch, of a model in eval mode: the sum of the objective over its count."""
    chosen = stage_of(recipe, alone, name, eval_every=0)
    stage, model = chosen.stages[0], initial_model(chosen)
    trainer = Trainer(chosen, stage, model, objective_of(stage, chosen, tokenizer, model), folder)
    processor = processor_of(chosen, tokenizer, model)
    list(trainer.run(processor, workers=0))
    (row,) = looks(folder)
    assert row["step"] == stage.steps and model.training and trainer.objective.training
    (batch,) = Validation(stage, 0, chosen.seed, chosen.sources, processor).batches(9)
    assert len(set(batch.extra["names"])) == 9
    model.eval(), trainer.objective.eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        ((term, (total, count)),) = trainer.objective(model, batch).items()
    assert torch.equal(state, torch.get_rng_state())
    assert row["eval"] == {"loss": pytest.approx(float(total) / count), "terms": {term: row["eval"]["loss"]}}


@pytest.mark.parametrize("name", ["packed, dropout", "matching"])
def test_it_hangs_on_the_weights_alone(recipe: Recipe, folder: Path, alone: Alone, name: str) -> None:
    """While nothing moves every look is the same, whatever the chance of its step."""
    chosen = stage_of(recipe, alone, name)
    still = dict.fromkeys(chosen.stages[0].learn, 0.0)
    list(run(replace(chosen, stages=(replace(chosen.stages[0], learn=still, eval_every=1),)), folder, workers=0))
    assert len(looks(folder)) == 4 and len({str(row["eval"]) for row in looks(folder)}) == 1


def test_modes_and_chance_are_as_they_were(recipe: Recipe, tokenizer: Tokenizer, folder: Path, alone: Alone) -> None:
    chosen = stage_of(recipe, alone, "packed, dropout")
    stage, model = chosen.stages[0], initial_model(chosen)
    trainer = Trainer(chosen, stage, model, objective_of(stage, chosen, tokenizer, model), folder)
    model.fusion.eval()
    before = []

    def watched(self: Trainer, *given: Any) -> float:
        before.append(([module.training for module in model.modules()], torch.get_rng_state()))
        loss = validate(self, *given)
        modes, state = before[-1]
        assert modes == [module.training for module in model.modules()] and torch.equal(state, torch.get_rng_state())
        return loss

    validate = Trainer.validate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "validate", watched)
        list(trainer.run(processor_of(chosen, tokenizer, model), workers=0))
    assert len(before) == 2 and not model.fusion.training


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("name", ["next token", "dpo", "kto", "contrast", "matching"])
def test_two_processes_find_what_one_does(
    recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch, name: str, shard: bool
) -> None:
    chosen, one, two = stage_of(recipe, alone, name), fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    processes = launch(lambda: list(run(chosen, two, workers=0, shard=shard)) and None)
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0]
    mine, theirs = looks(two), looks(one)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs] == [2, 4]
    for own, other in zip(mine, theirs, strict=True):
        assert own["eval"]["terms"] == pytest.approx(other["eval"]["terms"], rel=1e-5)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_two_that_share_blocks_find_what_one_does(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch) -> None:
    chosen, one, two = stage_of(recipe, alone, "next token"), fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    processes = launch(lambda: list(run(chosen, two, workers=0, shard=True, tensor_parallel=2)) and None)
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0]
    found = [[row["eval"]["loss"] for row in looks(folder)] for folder in (two, one)]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(found[0]) == 2


def test_a_run_that_goes_on_finds_the_same_and_says_it_once(recipe: Recipe, fresh: Fresh, alone: Alone) -> None:
    """Killed after a look and before the next checkpoint, and between the two: every look has one line."""
    chosen = stage_of(recipe, alone, "next token", steps=6, save_every=3, eval_every=1)
    whole, folder = fresh("whole"), fresh("killed")
    list(run(chosen, whole, workers=0))
    for until in (3, 5, 6):  # each ends before the checkpoint of that step
        for step in run(chosen, folder, workers=0):
            if step.step == until:
                break
    list(run(chosen, folder, workers=0))
    assert len(losses(folder)) > 6 and looks(folder) == looks(whole) and len(looks(whole)) == 6


def test_what_is_measured_may_change_midway_and_what_is_learned_not(recipe: Recipe, folder: Path, alone: Alone) -> None:
    chosen = stage_of(recipe, alone, "next token", eval_every=0)
    for step in run(chosen, folder, workers=0):
        if step.step == 3:
            break
    list(run(replace(chosen, stages=(replace(chosen.stages[0], eval_every=1),)), folder, workers=0))
    assert [row["step"] for row in looks(folder)] == [3, 4]


def test_samples_are_others_than_those_learned(recipe: Recipe, tokenizer: Tokenizer, alone: Alone) -> None:
    """Even of an endless source that is learned from as well; however many are computed at a time, the same ones."""
    chosen = stage_of(recipe, alone, "next token", steps=20)
    given = chosen.stages[0], 0, chosen.seed, chosen.sources, processor_of(chosen, tokenizer, initial_model(chosen))
    one, again = ([n for b in Validation(*given).batches(size) for n in b.extra["names"]] for size in (2, 4))
    data = Batches(*given)
    learned = {name for k in range(len(data)) for name in data[k].extra["names"]}
    assert one == again and len(set(one)) == 9 and not learned & set(one)


@pytest.fixture
def mine(tmp_path: Path) -> FilesSource:
    """A file of five questions, of which the third cannot be read."""
    lines = [
        json.dumps({"conversations": [{"from": "human", "value": f"{k}?"}, {"from": "gpt", "value": "one" * k}]})
        for k in range(1, 6)
    ]
    lines[2] = '{"conversations": [{"from": "hu'
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n")
    return FilesSource("conversations", "llava", str(tmp_path / "mine.jsonl"))


def test_what_cannot_be_used_is_passed_over_and_told_once(
    recipe: Recipe, folder: Path, alone: Alone, mine: FilesSource, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = replace(recipe, sources={**recipe.sources, "mine": mine})
    chosen = stage_of(chosen, alone, "next token", eval_data={"mine": 1.0})
    list(run(chosen, folder, workers=0))
    assert len(looks(folder)) == 2
    (line,) = (folder / "passed-over.txt").read_text().splitlines()
    assert "mine.jsonl:3" in line and capsys.readouterr().err.count("passed over") == 1


def test_each_row_of_a_file_is_there_once(
    recipe: Recipe, tokenizer: Tokenizer, alone: Alone, mine: FilesSource
) -> None:
    lines = Path(mine.path).read_text().splitlines(keepends=True)
    Path(mine.path).write_text("".join(lines[:2] + lines[3:]))
    chosen = replace(recipe, sources={**recipe.sources, "mine": mine})
    for weights, count in (({"mine": 1.0}, 4), ({"mine": 1.0, "text": 1.0}, 5 + 4)):
        stage = stage_of(chosen, alone, "next token", eval_data=weights, eval_samples=10).stages[0]
        processor = processor_of(chosen, tokenizer, initial_model(chosen))
        names = [n for b in Validation(stage, 0, 0, chosen.sources, processor).batches(3) for n in b.extra["names"]]
        assert len(set(names)) == len(names) == count and sum("mine" in name for name in names) == 4


def test_features_are_read_and_none_is_kept_for_it(recipe: Recipe, fresh: Fresh, tmp_path: Path, alone: Alone) -> None:
    chosen = stage_of(recipe, alone, "next token", learn={"fusion.*": 1e-2}, data={"questions": 1.0})
    kept = []
    for name, more in (("with", {}), ("without", {"eval_data": {}, "eval_every": 0})):
        store = FeatureStore(tmp_path / f"{name}-features", 1 << 30)
        list(run(replace(chosen, stages=(replace(chosen.stages[0], **more),)), fresh(name), workers=0, store=store))
        kept.append(sorted(path.name for _, _, path in store._entries()))
    assert kept[0] == kept[1] and kept[0]
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


REFUSED = {
    "a source that is missing": ({"eval_data": {"qestions": 1.0}}, "eval_data: stage 'instruct' has no source 'qest"),
    "pairs for a loss of words": ({"eval_data": {"pairs": 1.0}}, "eval_data: stage 'instruct' reads pairs, its obj"),
    "a file that is not named": ({"eval_data": {"none": 1.0}}, "source 'none' names no file; set sources.none.path"),
    "a file that is not there": ({"eval_data": {"lost": 1.0}}, "lost.jsonl"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sources_are_checked_before_anything_begins(recipe: Recipe, folder: Path, alone: Alone, name: str) -> None:
    files = {"none": "", "lost": "lost.jsonl"}
    more = {key: FilesSource("conversations", "llava", path) for key, path in files.items()}
    settings, told = REFUSED[name]
    chosen = alone(replace(recipe, sources={**recipe.sources, **more}), "instruct", **settings)
    with pytest.raises(SightlineError, match=told):
        next(run(chosen, folder, workers=0))
    assert not (folder / "run.yaml").exists()


def test_too_few_for_a_contrast_are_refused(
    recipe: Recipe, folder: Path, tokenizer: Tokenizer, alone: Alone, mine: FilesSource
) -> None:
    source = replace(mine, kind="image-text")
    stage = stage_of(recipe, alone, "matching", eval_data={"mine": 1.0}, batch=6).stages[0]
    with pytest.raises(ConfigError, match="eval_data has 5 samples, expected 6 at least"):
        Validation(stage, 0, 0, {"mine": source}, processor_of(recipe, tokenizer, initial_model(recipe)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eval_every": 5}, "eval_every measures nothing without eval_data"),
        ({"eval_data": {"text": 0.0}}, "expected sources with weights above 0"),
        ({"eval_data": {"pairs": 1.0}, "objective": {"grpo": 1.0}}, "objective 'grpo' has none"),
        ({"eval_data": {"pairs": 1.0}, "objective": {"ppo": 1.0}}, "objective 'ppo' has none"),
        ({"eval_data": {"pictures": 1.0}, "objective": {"dino": 1.0}}, "objective 'dino' has none"),
        ({"eval_data": {"pictures": 1.0}, "objective": {"clip": 1.0}, "eval_samples": 1}, "'clip' compares 2 samples"),
        ({"eval_data": {"text": 1.0}, "loss_weights": {"questions": 1.0, "captions": 1.0}}, "source 'text' has no te"),
    ],
)
def test_settings_that_measure_nothing_are_refused(
    recipe: Recipe, alone: Alone, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        alone(recipe, "instruct", **settings)


def test_it_is_told_wherever_a_loss_is(recipe: Recipe, folder: Path, alone: Alone) -> None:
    chosen = stage_of(recipe, alone, "next token", eval_every=3)
    lines = "\n".join(plan(chosen, rate=lambda precision: 1e9))
    assert "  evaluated  on text + questions, 9 samples at most, every 3 steps and at the end" in lines
    steps, pace = list(run(chosen, folder, workers=0)), Pace(chosen)
    found = [row["eval"]["loss"] for row in looks(folder)]
    assert [step.notes.get(EVAL) for step in steps] == [None, None, *found]
    notes = [pace.note(step) for step in steps]
    assert ["eval" in note for note in notes] == [False, False, True, True] and f"eval {found[1]:.3f}" in notes[3]
    page = (folder / "report.html").read_text()
    assert ">on eval_data<" in page and ">on eval_data<" not in report(folder.parent, "none")
    assert dict(scalars(looks(folder)[0]))["instruct/eval/loss"] == found[0]
    Metrics(folder).write_once(looks(folder)[0])
    assert len(looks(folder)) == 2
