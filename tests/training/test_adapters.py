"""Adapters in training: where they land, that nothing else learns, and that a stopped run goes on bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sightline.core.config import load_yaml, override, save_yaml
from sightline.core.errors import CheckpointError, ConfigError
from sightline.language.decoder import Decoder
from sightline.language.tokenizer import Tokenizer
from sightline.layers.adapted import adapted, merge
from sightline.model import VLM
from sightline.training import checkpoints
from sightline.training.adapters import Learning, Lora, adapt, load_adapters, save_adapters
from sightline.training.export import export
from sightline.training.loader import Batches
from sightline.training.optim import Optimizers
from sightline.training.recipe import Recipe, learning_rates
from sightline.training.run import final_model, initial_model, objective_of, processor_of, run
from sightline.training.trainer import Trainer
from sightline.zoo import own
from sightline.zoo.languages import qwen_config

Fresh = Callable[[str], Path]
Alone = Callable[..., Recipe]


def adapted_model(recipe: Recipe, learn: Learning) -> VLM:
    model = VLM(recipe.model)
    adapt(model, learn)
    return model


def with_values(model: nn.Module) -> nn.Module:
    """Updates that are not nothing."""
    with torch.no_grad():
        for module in adapted(model).values():
            module.lora_b.normal_(std=0.3)
            if module.magnitude is not None:
                module.magnitude.mul_(1.25)
    return model


# ------------------------------------------------------------------------------------------------------ where they land


def test_a_pattern_puts_one_beside_each_linear_map_that_it_names(recipe: Recipe) -> None:
    model = adapted_model(recipe, {"decoder.*": Lora(rank=4), "decoder.blocks.*.attention.*": Lora(rank=2, rate=1e-3)})
    ranks = {name: len(module.lora_a) for name, module in adapted(model).items()}
    block = "decoder.blocks.0."
    assert ranks == {f"{block}attention.{x}": 2 for x in "qkvo"} | {
        f"{block}feedforward.{x}": 4 for x in ("gate", "up", "down")
    }


def test_none_lands_on_what_another_pattern_learns_in_full(recipe: Recipe) -> None:
    learns: list[Learning] = [
        {"decoder.*": Lora(), "*.q.weight": 1e-4, "fusion.*": 1e-3},
        {"fusion.*": 1e-3, "*.q.weight": 1e-4, "decoder.*": Lora()},
    ]
    for learn in learns:
        model = adapted_model(recipe, learn)
        assert not any(name.endswith(".q") or name.startswith(("fusion", "encoder")) for name in adapted(model))
        rates = learning_rates(model, learn)
        assert rates["decoder.blocks.0.attention.q.weight"] == 1e-4
        assert rates["fusion.layers.0.weight"] == 1e-3
        assert rates["decoder.blocks.0.attention.k.lora_a"] == 2e-4
        assert "decoder.blocks.0.attention.k.weight" not in rates and "decoder.embedding.weight" not in rates


def test_the_head_has_one_only_where_it_is_named(recipe: Recipe) -> None:
    untied = override(recipe, ["model.decoder.tied=false"])
    assert "decoder.head" not in adapted(adapted_model(untied, {"decoder.*": Lora()}))
    assert list(adapted(adapted_model(untied, {"decoder.head.weight": Lora()}))) == ["decoder.head"]


@pytest.mark.parametrize(
    "learn",
    [
        {"decoder.embedding.weight": Lora()},
        {"decoder.norm.*": Lora()},
        {"decoder.blok.*": Lora()},
        {"decoder.blocks.*": Lora(), "decoder.*": 1e-3},
    ],
)
def test_a_pattern_without_a_map_to_adapt_is_told(recipe: Recipe, learn: Learning) -> None:
    with pytest.raises(ConfigError, match=r"pattern 'decoder\.\S+' leaves no linear map for an adapter"):
        adapted_model(recipe, learn)


def test_a_second_adapter_is_refused(recipe: Recipe) -> None:
    model = adapted_model(recipe, {"fusion.*": Lora()})
    with pytest.raises(ConfigError, match="has an adapter already"):
        adapt(model, {"*": Lora()})


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"alpha": -1.0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_wrong_settings_are_told(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Lora(**wrong)  # type: ignore[arg-type]


def test_a_recipe_with_adapters_survives_yaml(recipe: Recipe, alone: Alone, tmp_path: Path) -> None:
    chosen = alone(recipe, "language", learn={"decoder.*": Lora(rank=8, alpha=16, dora=True), "fusion.*": 1e-3})
    save_yaml(chosen, tmp_path / "run.yaml")
    assert load_yaml(Recipe, tmp_path / "run.yaml") == chosen
    assert override(chosen, ["stages.0.learn={decoder.*: {rank: 2}}"]).stages[0].learn == {"decoder.*": Lora(rank=2)}
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        override(chosen, ["stages.0.learn={decoder.*: {rnak: 2}}"])


def test_muon_leaves_adapters_to_adamw(recipe: Recipe, alone: Alone) -> None:
    learn: Learning = {"decoder.*": Lora()}
    model = adapted_model(recipe, learn)
    rates = learning_rates(model, learn)
    stage = alone(recipe, "language", optimizer="muon").stages[0]
    made = Optimizers({name: p for name, p in model.named_parameters() if name in rates}, rates, stage)
    assert [type(each) for each in made.optimizers] == [torch.optim.AdamW]


# ----------------------------------------------------------------------------------------------------------- a stage


@pytest.mark.parametrize("dora", [False, True])
def test_only_adapters_learn(recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, alone: Alone, dora: bool) -> None:
    chosen = alone(recipe, "language", learn={"decoder.*": Lora(rank=2, rate=1e-2, dora=dora)})
    model, stage = initial_model(chosen), chosen.stages[0]
    data = Batches(stage, 0, chosen.seed, chosen.sources, processor_of(chosen, tokenizer, model))
    adapt(model, stage.learn)
    trainer = Trainer(chosen, stage, model, objective_of(stage, chosen, tokenizer, model), tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = [trainer.learn([data[k]]) for k in range(3)]
    assert all(step.applied for step in done)
    own = ("lora_a", "lora_b", "magnitude")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith(own), name
        assert torch.equal(parameter, before[name]) != name.endswith(own), name
    assert any(name.endswith("magnitude") for name in trainer.parameters) == dora


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_stage_goes_on_bit_for_bit(recipe: Recipe, fresh: Fresh, alone: Alone, dora: bool, stop: int) -> None:
    lora = Lora(rank=2, rate=1e-2, dora=dora, dropout=0.1)
    chosen = alone(recipe, "language", learn={"decoder.*": lora, "decoder.norm.*": 1e-3})
    whole = [(s.step, s.loss) for s in run(chosen, fresh("whole"), workers=0)]
    folder = fresh("stopped")
    for step in run(chosen, folder, workers=0):
        if step.step == stop:
            break
    assert [(s.step, s.loss) for s in run(chosen, folder, workers=0)] == whole[(stop - 1) // 2 * 2 :]
    one, other = (final_model(chosen, f)[0].state_dict() for f in (folder, fresh("x").parent / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_next_stage_begins_from_the_merged_weights(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    first, second = recipe.stages[1], recipe.stages[2]
    adapters = replace(first, learn={"decoder.*": Lora(rank=2, rate=1e-2, dora=True)}, optimizer="adamw")
    chosen = replace(recipe, stages=(adapters, second))
    for _ in run(chosen, folder, workers=0):
        pass
    saved = checkpoints.newest(folder / "checkpoints" / first.name, print)
    after = checkpoints.newest(folder / "checkpoints" / second.name, print)
    assert saved is not None and after is not None
    wanted = VLM(recipe.model)
    adapt(wanted, adapters.learn)
    wanted.load_state_dict(saved.tensors["model"])
    merge(wanted)
    q = "decoder.blocks.0.attention.q.weight"
    assert torch.equal(after.tensors["model"][q], wanted.state_dict()[q])
    assert not torch.equal(after.tensors["model"][q], saved.tensors["model"][q])


def test_a_run_exports_its_model_merged_and_its_adapters_beside(recipe: Recipe, folder: Path, alone: Alone) -> None:
    chosen = alone(recipe, "language", learn={"decoder.*": Lora(rank=2, rate=1e-2)}, optimizer="adamw")
    for _ in run(chosen, folder, workers=0):
        pass
    merged = own.load_model(export(chosen, folder, folder / "model"))
    beside = initial_model(chosen)
    load_adapters(beside, folder / "model-adapters")
    assert len(adapted(beside)) == 7
    merge(beside)
    for name, value in beside.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value.bfloat16().float()), name


# ----------------------------------------------------------------------------------------------------------- in a file


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_come_back_from_their_folder(recipe: Recipe, tmp_path: Path, dora: bool) -> None:
    """With a rank and an alpha for each pattern, as the fewest differ from the first."""
    learn = {"decoder.*": Lora(3, 6, dora=dora), "decoder.*.q.*": Lora(5, 1, dora=dora), "fusion.*": Lora(2, dora=dora)}
    model = with_values(adapted_model(recipe, learn))
    save_adapters(model, tmp_path, base="somewhere")
    other = VLM(recipe.model)
    load_adapters(other, tmp_path)
    one, two = adapted(model), adapted(other)
    assert list(one) == list(two)
    for name in one:
        assert one[name].scale == pytest.approx(two[name].scale)
        for part in ("lora_a", "lora_b", "magnitude")[: 2 + dora]:
            assert torch.equal(getattr(one[name], part), getattr(two[name], part)), (name, part)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_maps_that_are_published_as_one(tmp_path: Path, dora: bool) -> None:
    """Qwen's queries, keys and values, one map there: two of the three have adapters, of unlike rank and scale."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "kv_channels": 8}
    cfg = qwen_config({**sizes, "intermediate_size": 48})
    torch.manual_seed(4)
    model = Decoder(cfg)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapt(model, {"blocks.*.q.weight": Lora(3, 6, dora=dora), "blocks.*.v.weight": Lora(2, 1, dora=dora)})
    with_values(model)
    save_adapters(model, tmp_path, "qwen")
    other = Decoder(cfg)
    other.load_state_dict(base)
    load_adapters(other, tmp_path, "qwen")
    assert {name.rsplit(".", 1)[1]: len(m.lora_a) for name, m in adapted(other).items()} == {"q": 5, "k": 5, "v": 5}
    for each in (model, other):
        merge(each)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, atol=1e-6, rtol=0)


def test_what_peft_cannot_say_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapters to save"):
        save_adapters(VLM(recipe.model), tmp_path)
    with pytest.raises(ConfigError, match="of LoRA and of DoRA"):
        save_adapters(adapted_model(recipe, {"fusion.*": Lora(), "decoder.*": Lora(dora=True)}), tmp_path)
    for learn in ({"encoder.patch.*": Lora()}, {"encoder.*": Lora()}):
        with pytest.raises(CheckpointError, match=r"patch.* is no linear map in the published model"):
            save_adapters(adapted_model(recipe, learn), tmp_path, "llava")
    decoder = Decoder(recipe.model.decoder)
    decoder.set_submodule("blocks.0.another", Lora().beside(nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.another is no linear map in the published model"):
        save_adapters(decoder, tmp_path, "llama")


def test_a_wrong_folder_is_told(recipe: Recipe, tmp_path: Path) -> None:
    model = adapted_model(recipe, {"decoder.*": Lora(2)})
    save_adapters(model, tmp_path)
    settings = (tmp_path / "adapter_config.json").read_text()
    smaller = override(recipe, ["model.decoder.depth=1", "model.decoder.mlp=32"])
    with pytest.raises(CheckpointError, match=r"lora_\w of decoder\.blocks\.0\.feedforward\.\w+ is \[.*, expected \["):
        load_adapters(VLM(smaller.model), tmp_path)
    with pytest.raises(CheckpointError, match="no place for an adapter of"):
        load_adapters(VLM(recipe.model).fusion, tmp_path)
    for old, new, told in [
        ('"LORA"', '"IA3"', "adapters of kind 'IA3'"),
        ('"bias": "none"', '"bias": "all"', "bias is 'all', expected 'none'"),
    ]:
        (tmp_path / "adapter_config.json").write_text(settings.replace(old, new))
        with pytest.raises(CheckpointError, match=told):
            load_adapters(VLM(recipe.model), tmp_path)
