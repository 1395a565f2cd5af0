"""What a batch takes is known beforehand: no more than it does take, and not much less; and so is what there is."""

import os
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sightline.core.layout import causal_layout
from sightline.core.patches import Patches
from sightline.data.batch import Batch
from sightline.language.tokenizer import Tokenizer
from sightline.training.adapters import Lora, adapt
from sightline.training.budget import Budget, budget_of, room
from sightline.training.loader import Batches
from sightline.training.recipe import Recipe
from sightline.training.run import initial_model, objective_of, processor_of
from sightline.training.trainer import Trainer

Alone = Callable[..., Recipe]
EVERYTHING = {"encoder.*": 1e-3, "fusion.*": 1e-3, "decoder.*": 1e-3}


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        ("text", {"learn": {"decoder.*": 1e-3}}),
        ("questions", {"learn": EVERYTHING}),
        ("questions", {"learn": {"fusion.*": 1e-3}}),
        ("captions", {"learn": {"decoder.*": Lora(4)}}),
        ("pairs", {"learn": {"decoder.*": 1e-3}, "objective": {"dpo": 1.0}}),
        ("pictures", {"learn": {"encoder.*": 1e-3}, "objective": {"dense": 1.0}}),
        ("questions", {"learn": EVERYTHING, "recompute": True}),
    ],
)
def test_a_batch_takes_at_least_that_and_not_twice_as_much(
    recipe: Recipe, tokenizer: Tokenizer, tmp_path: Path, alone: Alone, data: str, changes: dict[str, object]
) -> None:
    chosen = alone(recipe, "instruct", data={data: 1.0}, batch=6, **changes)
    stage, model = chosen.stages[0], initial_model(chosen)
    adapt(model, stage.learn)
    trainer = Trainer(chosen, stage, model, objective_of(stage, chosen, tokenizer, model), tmp_path)
    batch = Batches(stage, 0, 0, chosen.sources, processor_of(chosen, tokenizer, model))[0]
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point() and x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        trainer.objective(trainer.model, batch)
    real = sum(x.untyped_storage().nbytes() for x in kept.values())
    told = trainer.memory.budget.of(batch)
    print(f"{data}: {told:,} of {real:,} bytes")
    assert real / 2 < told <= 1.02 * real


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        ("text", {"learn": {"decoder.*": 1e-3}}),
        ("questions", {"learn": EVERYTHING}),
        ("pictures", {"learn": {"encoder.*": 1e-3}, "objective": {"dense": 1.0}}),
        ("questions", {"learn": {"fusion.*": 1e-3}, "recompute": True}),
    ],
)
def test_scores_that_attention_keeps_on_a_cpu_in_bf16_are_foreseen(
    recipe: Recipe, tokenizer: Tokenizer, tmp_path: Path, alone: Alone, data: str, changes: dict[str, object]
) -> None:
    chosen = alone(recipe, "instruct", data={data: 1.0}, batch=6, precision="bf16", **changes)
    stage, model = chosen.stages[0], initial_model(chosen)
    trainer = Trainer(chosen, stage, model, objective_of(stage, chosen, tokenizer, model), tmp_path)
    batch = Batches(stage, 0, 0, chosen.sources, processor_of(chosen, tokenizer, model))[0]
    square = {batch.ids.shape[1]} if batch.ids.numel() else {recipe.model.image.grid**2}
    square |= {recipe.model.image.grid**2} if any("encoder" in pattern for pattern in stage.learn) else set()
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 3 and x.shape[1] == x.shape[2] and x.shape[1] in square:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), trainer.autocast():
        trainer.objective(trainer.model, batch)
    found, fused = trainer.memory.budget, budget_of(chosen, stage, device="cuda")
    without = replace(found, token_pair=0.0, text_pair=0.0, patch_pair=0.0, alone_pair=0.0)
    assert found.of(batch) - without.of(batch) == pytest.approx(sum(x.nbytes for x in kept.values()), abs=8)
    assert bool(kept) != stage.recompute
    assert fused.token_pair == fused.text_pair == fused.patch_pair == fused.alone_pair == 0


def test_scores_of_rows_too_long_for_them_are_not_counted() -> None:
    found = Budget(text=1.0, text_pair=1.0, alone_pair=1.0, usual=4)
    ids = torch.zeros(2, 1024, dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int64)
    assert found.of(Batch(ids, causal_layout(2, 1024), none)) == 2 * 1024 * 1025
    ids = torch.zeros(2, 1025, dtype=torch.int64)
    assert found.of(Batch(ids, causal_layout(2, 1025), none)) == 2 * 1025
    patches = Patches(torch.zeros(2 + 8 + 1056, 1), ((1, 1, 2), (1, 2, 4), (1, 33, 32)))
    assert found.of(Batch(ids[:, :0], causal_layout(2, 0), none, patches)) == 2 * 2 + 8 * 4


def test_nothing_is_foreseen_of_no_tokens_and_more_of_more(recipe: Recipe, alone: Alone) -> None:
    found = budget_of(alone(recipe, "align"), alone(recipe, "align").stages[0])
    assert found.text == 0 < found.token  # text alone does not reach a projector
    assert Budget() == Budget(0, 0, 0, 0, 0)
    again = alone(recipe, "align", recompute=True)
    assert budget_of(again, again.stages[0]).text == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are told by Linux")
@pytest.mark.parametrize("limit", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_what_there_is_left_is_what_limits_leave(limit: int) -> None:
    """A child may take 300 MB more, takes 200 of them, and has about 100 left."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            used = "VmSize" if limit == resource.RLIMIT_AS else "VmData"
            (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if used in each]
            most = (int(line.split()[1]) << 10) + (300 << 20)
            resource.setrlimit(limit, (most, most))
            before = room(torch.device("cpu"))
            held = torch.ones(50 << 20)  # float32
            after = room(torch.device("cpu"))
            code = 0 if 280 << 20 < before <= 301 << 20 and 80 << 20 < after < 105 << 20 and len(held) else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
