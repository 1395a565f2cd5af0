"""Patterns, rates over a stage, and recipes as YAML."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sightline.core.config import from_dict, load_yaml, override, save_yaml, to_dict
from sightline.core.errors import ConfigError
from sightline.model import VLM
from sightline.training.adapters import Lora
from sightline.training.optim import Optimizers
from sightline.training.recipe import Recipe, Stage, check_sources, freeze, layered, learning_rates
from sightline.training.settings import DEFAULTS, READS, DPOConfig


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> VLM:
    return VLM(recipe.model)


def stage(**changes: object) -> Stage:
    return Stage(**{"name": "s", "learn": {"*": 1.0}, "data": {"text": 1.0}, "steps": 100, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"name": "a/b"}, "a stage is called 'a/b', expected a name that a folder can have"),
        ({"name": ""}, "a stage is called ''"),
        ({"data": {}}, "stage 's' reads {}, expected sources with weights above 0"),
        ({"data": {"text": -1.0}}, "expected sources with weights above 0"),
        ({"learn": {}}, "stage 's' learns nothing"),
        ({"learn": {"*": math.nan}}, "stage 's' learns '\\*' at nan, expected from 0 to 1000"),
        ({"learn": {"*": -1.0}}, "at -1, expected"),
        ({"learn": {"*": Lora(rank=2, rate=math.inf)}}, "at inf, expected"),
        ({"objective": {}}, "stage 's' has no objective"),
        ({"loss_weights": {"txt": 1.0}}, "loss_weights are of all its sources or of none"),
        (
            {"loss_weights": {"text": 1.0}, "objective": {"dpo": 1.0}},
            "are for 'next-token', not for 'dpo'",
        ),
        ({"loss_weights": {"text": 1.0}, "packing": 64}, "need rows of one source each, without packing"),
        (
            {"objective": {"dense": 1.0, "siglip": -0.3}},
            "stage 's': objective 'siglip' weighs -0.3, expected 0 or more",
        ),
        ({"objective": {"dense": math.nan}}, "objective 'dense' weighs nan"),
    ],
)
def test_a_stage_that_could_not_learn_is_told(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        stage(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"decay": 2.0},
        {"floor": -1.0},
        {"clip": 0.0},
        {"weight_decay": -1},
    ],
)
def test_a_number_that_an_optimiser_cannot_have_is_told(recipe: Recipe, changes: dict[str, object]) -> None:
    plain = to_dict(recipe)
    plain["stages"][0] |= changes
    with pytest.raises(ConfigError, match=rf"^stages\.0\.{next(iter(changes))}.* = .*: input should be "):
        from_dict(Recipe, plain)


def test_a_recipe_has_stages_of_different_names(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="has two stages 's', expected a name for each"):
        replace(recipe, stages=(stage(), stage()))
    with pytest.raises(ConfigError, match=r"a recipe is called '\.\./x'"):
        replace(recipe, name="../x")


def test_a_stage_may_begin_from_an_earlier_one_than_the_one_before(recipe: Recipe) -> None:
    a, b, c, d = (stage(name=name, after=after) for name, after in (("a", ""), ("b", ""), ("c", "a"), ("d", "")))
    chosen = replace(recipe, stages=(a, b, c, d))
    assert [chosen.path(k) for k in range(4)] == [(0,), (0, 1), (0, 2), (0, 2, 3)]
    for after in ("c", "e"):  # itself, and one that there is not
        with pytest.raises(ConfigError, match=f"stage 'c' comes after '{after}', expected an earlier one"):
            replace(recipe, stages=(a, b, replace(c, after=after), d))


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_rewards_have_names_and_numbers(kind: str) -> None:
    config = type(DEFAULTS[kind])
    assert stage(objective=config(rewards={"count": 2.0})).rewards == {"count": 2.0}
    assert stage(objective={kind: 1.0}).rewards == {"truth": 1.0} and stage().rewards == {}
    for rewards, told in (({}, "has no rewards"), ({"count": math.inf}, "reward 'count' weighs inf")):
        with pytest.raises(ConfigError, match=told):
            config(rewards=rewards)


def test_a_later_pattern_wins(model: VLM) -> None:
    rates = learning_rates(model, {"decoder.*": 1e-3, "decoder.blocks.0.*": 1e-4, "fusion.layers.1.bias": 1e-2})
    assert rates["decoder.norm.weight"] == 1e-3
    assert {rate for name, rate in rates.items() if name.startswith("decoder.blocks.0.")} == {1e-4}
    assert [name for name in rates if name.startswith("fusion")] == ["fusion.layers.1.bias"]
    assert not any(name.startswith("encoder") for name in rates)


@pytest.mark.parametrize(
    "pattern, hint",
    [
        ("fusion.layer.0.weight", "did you mean 'fusion.layers.0.weight'"),
        ("decoder.blocks.0.attention.q.wieght", "did you mean 'decoder.blocks.0.attention.q.weight'"),
        ("fussion.*", "did you mean 'fusion.*'?"),
        ("fusoin.*", "did you mean 'fusion.*'?"),
        ("zzz", "; known: decoder.*, encoder.*, fusion.*"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_with_the_nearest(model: VLM, pattern: str, hint: str) -> None:
    with pytest.raises(ConfigError) as failure:
        learning_rates(model, {"decoder.*": 1.0, pattern: 1.0})
    assert f"pattern {pattern!r} matches no parameter" in str(failure.value) and hint in str(failure.value)


def test_freeze_asks_for_exactly_the_named_gradients(model: VLM) -> None:
    freeze(model, {"decoder.norm.weight": 1.0})
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["decoder.norm.weight"]


def test_the_rate_warms_up_holds_and_falls_in_a_line() -> None:
    line = stage(warmup=10, decay=0.5, floor=0.1)
    assert [line.rate(step) for step in (0, 4, 9, 30, 50)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    assert line.rate(75) == pytest.approx(0.1 + 0.9 * 0.5)
    assert line.rate(99) == pytest.approx(0.1 + 0.9 * 0.02)


def test_a_cosine_falls_from_the_start_and_a_constant_never() -> None:
    cosine = stage(warmup=1, decay=1.0, floor=0.0, schedule="cosine")
    for step in (0, 25, 50, 99):
        assert cosine.rate(step) == pytest.approx((1 + math.cos(math.pi * step / 100)) / 2)
    assert [stage(warmup=0, decay=0.0).rate(step) for step in (0, 50, 99)] == [1.0, 1.0, 1.0]


def test_a_rate_falls_with_the_root_of_the_steps_after_its_warm_up() -> None:
    """As in big_vision: 1 / sqrt(1 + steps / timescale), a cool-down at the end on top."""
    found = stage(steps=200, warmup=10, decay=0.0, schedule="rsqrt", timescale=30)
    assert [found.rate(step) for step in (4, 9, 10)] == [0.5, 1.0, 1.0]
    assert found.rate(40) == pytest.approx(2**-0.5) and found.rate(100) == pytest.approx(0.5)
    assert found.rate(40, warmup=80) == pytest.approx(41 / 80)  # a slower one falls later
    cooled = stage(warmup=10, steps=100, decay=0.5, floor=0.0, schedule="rsqrt", timescale=30)
    assert cooled.rate(70) == pytest.approx(0.6 * 3**-0.5)


def test_rates_fall_from_block_to_block_of_the_encoder() -> None:
    names = ["patch.weight", "pre_norm.bias", "blocks.0.a", "blocks.11.b", "blocks.11.norm.b", "norm.weight"]
    rates = dict.fromkeys([*(f"encoder.{name}" for name in names), "fusion.x", "decoder.blocks.0.y"], 2.0)
    found = layered(rates, 0.5)
    assert list(found.values()) == [2 * 0.5**k for k in (13, 13, 12, 1, 1, 0, 0, 0)]
    assert layered(rates, 1.0) == rates and layered({"fusion.x": 2.0}, 0.5) == {"fusion.x": 2.0}


def test_a_pattern_may_decay_otherwise(model: VLM) -> None:
    plan = stage(learn={"*": 1e-3, "fusion.*": 1e-3}, weight_decay=0.1, weight_decays={"fusion.*": 0.0})
    found = groups(Optimizers(dict(model.named_parameters()), learning_rates(model, plan.learn), plan))
    assert found["fusion.layers.0.weight"] == (1e-3, 0.0) and found["encoder.patch.weight"] == (1e-3, 0.1)
    with pytest.raises(ConfigError, match=r"decays 'fusion', which is not learned"):
        stage(learn={"fusion.*": 1e-3}, weight_decays={"fusion": 0.0})


def test_a_table_of_which_some_rows_learn_decays_nowhere(recipe: Recipe) -> None:
    """Decay moves rows that have no gradients as well."""
    untied = VLM(replace(recipe.model, decoder=replace(recipe.model.decoder, tied=False)))
    for tokens, wanted in (((), 0.1), (("<eos>",), 0.0)):
        plan = stage(learn={"decoder.*": 1e-3}, weight_decay=0.1, trainable_tokens=tokens)
        parameters = {name: p for name, p in untied.named_parameters() if name.startswith("decoder.")}
        found = groups(Optimizers(parameters, learning_rates(untied, plan.learn), plan))
        assert found["decoder.head.weight"] == (1e-3, wanted)
        assert found["decoder.blocks.0.attention.q.weight"] == (1e-3, 0.1)


def test_adam_has_the_stage_s_settings(model: VLM) -> None:
    (only,) = Optimizers(dict(model.named_parameters()), learning_rates(model, {"*": 1.0}), stage(eps=1e-6)).optimizers
    assert only.defaults["eps"] == 1e-6 and only.defaults["betas"] == (0.9, 0.98)


def test_a_recipe_survives_yaml(recipe: Recipe, tmp_path: Path) -> None:
    save_yaml(recipe, tmp_path / "run.yaml")
    assert load_yaml(Recipe, tmp_path / "run.yaml") == recipe


@pytest.mark.parametrize(
    ("override_by", "told"),
    [
        ("stages.0.loss_weights={text: -1}", "greater than or equal to 0"),
        ("stages.0.drop_path=1", "less than 1"),
        ("stages.0.dropout=-0.1", "greater than or equal to 0"),
        ("stages.0.layer_decay=0", "greater than 0"),
        ("stages.0.eps=0", "greater than 0"),
        ("stages.0.schedule=rsqr", "input should be 'linear', 'cosine' or 'rsqrt'"),
    ],
)
def test_a_setting_out_of_its_range_is_told(recipe: Recipe, override_by: str, told: str) -> None:
    with pytest.raises(ConfigError) as failure:
        override(recipe, [override_by])
    assert told in str(failure.value) and "\n" not in str(failure.value)


def test_a_mistyped_key_is_told_with_the_nearest(recipe: Recipe) -> None:
    data = to_dict(recipe)
    data["stages"][0]["stpes"] = 3
    with pytest.raises(ConfigError, match=r"unknown key 'stages\.0\.stpes'; did you mean 'steps'"):
        from_dict(Recipe, data)
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        override(recipe, ["stages.0.step=3"])
    with pytest.raises(ConfigError, match="has no stage 'instrcut'; did you mean 'instruct'"):
        recipe.stage("instrcut")


def groups(optimizers: Optimizers) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter."""
    found = {}
    for names, optimizer in zip(optimizers.names, optimizers.optimizers, strict=True):
        parts = [(group["peak"], group["weight_decay"]) for group in optimizer.param_groups for _ in group["params"]]
        found |= dict(zip(names, parts, strict=True))
    return found


def test_norms_biases_and_tables_do_not_decay(model: VLM) -> None:
    rates = learning_rates(model, {"*": 1e-3, "fusion.*": 2e-3})
    plan = stage(weight_decay=0.1)
    made = groups(Optimizers(dict(model.named_parameters()), rates, plan))
    assert made["decoder.blocks.0.attention.q.weight"] == (1e-3, 0.1)
    assert made["fusion.layers.0.weight"] == (2e-3, 0.1) and made["fusion.layers.0.bias"] == (2e-3, 0.0)
    for name in ("decoder.embedding.weight", "encoder.positions", "decoder.norm.weight", "encoder.patch.bias"):
        assert made[name][1] == 0.0, name
    assert set(made) == set(rates)


def test_muon_takes_the_matrices_inside_blocks(model: VLM) -> None:
    rates = learning_rates(model, {"*": 1e-3})
    made = groups(Optimizers(dict(model.named_parameters()), rates, stage(optimizer="muon")))
    assert made["decoder.blocks.0.feedforward.up.weight"][0] == pytest.approx(Optimizers.MUON * 1e-3)
    assert made["decoder.embedding.weight"][0] == made["encoder.patch.weight"][0] == 1e-3


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_goes_on_from_its_tensors(kind: str) -> None:
    """Four steps in one go, and two with the state moved into another optimiser in between: the same bits."""

    def start() -> nn.ParameterDict:
        torch.manual_seed(3)
        return nn.ParameterDict({"blocks_w": torch.randn(6, 4), "bias": torch.randn(4)})

    plan, found = stage(optimizer=kind), []
    for cut in (False, True):
        weights = start()
        rates = dict.fromkeys(weights, 1e-2)
        optimizers = Optimizers(dict(weights.items()), rates, plan)
        for step in range(4):
            if cut and step == 2:
                state = {name: value.clone() for name, value in optimizers.tensors().items()}
                optimizers = Optimizers(dict(weights.items()), rates, plan)
                optimizers.load(state)
            for i, weight in enumerate(weights.values()):
                weight.grad = torch.sin(weight.detach() * (i + step + 1))
            optimizers.step(step)
        found.append([weight.detach().clone() for weight in weights.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------------------------------------------------- objectives


def test_an_objective_with_settings_survives_yaml(recipe: Recipe, tmp_path: Path) -> None:
    prefer = stage(objective=DPOConfig(beta=0.3), data={"pairs": 1.0})
    weighed = stage(name="weighed", objective={"dpo": 1.0}, data={"pairs": 1.0})
    chosen = replace(recipe, stages=(prefer, weighed))
    save_yaml(chosen, tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text()
    assert "  objective:\n    kind: dpo\n    beta: 0.3\n" in text and "  objective:\n    dpo: 1.0\n" in text
    assert load_yaml(Recipe, tmp_path / "run.yaml") == chosen
    assert override(chosen, ["stages.0.objective.beta=0.5"]).stages[0].settings("dpo") == DPOConfig(beta=0.5)
    assert prefer.terms == weighed.terms == {"dpo": 1.0} and weighed.settings("dpo") == DPOConfig()


def test_a_weight_is_no_setting_of_another_objective(recipe: Recipe) -> None:
    for told in ("{clip: 1}", "{clip: 1.0}", "{clip: 2, siglip: 1}"):
        found = override(recipe, [f"stages.0.objective={told}"]).stages[0]
        assert isinstance(found.objective, dict) and "clip" in found.terms


@pytest.mark.parametrize(
    "objective, told",
    [
        ({"kind": "dpo", "bata": 0.1}, "unknown key 'stages.0.objective.bata'; did you mean 'beta'"),
        ({"kind": "dop"}, "unknown stages.0.objective.kind 'dop'; did you mean 'dpo'"),
        ({"kind": "dpo", "beta": -1.0}, "beta = -1.0: input should be greater than 0"),
        ({"kind": "dpo", "label_smoothing": 0.5}, "label_smoothing = 0.5: input should be less than 0.5"),
        ({"kind": "grpo", "group": 1}, "group = 1: input should be greater than or equal to 2"),
    ],
)
def test_a_wrong_setting_of_an_objective_is_told(recipe: Recipe, objective: dict[str, object], told: str) -> None:
    data = to_dict(recipe)
    data["stages"][0]["objective"] = objective
    with pytest.raises(ConfigError) as failure:
        from_dict(Recipe, data)
    assert told in str(failure.value) and "\n" not in str(failure.value)


def test_every_objective_says_what_it_reads() -> None:
    assert set(DEFAULTS) < set(READS)
    assert all(type(made)() == made and made.kind == name for name, made in DEFAULTS.items())


@pytest.mark.parametrize(
    "objective, data, told",
    [
        ({"dop": 1.0}, "pairs", "unknown objective 'dop'; did you mean 'dpo'"),
        ({"dpo": 1.0}, "questions", "stage 's' reads conversations, its objective learns from pairs"),
        ({"grpo": 1.0}, "pictures", "stage 's' reads pictures, its objective learns from pairs"),
        ({"next-token": 1.0}, "pairs", "stage 's' reads pairs, its objective learns from conversations"),
        ({"clip": 1.0}, "captions", "stage 's' reads conversations, its objective learns from pictures"),
        ({"kto": 1.0, "dpo": 1.0}, "pairs", "stage 's' reads pairs, its objective learns from judged and pairs"),
    ],
)
def test_data_that_does_not_fit_the_objective_is_told(
    recipe: Recipe, objective: dict[str, float], data: str, told: str
) -> None:
    with pytest.raises(ConfigError) as failure:
        check_sources(stage(objective=objective, data={data: 1.0}), recipe.sources)
    assert told in str(failure.value) and "\n" not in str(failure.value)


def test_one_sample_cannot_be_compared(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="'kto' compares samples of a batch, expected one of at least 2"):
        check_sources(stage(objective={"kto": 1.0}, data={"pairs": 1.0}, batch=1), recipe.sources)


# ------------------------------------------------------------------------------------------------------------- warm-ups


def test_a_pattern_may_warm_up_more_slowly(model: VLM) -> None:
    """PaliGemma's encoder: the parameter's last pattern counts."""
    plan = stage(learn={"*": 1e-3, "encoder.*": 1e-3}, warmup=2, warmups={"encoder.*": 8}, steps=20, decay=0.0)
    optimizers = Optimizers(dict(model.named_parameters()), learning_rates(model, plan.learn), plan)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    found = []
    for number in (0, 3, 9):
        optimizers.step(number)
        rates = {}
        for names, optimizer in zip(optimizers.names, optimizers.optimizers, strict=True):
            shares = [group["lr"] / group["peak"] for group in optimizer.param_groups for _ in group["params"]]
            rates |= dict(zip(names, shares, strict=True))
        found.append((rates["encoder.patch.weight"], rates["decoder.norm.weight"]))
    assert found == [(1 / 8, 1 / 2), (4 / 8, 1.0), (1.0, 1.0)]
    with pytest.raises(ConfigError, match=r"warms up 'encoder', which is not learned; did you mean 'encoder\.\*'"):
        stage(learn={"encoder.*": 1e-3}, warmups={"encoder": 8})
