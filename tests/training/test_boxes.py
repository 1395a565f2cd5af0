"""Box losses by hand."""

from dataclasses import replace

import pytest
import torch

from sightline.core.geometry import generalized_iou
from sightline.language.tokenizer import Tokenizer
from sightline.training.boxes import Boxes, corners
from sightline.training.loader import Batches
from sightline.training.recipe import Recipe
from sightline.training.run import initial_model, processor_of
from sightline.training.settings import BoxesConfig


def test_boxes_are_read_where_objects_are(recipe: Recipe, tokenizer: Tokenizer) -> None:
    model = initial_model(recipe)
    stage = replace(recipe.stages[0], batch=4, objective={"boxes": 1.0})
    batch = Batches(stage, 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))[0]
    objective = Boxes(16, BoxesConfig(l1=3.0, giou=0.5))
    assert batch.patches is not None
    features = [item.unflatten(0, (2, 2)) for item in model.encoder(batch.patches).items()]
    away = overlap = torch.zeros(())
    some = 0
    for i, j, k in (batch.extra["dense"]["object"] == 1).nonzero().tolist():
        x, y, w, h = objective.head(features[i][j, k]).sigmoid()
        found = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
        wanted = batch.extra["dense"]["box"][i, j, k]
        away, overlap, some = (
            away + (found - wanted).abs().sum(),
            overlap + 1 - generalized_iou(found, wanted),
            some + 1,
        )
    terms = objective(model, batch)
    torch.testing.assert_close(terms["box-l1"][0], 3 * away, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["box-giou"][0], 0.5 * overlap, rtol=1e-4, atol=1e-5)
    assert objective.counts(batch) == {"box-l1": some, "box-giou": some} and some > 3
    assert {name: count for name, (_, count) in terms.items()} == objective.counts(batch)


def test_a_picture_without_objects_teaches_nothing(recipe: Recipe, tokenizer: Tokenizer) -> None:
    model = initial_model(recipe)
    stage = replace(recipe.stages[0], objective={"boxes": 1.0})
    batch = Batches(stage, 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))[0]
    batch.extra["dense"]["object"].zero_()
    terms = Boxes(16, BoxesConfig())(model, batch)
    sum(total for total, _ in terms.values()).backward()  # type: ignore[union-attr]
    assert [(float(total.detach()), count) for total, count in terms.values()] == [(0.0, 0)] * 2


def test_corners() -> None:
    assert corners(torch.tensor([[0.5, 0.4, 0.2, 0.6]])).tolist()[0] == pytest.approx([0.4, 0.1, 0.6, 0.7])
