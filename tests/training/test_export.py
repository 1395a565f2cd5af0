"""A run's folder becomes a model folder that anyone can load, with the run's tokenizer and picture pipeline."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sightline
from sightline.core.config import from_dict
from sightline.core.errors import CheckpointError, ConfigError
from sightline.language.tokenizer import Tokenizer
from sightline.recipes import sightline_mini
from sightline.training import checkpoints
from sightline.training.export import average, export
from sightline.training.run import initial_model
from sightline.zoo import own
from sightline.zoo.names import locate


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path) -> Path:
    """A run folder with a tokenizer, as a stage leaves it, still without a checkpoint."""
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    Tokenizer.from_folder(tiny_folder).save(tmp_path / "run" / "tokenizer")
    return tmp_path / "run"


def test_the_last_finished_stage_is_what_is_exported(run: Path) -> None:
    recipe = sightline_mini()
    recipe = replace(recipe, stages=recipe.stages[:2])
    model = initial_model(recipe)
    for number, stage in enumerate(recipe.stages):
        with torch.no_grad():
            model.fusion.layers[0].weight.fill_(float(number + 1))
        state = {"step": stage.steps, "refused": 0, "stage": stage.name}
        tensors = {"model": model.state_dict(), "objective": {}, "optimizer": {}}
        checkpoints.save(run / "checkpoints" / stage.name, f"step-{stage.steps:07d}", tensors, state)
    folder = export(recipe, run, run / "model")
    assert own.read_card(folder).stages == {stage.name: tuple(stage.learn) for stage in recipe.stages}
    loaded = sightline.load(folder)
    weights = own.load_model(folder).state_dict()
    assert bool((weights["fusion.layers.0.weight"] == 2).all())
    assert torch.equal(weights["encoder.patch.weight"], model.encoder.patch.weight.detach().bfloat16().float())
    assert loaded.engine.processor.pixels == recipe.pixels
    assert loaded.ask(None, "how many?", max_new_tokens=2).usage["completion_tokens"] <= 2


def test_a_run_without_a_checkpoint_is_told(run: Path) -> None:
    with pytest.raises(CheckpointError, match="no stage of recipe 'sightline-mini' is finished"):
        export(sightline_mini(), run, run / "model")
    assert not (run / "model").exists()


def test_the_mean_of_models_is_the_mean_of_their_weights(tmp_path: Path, tiny_folder: Path) -> None:
    folders, wanted = [tmp_path / name for name in "abc"], []
    for number, folder in enumerate(folders):
        shutil.copytree(tiny_folder, folder)
        model, card = own.load_model(folder), own.read_card(folder)
        with torch.no_grad():
            for value in model.parameters():
                value.fill_(2.0**number)  # exact in bfloat16, as is their mean of 7 / 3 to its precision
        processor = from_dict(own.ProcessorConfig, json.loads((folder / "processor.json").read_text()))
        own.save(model, Tokenizer.from_folder(folder), processor, folder, card.stages)
        wanted.append(2.0**number)
    found = own.load_model(average(folders, tmp_path / "mean"))
    mean = torch.tensor(sum(wanted) / 3).bfloat16().float()
    assert all(bool((value == mean).all()) for value in found.parameters())
    assert own.read_card(tmp_path / "mean").stages == own.read_card(folders[-1]).stages


def test_models_of_other_designs_have_no_mean(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="not the design of"):
        average([tiny_folder, locate()], tmp_path / "mean")
