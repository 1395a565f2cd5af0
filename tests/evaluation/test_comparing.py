"""Fusions compared: the same samples, equal steps and equal operations, nothing done twice, intervals over seeds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sightline.core.errors import ConfigError
from sightline.data.images import Square
from sightline.encoders.vit import ViTConfig
from sightline.evaluation import comparing
from sightline.evaluation.comparing import BUDGETS, Comparison, Outcome, compare, jobs_of, spread
from sightline.evaluation.designs import FUSIONS, price, with_fusion
from sightline.fusion.projector import ProjectorConfig
from sightline.language.decoder import DecoderConfig
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM, VLMConfig
from sightline.recipes import sightline_mini, tiny
from sightline.training.loader import Batches
from sightline.training.recipe import Recipe, Stage
from sightline.training.run import processor_of
from sightline.training.sources import ScenesSource
from sightline.zoo.names import locate


@pytest.fixture(scope="module")
def small() -> Recipe:
    """A design of a moment: pictures of 32 pixels, two blocks of width 32."""
    model = VLMConfig(
        image=ViTConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2, mlp=32),
        fusion=ProjectorConfig(inputs=16, width=32),
        decoder=DecoderConfig(vocab_size=1024, width=32, depth=2, heads=2, mlp=48, tied=True, max_length=256),
    )
    source = ScenesSource(kind="plain", asks=("color",), distinct=True, first=2, grown=10**9)
    stage = Stage(
        name="look",
        learn={"fusion.*": 1e-3, "decoder.*": 1e-3},
        data={"pairs": 1.0},
        steps=3,
        batch=2,
        precision="fp32",
    )
    return Recipe("small", model, Square(32), {"pairs": source}, (stage,), start="sightline-mini", taken=())


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(ConfigError, match="each once"):
        jobs_of(tiny(), ["mlp", "mlp"], 1, 1)
    with pytest.raises(ConfigError, match="0 seeds and 5 questions"):
        jobs_of(tiny(), ["mlp"], 0, 5)
    captions = replace(sightline_mini(), stages=sightline_mini().stages[:1])
    with pytest.raises(ConfigError, match="its last stage has no questions about scenes"):
        comparing.scenes_of(captions)


def test_equal_operations_are_equal_to_a_step() -> None:
    names = ["mlp", "linear", "native", "expert"]
    jobs, prices = jobs_of(tiny(), names, 2, 10)
    assert len(jobs) == 2 * 2 * len(names) and len({job.name for job in jobs}) == len(jobs)
    each = {name: prices[name].operations / tiny().stages[0].steps for name in names}
    spent = {job.fusion: job.steps * each[job.fusion] for job in jobs if job.budget == "operations"}
    assert all(abs(spent[name] - prices["mlp"].operations) <= each[name] / 2 for name in names)
    assert {job.steps for job in jobs if job.budget == "steps"} == {tiny().stages[0].steps}


def test_all_are_shown_the_same_samples_in_the_same_order(small: Recipe) -> None:
    tokenizer, shown = Tokenizer.from_folder(locate("sightline-mini")), []
    for job in jobs_of(small, list(FUSIONS), 2, 1)[0]:
        if job.budget == "steps":
            processor = processor_of(job.recipe, tokenizer, VLM(job.recipe.model))
            data = Batches(job.recipe.stages[0], 0, job.recipe.seed, job.recipe.sources, processor)
            shown.append((job.recipe.seed, tuple(data[0].extra["names"])))
    assert len(set(shown)) == 2 and len(shown) == 14


def test_a_stopped_comparison_goes_on_and_ends_the_same(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(folder: Path, progress: Any = lambda done, total, note: None) -> Comparison:
        return compare(small, ["linear", "native"], folder, 2, 6, progress)

    def stop(done: int, total: int, note: str) -> None:
        if done == 8:
            raise KeyboardInterrupt

    whole = begun(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path / "stopped", stop)
    assert len(list((tmp_path / "stopped" / "runs").glob("*.json"))) == 2
    rest = begun(tmp_path / "stopped")
    scores = [(o.fusion, o.seed, o.budget, o.steps, o.scores) for o in whole.outcomes]
    assert [(o.fusion, o.seed, o.budget, o.steps, o.scores) for o in rest.outcomes] == scores
    assert [o.speed > 0 for o in whole.outcomes] == [o.seed == 0 and o.steps == 3 for o in whole.outcomes]
    monkeypatch.setattr(comparing, "perform", lambda *a: pytest.fail("done twice"))
    assert begun(tmp_path / "whole").outcomes == whole.outcomes
    written = json.loads((tmp_path / "whole" / "comparison.json").read_text())
    assert written["accuracy"]["steps"]["linear"]["all"] == list(whole.summary("linear", "steps")["all"])
    with pytest.raises(ConfigError, match=r"linear-steps-0\.json: was made with other settings"):
        compare(small, ["linear"], tmp_path / "whole", 2, 7)


def test_features_are_computed_for_the_first_fusion_only(small: Recipe, tmp_path: Path) -> None:
    compare(small, ["linear", "mlp"], tmp_path, 1, 4)
    entries = list((tmp_path / "features").rglob("*.safetensors"))
    pictures = 3 * 2 + 2  # of the steps, and of the questions, two about each scene
    assert len(entries) == pictures


def test_the_mean_of_seeds_has_students_interval() -> None:
    mean, low, high = spread([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6)
    assert (low, high) == pytest.approx((0.6 - 4.303 * 0.1 / 3**0.5, 0.6 + 4.303 * 0.1 / 3**0.5), abs=1e-3)
    assert spread([0.0, 1.0])[1:] == (0, 1) and spread([0.4]) == (0.4, 0.4, 0.4)


def test_the_tables_and_the_plot_say_what_was_found(small: Recipe) -> None:
    prices = {name: price(with_fusion(small, name)) for name in ("linear", "native")}
    found = Comparison(small, 2, 10, prices)
    for name, budget, right in [("linear", "steps", 9), ("linear", "steps", 7), ("native", "operations", 2)]:
        found.outcomes.append(Outcome(name, 0, budget, 3, {"color": (right, 10)}, speed=5.0))  # type: ignore[arg-type]
    text = found.markdown()
    assert "| linear | 3 | 2 | 80.0% (0.0% – 100.0%) | 80.0% (0.0% – 100.0%) |" in text
    assert "| native | 3 | 1 | 20.0% | 20.0% |" in text and BUDGETS == ("steps", "operations")
    assert "## At the operations of linear" in text and "| linear | 16 |" in text
    assert ">80.0%<" in found.plot() and ">20.0%<" in found.plot()
