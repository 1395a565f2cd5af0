"""Alignment by words against sums made by hand; places that begin alike."""

from dataclasses import replace

import torch

from sightline.grounding.codecs import LocationTokens
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM
from sightline.training.alignment import BACKGROUND, ROLES, Words, smooth_places, words_of
from sightline.training.loader import Batches
from sightline.training.recipe import Recipe
from sightline.training.run import CONTROLS, VALUES, initial_model, processor_of


def test_the_target_is_the_sum_of_words_and_places(recipe: Recipe, tokenizer: Tokenizer) -> None:
    model: VLM = initial_model(recipe)
    source = replace(recipe.sources["pictures"], patch=16)
    stage = replace(recipe.stages[0], batch=4)
    batch = Batches(stage, 0, 0, {"pictures": source}, processor_of(recipe, tokenizer, model))[0]
    # the tiny encoder has fewer patches than the truth of a picture of 128 pixels: a corner of it is as good
    dense = {name: value[:, :2, :2] for name, value in batch.extra["dense"].items()}
    batch = replace(batch, extra={**batch.extra, "dense": dense})
    places = LocationTokens()
    objective = Words(words_of(tokenizer, VALUES), tokenizer.control(places.name(0)), places.bins)
    total, count = objective(model, batch)["words"]
    assert count == objective.counts(batch)["words"] == 16

    assert batch.patches is not None
    found = model.fusion(model.encoder(batch.patches)).tokens.view(4, 2, 2, -1)
    wanted = 0.0
    for item in range(4):
        for row in range(2):
            for column in range(2):
                here = (item, row, column)
                there = bool(dense["object"][here] == 1)
                target = torch.zeros(found.shape[-1])
                if there:
                    for name, values in VALUES.items():
                        ids = tokenizer.encode(f" {values[dense[name][here]]}")
                        target += model.decoder.embed(torch.tensor(ids)).sum(0) / len(ids) ** 0.5
                    for shift, share in zip(ROLES, dense["box"][here].tolist(), strict=True):
                        place = tokenizer.control(places.name(min(int(share * places.bins), places.bins - 1)))
                        target += model.decoder.embed(torch.tensor(place)).roll(shift)
                error = (found[here] - target).square().mean()
                wanted += float(error) * (1.0 if there else BACKGROUND)
    assert abs(float(total.detach()) - wanted) < 1e-3 * wanted


def test_only_the_projector_is_pulled(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """The embeddings are the aim: nothing of the decoder is moved towards the pictures."""
    model = initial_model(recipe)
    batch = Batches(replace(recipe.stages[0], batch=2), 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))[0]
    dense = {name: value[:, :2, :2].expand(-1, 2, 2, *value.shape[3:]) for name, value in batch.extra["dense"].items()}
    places = LocationTokens()
    objective = Words(words_of(tokenizer, VALUES), tokenizer.control(places.name(0)), places.bins)
    total, _ = objective(model, replace(batch, extra={"dense": dense}))["words"]
    total.backward()
    assert all(parameter.grad is None for parameter in model.decoder.parameters())
    assert all(parameter.grad is not None for parameter in model.fusion.parameters())


def test_neighbouring_places_begin_alike(recipe: Recipe) -> None:
    model = initial_model(recipe)
    first, bins = CONTROLS.index("<loc000>"), LocationTokens().bins
    table = torch.nn.functional.normalize(model.decoder.embedding.weight[first : first + bins].detach(), dim=-1)
    alike = table @ table.T
    near = torch.stack([alike[k, k + 1] for k in range(bins - 1)])
    far = torch.stack([alike[k, k + 40] for k in range(bins - 40)])
    assert float(near.min()) > 0.9
    assert float(far.max()) < 0.7


def test_smooth_places_touch_no_other_row() -> None:
    table = torch.zeros(40, 32)
    smooth_places(table, 10, 16)
    assert bool((table[10:26].norm(dim=1) > 0).all())
    assert not bool(table[:10].any()) and not bool(table[26:].any())
