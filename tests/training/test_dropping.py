"""What blocks leave out by chance: which ones do, how much, and that nothing else changes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sightline.core.errors import ConfigError
from sightline.core.layout import causal_layout
from sightline.core.patches import Patches
from sightline.data.batch import Batch
from sightline.fusion.cross_attention import CrossAttentionConfig
from sightline.fusion.qformer import QFormerConfig
from sightline.fusion.visual_expert import VisualExpertConfig
from sightline.model import VLM
from sightline.training import dropping
from sightline.training.dropping import drop_path, leave_out
from sightline.training.recipe import Recipe, freeze, learning_rates
from sightline.training.run import initial_model, run

Alone = Callable[..., Recipe]


def told(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, objective: nn.Module | None = None) -> dict[str, float]:
    """The branches of a stage's model that leave something out, and their shares."""
    model, stage = initial_model(recipe), recipe.stages[0]
    freeze(model, learning_rates(model, stage.learn))
    found: dict[int, float] = {}
    monkeypatch.setattr(dropping, "through", lambda branch, dropped: found.update({id(branch): dropped.keywords["p"]}))
    leave_out(model, objective or nn.Module(), stage)
    both = nn.ModuleDict({"model": model, "objective": objective or nn.Module()})
    return {name.removeprefix("model."): found[id(m)] for name, m in both.named_modules() if id(m) in found}


def test_dropout_is_in_branches_of_blocks_that_learn(
    recipe: Recipe, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = {"decoder.blocks.1.*": 1e-3, "encoder.*": 1e-3, "fusion.*": 1e-3}
    deep = replace(recipe, model=replace(recipe.model, decoder=replace(recipe.model.decoder, depth=2)))
    plain = told(alone(deep, "instruct", learn=learn, dropout=0.1), monkeypatch)
    assert plain == {"decoder.blocks.1.attention": 0.1, "decoder.blocks.1.feedforward": 0.1}
    fusion = QFormerConfig(inputs=16, width=24, queries=3, hidden=8, depth=2, heads=2, mlp=16, cross_every=2)
    qformer = replace(recipe, model=replace(recipe.model, fusion=fusion))
    found = told(alone(qformer, "instruct", learn={"fusion.*": 1e-3}, dropout=0.1), monkeypatch)
    parts = ("0.attention", "0.cross", "0.feedforward", "1.attention", "1.feedforward")
    assert found == dict.fromkeys([f"fusion.layers.{part}" for part in parts], 0.1)


def test_paths_are_dropped_more_the_deeper_they_are(
    recipe: Recipe, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = replace(recipe, model=replace(recipe.model, image=replace(recipe.model.image, depth=3)))
    found = told(alone(deep, "instruct", learn={"encoder.*": 1e-3}, drop_path=0.4), monkeypatch)
    rates = [(0, 0.0), (1, 0.2), (2, 0.4)]
    assert found == {f"encoder.blocks.{k}.{part}": p for k, p in rates for part in ("attention", "feedforward")}


def test_a_branch_is_left_out_whole_and_made_up_for() -> None:
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 2) + 1
    out = drop_path(x, 0.25, training=True)
    kept = out.flatten(1).ne(0).all(1)
    assert bool((kept | out.flatten(1).eq(0).all(1)).all()) and float(kept.float().mean()) == pytest.approx(
        0.75, abs=0.03
    )
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    assert torch.equal(drop_path(x, 0.25, training=False), x) and torch.equal(drop_path(x, 0.0, training=True), x)


@pytest.mark.parametrize("fusion", ["projector", "cross-attention"])
def test_what_is_left_out_never_reaches_the_stream(recipe: Recipe, alone: Alone, fusion: str) -> None:
    """With next to everything left out a block passes on what came in; in evaluation it is as if nothing were there."""
    if fusion == "cross-attention":
        settings = CrossAttentionConfig(inputs=16, width=24, heads=2, mlp=48, interval=1, start=0)
        recipe = replace(recipe, model=replace(recipe.model, fusion=settings))
    stage = alone(recipe, "instruct", learn={"*": 1e-3}, dropout=0.999999, drop_path=0.999999).stages[0]
    model, before = initial_model(recipe), initial_model(recipe)
    for name, p in (*model.named_parameters(), *before.named_parameters()):
        if "cross_gate" in name:
            nn.init.ones_(p)
    leave_out(model, nn.Module(), stage)
    seen: list[tuple[Tensor, Tensor]] = []
    for block in (*model.decoder.blocks, model.encoder.blocks[-1]):
        block.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    batch = batch_of(recipe, model)
    model.train()(batch)
    last = len(model.encoder.blocks) - 1
    assert seen and all(torch.equal(x, out) for x, out in (seen if last else seen[1:]))
    torch.testing.assert_close(model.eval()(batch), before.eval()(batch), rtol=0, atol=0)


def batch_of(recipe: Recipe, model: VLM) -> Batch:
    """A picture and five words that look at it."""
    image = recipe.model.image
    grid = (1, image.grid, image.grid)
    slots = model.num_tokens(grid)
    patches = Patches(torch.rand(image.grid**2, image.patch_dim), (grid,))
    layout = causal_layout(1, slots + 5)
    layout = replace(layout, item=torch.tensor([[1] * (slots + 5)]))
    return Batch(torch.arange(slots + 5)[None] + 9, layout, torch.arange(slots), patches)


def test_a_stage_goes_on_bit_for_bit_with_blocks_computed_again(
    recipe: Recipe, fresh: Callable[[str], Path], alone: Alone
) -> None:
    chosen = alone(recipe, "instruct", learn={"*": 1e-3}, dropout=0.2, drop_path=0.5, steps=4, save_every=2)
    whole = [step.loss for step in run(chosen, fresh("whole"), workers=0)]
    again = replace(chosen, stages=(replace(chosen.stages[0], recompute=True),))
    assert [step.loss for step in run(again, fresh("again"), workers=0)] == pytest.approx(whole, rel=1e-5)
    plain = replace(chosen, stages=(replace(chosen.stages[0], dropout=0.0, drop_path=0.0),))
    assert [step.loss for step in run(plain, fresh("plain"), workers=0)] != whole
    folder = fresh("stopped")
    for step in run(chosen, folder, workers=0):
        if step.step == 3:
            break
    assert [step.loss for step in run(chosen, folder, workers=0)] == whole[2:]


def test_what_cannot_leave_anything_out_is_told(recipe: Recipe, alone: Alone) -> None:
    expert = replace(recipe, model=replace(recipe.model, fusion=VisualExpertConfig(recipe.model.fusion)))
    cases = [
        (alone(recipe, "align", dropout=0.1), "dropout is for blocks of decoder and fusion, and none of them learns"),
        (alone(expert, "instruct", learn={"decoder.*": 1e-3}, dropout=0.1), "one with a visual expert has none"),
        (
            alone(recipe, "instruct", learn={"decoder.*": 1e-3}, drop_path=0.1),
            "drop_path is for an encoder",
        ),
    ]
    for chosen, wanted in cases:
        model, stage = initial_model(chosen), chosen.stages[0]
        freeze(model, learning_rates(model, stage.learn))
        with pytest.raises(ConfigError, match=wanted):
            leave_out(model, nn.Module(), stage)
