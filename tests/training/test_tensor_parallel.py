"""Processes that compute blocks together are as one: the same losses, weights and checkpoints, whatever the mesh."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # which torch's tensors of several processes ask for: once here, and not in each of them
from torch import Tensor, nn

import sightline.training.run as running
from sightline.core.errors import ConfigError
from sightline.fusion.cross_attention import CrossAttentionConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.fusion.visual_expert import VisualExpertConfig
from sightline.language.seq2seq import Seq2SeqConfig
from sightline.language.tokenizer import Tokenizer
from sightline.layers.attention import QKNorm
from sightline.layers.experts import ExpertsConfig
from sightline.layers.scores import Scores
from sightline.training import checkpoints, distributed
from sightline.training.adapters import Lora
from sightline.training.plan import plan
from sightline.training.recipe import Recipe
from sightline.training.run import final_model, initial_model, objective_of, run
from sightline.training.trainer import Trainer

Fresh = Callable[[str], Path]
Alone = Callable[..., Recipe]
Launch = Callable[..., list[int]]
Pretended = Callable[..., None]
EVERYTHING = {"encoder.*": 5e-5, "fusion.*": 5e-5, "decoder.*": 5e-5}
MIXED = {"text": 1.0, "questions": 1.0}  # in turn, so that of two groups one has pictures and the other none

DECODERS: dict[str, dict[str, Any]] = {
    "experts, norms and biases": {
        "experts": ExpertsConfig(count=3, chosen=2, mlp=10, shared=6, every=2),
        "qk_norm": True,
        "qkv_bias": True,
        "out_bias": True,
    },
    "a norm for each head": {"qk_norm": QKNorm(kind="layer", own=True), "gated": False, "mlp_bias": True},
}
FUSIONS = {
    "visual expert": VisualExpertConfig(ProjectorConfig(inputs=16, width=24)),
    "cross-attention": CrossAttentionConfig(
        inputs=16,
        width=24,
        heads=2,
        mlp=10,
        interval=1,
        qk_norm=True,
        resampler=ProjectorConfig(inputs=16, width=24),
    ),
}
STAGES: dict[str, dict[str, Any]] = {
    "grouped keys": {},
    "adapters": {
        "learn": {"decoder.blocks.*.attention.*": Lora(3), "decoder.blocks.*.feedforward.*": Lora(3, dora=True)}
    },
    "adapters with dropout": {
        "learn": {f"decoder.blocks.*.{part}.*": Lora(3, dropout=0.4) for part in ("attention", "feedforward")},
        "dropout": 0.1,
    },
    "recomputed, packed": {"recompute": True, "packing": 300, "batch": 4, "learn": {"fusion.*": 5e-5}},
    "contrast": {
        "data": {"pictures": 1.0},
        "objective": {"dense": 1.0, "siglip": 0.3},
        "learn": {"encoder.*": 5e-5},
    },
    "preferences": {"data": {"pairs": 1.0}, "objective": {"dpo": 1.0}, "learn": {"decoder.*": 5e-5}},
}


def stage(recipe: Recipe, alone: Alone, name: str = "grouped keys", **changes: Any) -> Recipe:
    """A stage of a model whose heads can be shared out, with a hidden size of which half is odd."""
    decoder = {"heads": 4, "kv_heads": 2, "mlp": 46, "depth": 1 + (name not in FUSIONS), "tied": False}
    decoder |= DECODERS.get(name, {})
    model = replace(recipe.model, decoder=replace(recipe.model.decoder, **decoder))
    model = replace(model, fusion=FUSIONS.get(name, model.fusion))
    settings = {"steps": 3, "save_every": 3, "data": MIXED, "learn": EVERYTHING} | STAGES.get(name, {})
    return alone(replace(recipe, model=model), "instruct", **settings | changes)


@pytest.fixture(autouse=True)
def stirred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever begins at zero, and would hide what is behind it from gradients, begins at random."""

    def stir(model: nn.Module) -> None:
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if name.endswith(("gate1", "gate2", "lora_b")):
                nn.init.normal_(p, std=0.5)

    first, beside = running.initial_model, running.adapt

    def initial(recipe: Recipe) -> Any:
        model = first(recipe)
        stir(model)
        return model

    def adapt(model: Any, learn: Any) -> None:
        beside(model, learn)
        stir(model)

    monkeypatch.setattr(running, "initial_model", initial)
    monkeypatch.setattr(running, "adapt", adapt)


def ended(processes: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def trained(recipe: Recipe, folder: Path, launch: Launch, count: int, tensor: int, until: int = 0) -> None:
    """A run of so many processes in a folder, so many of them in a group; ended after some step like one that dies."""

    def work() -> None:
        for step in run(recipe, folder, workers=0, shard=True, tensor_parallel=tensor):
            if step.step == until:
                break

    assert ended(launch(work, count)) == [0] * count


def trace(folder: Path, what: str = "loss") -> list[float]:
    return [json.loads(line)[what] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    return final_model(recipe, folder)[0].state_dict()


def assert_alike(recipe: Recipe, one: Path, other: Path) -> None:
    """Losses, weights, and norms of gradients, which the weights would not tell: to Adam all lengths are alike."""
    assert trace(one) == pytest.approx(trace(other), rel=1e-6, abs=0)
    assert trace(one, "norm") == pytest.approx(trace(other, "norm"), rel=1e-5, abs=0)
    mine, theirs = weights(recipe, one), weights(recipe, other)
    for name, value in mine.items():
        assert (value - theirs[name]).norm() <= 1e-6 * theirs[name].norm() + 1e-7, name


@pytest.mark.parametrize("name", [*DECODERS, *STAGES])
def test_two_that_share_blocks_are_one(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch, name: str) -> None:
    chosen, one, two = stage(recipe, alone, name), fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    trained(chosen, two, launch, 2, 2)
    assert_alike(chosen, two, one)


@pytest.mark.parametrize("name", FUSIONS)
def test_two_groups_of_two_are_one(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch, name: str) -> None:
    """Of the groups one has pictures and the other none; neither waits for the other in vain."""
    chosen, one, four = stage(recipe, alone, name), fresh("one"), fresh("four")
    list(run(chosen, one, workers=0))
    trained(chosen, four, launch, 4, 2)
    assert_alike(chosen, four, one)


def test_in_bf16_they_stay_near_one(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch) -> None:
    chosen, one, two = stage(recipe, alone, precision="bf16"), fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    trained(chosen, two, launch, 2, 2)
    assert trace(two) == pytest.approx(trace(one), rel=0.02)


def test_they_are_looked_after_as_one(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch) -> None:
    chosen, one, two = stage(recipe, alone, guard_every=1), fresh("one"), fresh("two")
    list(run(chosen, one, workers=0))
    trained(chosen, two, launch, 2, 2)
    found = []
    for folder in (two, one):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([row["guard"] if "guard" in row else {"loss": row["loss"]} for row in rows])
    assert len(found[0]) == 6
    for mine, theirs in zip(*found, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_nan_on_one_is_refused_on_all(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch) -> None:
    folder, chosen = fresh("run"), stage(recipe, alone)

    def work() -> None:
        backward = Trainer.backward

        def broken(self: Trainer, batch: object, counts: object) -> dict[str, Tensor]:
            found = backward(self, batch, counts)  # type: ignore[arg-type]
            if distributed.rank() == 1 and self.step == 1:
                self.parameters["decoder.blocks.0.feedforward.down.weight"].grad.fill_(float("nan"))  # type: ignore[union-attr]
            return found

        Trainer.backward = broken  # type: ignore[method-assign,assignment]
        applied = [step.applied for step in run(chosen, folder, workers=0, shard=True, tensor_parallel=2)]
        assert applied == [True, False, True]

    assert ended(launch(work)) == [0, 0]
    assert all(torch.isfinite(value).all() for value in weights(chosen, folder).values())


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_a_run_goes_on_bit_for_bit_and_on_any_mesh(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch) -> None:
    chosen = stage(recipe, alone, save_every=1)
    one, whole, stopped, apart, joined = map(fresh, ("one", "whole", "stopped", "apart", "joined"))
    list(run(chosen, one, workers=0))
    trained(chosen, whole, launch, 2, 2)
    trained(chosen, stopped, launch, 2, 2, until=2)  # of which one is saved
    shutil.copytree(stopped, apart, dirs_exist_ok=True)
    trained(chosen, stopped, launch, 2, 2)
    assert trace(stopped)[2:] == trace(whole)[1:]
    mine, theirs = weights(chosen, stopped), weights(chosen, whole)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    list(run(chosen, apart, workers=0))
    for step in run(chosen, joined, workers=0):
        if step.step == 2:
            break
    trained(chosen, joined, launch, 2, 2)
    for folder in (apart, joined):
        assert trace(folder)[2:] == pytest.approx(trace(one)[1:], rel=1e-6, abs=0)


def test_every_mesh_reads_and_writes_the_same_bits(recipe: Recipe, fresh: Fresh, alone: Alone, launch: Launch) -> None:
    """One saves; others go on from it and save what they have read, each in parts of its own."""
    chosen, folder = stage(recipe, alone, steps=1), fresh("run")
    list(run(chosen, folder, workers=0))
    place = folder / "checkpoints" / "instruct"
    before = checkpoints.load(place / "step-0000001")

    def saved_again(self: object, *_: object) -> list[object]:
        self.save()  # type: ignore[attr-defined]
        return []

    (folder / "run.yaml").unlink()  # which would not let a stage become longer
    for count, tensor in ((4, 2), (2, 2), (2, 1)):

        def again(tensor: int = tensor) -> None:
            Trainer.run = saved_again  # type: ignore[method-assign,assignment]
            longer = replace(chosen, stages=(replace(chosen.stages[0], steps=2),))
            list(run(longer, folder, workers=0, shard=True, tensor_parallel=tensor))

        assert ended(launch(again, count)) == [0] * count
        assert len(list((place / "step-0000001").glob(f"model.*-of-{count}.safetensors"))) == count
        after = checkpoints.load(place / "step-0000001")
        for group in ("model", "optimizer"):
            assert after.tensors[group].keys() == before.tensors[group].keys()
            for key, value in before.tensors[group].items():
                assert torch.equal(after.tensors[group][key], value), key


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("decoder", "changes", "count", "told"),
    [
        ({}, {}, 4, "4 cannot share out the heads of keys of the decoder alike, of which there are 2"),
        ({"kv_heads": 4}, {}, 4, "4 cannot share out the hidden numbers of the decoder alike, of which there are 46"),
        ({"scores": Scores(alibi=True)}, {}, 2, "a decoder with scores.alibi needs all of its heads"),
        ({}, {"batch": 2}, 2, "4 processes cannot share 2 samples"),
        ({}, {}, 3, "8 processes cannot stand in groups of 3"),
    ],
)
def test_what_cannot_be_shared_out_is_told_in_one_line(
    recipe: Recipe, alone: Alone, decoder: dict[str, Any], changes: dict[str, Any], count: int, told: str
) -> None:
    chosen = stage(recipe, alone, **{"batch": 8} | changes)
    chosen = replace(chosen, model=replace(chosen.model, decoder=replace(chosen.model.decoder, **decoder)))
    with pytest.raises(ConfigError, match=told) as found:
        list(plan(chosen, world=8, shard=True, tensor_parallel=count))
    assert "\n" not in str(found.value)


def test_cross_attention_has_heads_of_its_own_and_an_encoder_decoder_blocks(
    recipe: Recipe, folder: Path, alone: Alone
) -> None:
    chosen = stage(recipe, alone, "cross-attention", batch=8)
    model = replace(chosen.model, fusion=replace(FUSIONS["cross-attention"], heads=3))  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="heads of the cross-attention alike, of which there are 3"):
        list(plan(replace(chosen, model=model), world=2, shard=True, tensor_parallel=2))
    beside = Seq2SeqConfig(vocab_size=480, width=24, heads=2, head_dim=12, mlp=48, encoder_depth=1, decoder_depth=1)
    chosen = replace(stage(recipe, alone), model=replace(recipe.model, decoder=beside))
    with pytest.raises(ConfigError, match="an encoder-decoder has none"):
        list(plan(chosen, world=2, shard=True, tensor_parallel=2))
    with pytest.raises(ConfigError, match="tensor parallelism of 2 is for a model in shards"):
        list(run(stage(recipe, alone), folder, tensor_parallel=2))


# ---------------------------------------------------------------------------------------------------------- 1,024 ranks


@pytest.mark.parametrize("rank", [0, 1, 9, 1023])
def test_a_mesh_of_128_by_8_on_a_backend_that_only_pretends(
    recipe: Recipe, tokenizer: Tokenizer, alone: Alone, rank: int, pretended: Pretended
) -> None:
    """One of 1,024 processes: its group's samples, its heads, its columns, and of those its rows."""
    model = replace(recipe.model, decoder=replace(recipe.model.decoder, heads=8, kv_heads=8, head_dim=4, mlp=2048))
    chosen = alone(replace(recipe, model=model), "instruct", batch=128, accumulate=8, learn=EVERYTHING)

    def work() -> None:
        built = initial_model(chosen)
        whole = {name: tuple(p.shape) for name, p in built.named_parameters()}
        objective = objective_of(chosen.stages[0], chosen, tokenizer, built)
        trainer = Trainer(chosen, chosen.stages[0], built, objective, Path("nowhere"), shard=True, tensor_parallel=8)
        assert (trainer.groups.rank, trainer.groups.size, trainer.groups.place) == (rank // 8, 128, rank % 8)
        found = {name: tuple(p.to_local().shape) for name, p in trainer.model.named_parameters()}  # type: ignore[attr-defined]
        block = "decoder.blocks.0."
        group = rank // 8
        assert found[f"{block}feedforward.up.weight"] == (2048 // 8 // 128, 24)
        assert found[f"{block}feedforward.down.weight"] == (1 if group < 24 else 0, 2048 // 8)
        assert found[f"{block}attention.q.weight"] == (1 if group < 32 // 8 else 0, 24)
        assert found[f"{block}norm1.weight"] == (1 if group < 24 else 0,)
        rows = -(-whole["encoder.patch.weight"][0] // 1024)
        assert found["encoder.patch.weight"][0] == max(0, min(rows, whole["encoder.patch.weight"][0] - rank * rows))

    pretended(work, rank, 1024)
