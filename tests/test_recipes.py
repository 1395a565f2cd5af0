"""Recipes of published systems: what each stage teaches, how long, and that none begins before its files are there."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from sightline.core.config import from_dict, to_dict
from sightline.core.errors import ConfigError
from sightline.language.decoder import DecoderConfig
from sightline.recipes import RECIPES, recipe
from sightline.training.adapters import Lora
from sightline.training.plan import plan
from sightline.training.recipe import Recipe
from sightline.training.run import run
from sightline.training.starting import given as parts

PUBLISHED = [name for name in RECIPES if name not in ("sightline-mini", "tiny")]


def dry(chosen: Recipe, stage: str | None = None) -> list[str]:
    return list(plan(chosen, stage, rate=lambda precision: 1e12))


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_can_be_planned_and_none_begins_without_its_files(name: str, tmp_path: Path) -> None:
    chosen = recipe(name)
    assert chosen.name == name
    assert from_dict(Recipe, to_dict(chosen)) == chosen
    lines = dry(chosen)
    assert sum(line.startswith("  files ") for line in lines) == sum(len(stage.data) for stage in chosen.stages)
    given = sum("=FOLDER is still to be given: " in line for line in lines)
    assert given == (1 if isinstance(chosen.start, str) else len(parts(chosen.start)))
    source = next(iter(chosen.stages[0].data))
    with pytest.raises(ConfigError, match=rf"names no file; set sources\.{source}\.path=FILE"):
        next(run(chosen, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("llava-1.5-7b", {"align": "21.0 M of 7.06 G", "instruct": "6.76 G of 7.06 G"}),
        ("llava-1.5-7b-lora", {"align": "21.0 M of 7.06 G", "instruct": "341 M of 7.38 G"}),
        ("qwen-vl", {"tasks": "9.66 G of 9.66 G", "instruct": "7.81 G of 9.66 G"}),
        ("cogvlm-224", {"pretrain": "6.62 G of 17.6 G"}),
        ("cogvlm", {"places": "6.62 G of 17.6 G", "instruct": "10.9 G of 17.6 G"}),
        ("blip2-opt-2.7b", {"represent": "105 M of 3.74 G", "generate": "107 M of 3.74 G"}),
        ("openflamingo-9b", {"pretrain": "1.38 G of 8.13 G"}),
        ("internvl-chat-v1-5", {"pretrain": "5.65 G of 25.5 G", "instruct": "25.5 G of 25.5 G"}),
        ("paligemma-3b-pt-448", {"resolution": "2.92 G of 2.92 G"}),
        ("kosmos-2-patch14-224", {"pretrain": "1.37 G of 1.66 G"}),
    ],
)
def test_what_learns(name: str, learned: dict[str, str]) -> None:
    """Adapters of LLaVA: 128 x (inputs + outputs) of 7 maps in 32 blocks are 320 M, beside the projector's 21 M."""
    for stage, wanted in learned.items():
        assert any(f"learns     {wanted} parameters" in line for line in dry(recipe(name), stage))


@pytest.mark.parametrize(
    ("name", "stage", "samples"),
    [
        ("llava-1.5-7b", "align", 558_128),
        ("llava-1.5-13b", "instruct", 665_298),
        ("qwen-vl-224", "pretrain", 50_000 * 30_720),
        ("cogvlm-224", "pretrain", 120_000 * 8192),
        ("cogvlm", "instruct", 6000 * 1024),
        ("blip2-opt-2.7b", "represent", 250_000 * 1680),
        ("blip2-opt-2.7b", "generate", 80_000 * 1920),
        ("openflamingo-3b", "pretrain", 180_000_000),
        ("internvl-chat-v1-5", "instruct", 5_100_000),
        ("paligemma-3b-pt-224", "pretrain", 1_000_000_000),
        ("paligemma-3b-pt-448", "resolution", 50_000_000),
        ("paligemma-3b-pt-896", "resolution", 10_000_000),
        ("paligemma-3b-vqav2-224", "transfer", 6_581_110),
    ],
)
def test_how_much_is_seen(name: str, stage: str, samples: int) -> None:
    chosen = recipe(name)
    found = chosen.stages[chosen.stage(stage)]
    batch = found.batch * found.accumulate
    assert 0 <= found.steps * batch - samples < batch


def test_kosmos_2_sees_as_many_tokens_as_are_told() -> None:
    """419 thousand a step; 25 billion in all."""
    plan = dry(recipe("kosmos-2-patch14-224"), "pretrain")
    assert any("25.3 G tokens in all" in line for line in plan)


def test_what_each_begins_from_is_planned(tmp_path: Path) -> None:
    here = replace(recipe("llava-1.5-7b"), start=str(tmp_path))
    assert f"  begins     all from {tmp_path}" in dry(here, "align")


def test_rates_rise_and_fall_along_half_a_cosine_to_what_was_published() -> None:
    represent, generate = recipe("blip2-opt-2.7b").stages
    for stage in (represent, generate):
        assert stage.rate(1999) == stage.rate(2000) == 1.0
    assert generate.rate(2000 + 39_000) == pytest.approx(0.75)  # half way
    assert generate.rate(79_999) == pytest.approx(0.5, abs=1e-6)
    assert represent.rate(249_999) == pytest.approx(0.1, abs=1e-6)


def test_what_is_published_beside_rates_and_steps_is_there() -> None:
    """Dropout, drop path, layer decay, epsilon, weights of losses and decays, the shape of a rate."""
    stages = {name: {stage.name: stage for stage in recipe(name).stages} for name in PUBLISHED}
    assert [stages["blip2-opt-2.7b"][name].dropout for name in ("represent", "generate")] == [0.1, 0.1]
    assert stages["blip2-opt-2.7b"]["represent"].batch == 1680  # all of which are compared
    assert stages["kosmos-2-patch14-224"]["pretrain"].dropout == 0.1
    assert [stage.drop_path for stage in stages["internvl-chat-v1-5"].values()] == [0.2, 0.4]
    qwen = [*stages["qwen-vl-224"].values(), *stages["qwen-vl"].values()]
    assert [(stage.layer_decay, stage.eps) for stage in qwen] == [(0.95, 1e-6), (0.95, 1e-6), (1.0, 1e-6)]
    flamingo = stages["openflamingo-9b"]["pretrain"]
    assert flamingo.loss_weights == {"mmc4": 1.0, "laion_2b": 0.2} and flamingo.decay_of("fusion.latents") == 0.0
    assert flamingo.decay_of("decoder.blocks.3.cross_attention.q.weight") == 0.1
    assert stages["paligemma-3b-pt-224"]["pretrain"].schedule == "rsqrt"
    assert stages["cogvlm"]["instruct"].learn["encoder.*"] == 1e-6


def test_a_plan_tells_what_is_unusual() -> None:
    lines = "\n".join(dry(recipe("openflamingo-3b")) + dry(recipe("internvl-chat-v1-5"), "pretrain"))
    assert "to lower next-token, mmc4 + laion_2b x 0.2" in lines
    assert "warm-up, drop path 0.2" in lines
    assert "sample     3,328 tokens of pictures" in lines


def test_the_adapters_of_llava_are_those_of_its_script() -> None:
    assert recipe("llava-1.5-7b-lora").stages[1].learn["decoder.*"] == Lora(128, 256, 2e-4, dropout=0.05)


def test_a_plan_of_34_billion_parameters_takes_no_time() -> None:
    small = recipe("llava-1.5-7b")
    sizes = {"vocab_size": 64_000, "width": 7168, "depth": 60, "heads": 56, "kv_heads": 8, "mlp": 20_480}
    fusion = replace(small.model.fusion, width=7168)
    large = replace(small, model=replace(small.model, decoder=DecoderConfig(**sizes), fusion=fusion))  # type: ignore[arg-type]
    began = time.process_time()
    lines = list(plan(large, "align"))
    assert time.process_time() - began < 3
    assert lines[0] == "llava-1.5-7b: 34.8 G parameters, seed 0"
