"""CLIP and matching against the papers' formulas, and the negatives that matching draws."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sightline.core.errors import ConfigError
from sightline.data.batch import Batch
from sightline.fusion.qformer import QFormerConfig
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM
from sightline.training.chance import luck
from sightline.training.contrast import CLIP, Matching, Scores, clip_loss, hard_negatives
from sightline.training.loader import Batches
from sightline.training.recipe import Recipe
from sightline.training.run import initial_model, processor_of
from sightline.training.settings import CLIPConfig


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> VLM:
    return initial_model(recipe)


def batch_of(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> Batch:
    stage = replace(recipe.stages[0], batch=5)
    return Batches(stage, 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))[0]


def test_clip_is_the_formula_of_the_paper() -> None:
    scores = torch.randn(6, 6)
    x = scores.double().numpy()
    wanted = 0.0
    for rows in (x, x.T):
        wanted -= sum(rows[i, i] - math.log(np.exp(rows[i]).sum()) for i in range(6)) / 2
    total, count = clip_loss(Scores(scores, scores.T))
    assert float(total) == pytest.approx(wanted, rel=1e-5) and count == 6


def test_clip_compares_directions_at_its_temperature(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> None:
    batch = batch_of(recipe, tokenizer, model)
    objective = CLIP(16, 480, tokenizer.control("<pad>"), CLIPConfig(temperature=0.2))
    assert batch.patches is not None
    features = model.encoder(batch.patches).dense()
    images, texts = objective.compared(features, batch.extra["captions"])
    wanted = F.cosine_similarity(images[:, None], texts[None], dim=-1) / 0.2
    torch.testing.assert_close(
        objective.scores(features, batch.extra["captions"]).pictures, wanted, rtol=1e-4, atol=1e-4
    )
    total, count = objective(model, batch)["clip"]
    torch.testing.assert_close(total, clip_loss(Scores(wanted, wanted.T))[0], rtol=1e-4, atol=1e-4)
    assert count == 5 == objective.counts(batch)["clip"]
    with torch.no_grad():
        objective.log_scale.fill_(9.0)
    assert objective.scores(features, batch.extra["captions"]).pictures.abs().max() <= 100.001


def test_hard_negatives_are_wrong_and_likely() -> None:
    scores = torch.zeros(4, 4)
    scores[0] = torch.tensor([9.0, 9.0, -9.0, 9.0])  # its own caption is barred, the second is equal to it
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    both, found = Scores(scores, scores.T), []
    for turn in range(50):
        chance = torch.stack([luck(f"{turn} {i}", 2) for i in range(4)])
        captions, pictures = hard_negatives(both, same, chance)
        found.append((captions.tolist(), pictures.tolist()))
        assert captions[0] == 3 and pictures[3] == 0
        assert not same[torch.arange(4), captions].any() and not same[pictures, torch.arange(4)].any()
        for part in range(2):  # a half of the pairs draws what it would draw as one of the whole
            rows = slice(2 * part, 2 * part + 2)
            half = Scores(scores[rows], scores.T[rows], first=2 * part)
            drawn = hard_negatives(half, same[rows], chance[rows])
            assert [x.tolist() for x in drawn] == [captions[rows].tolist(), pictures[rows].tolist()]
    assert len({str(each) for each in found}) > 10
    # where all are equal: any other
    captions, pictures = hard_negatives(both, torch.ones(4, 4, dtype=torch.bool), chance)
    assert not (captions == torch.arange(4)).any() and not (pictures == torch.arange(4)).any()


def test_matching_tells_true_pairs_from_wrong_ones(
    recipe: Recipe, tokenizer: Tokenizer, model: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sightline.training import contrast

    batch = batch_of(recipe, tokenizer, model)
    wrong = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([4, 3, 0, 2, 1])
    monkeypatch.setattr(contrast, "hard_negatives", lambda scores, same, chance: wrong)
    pad = tokenizer.control("<pad>")
    objective = Matching(model, 480, pad)
    assert batch.patches is not None and objective.look is not None
    features, captions = model.encoder(batch.patches).dense(), batch.extra["captions"]
    wanted = torch.zeros(())
    pairs = [(i, i, 1) for i in range(5)] + [(i, int(wrong[0][i]), 0) for i in range(5)]
    for picture, text, truth in pairs + [(int(wrong[1][i]), i, 0) for i in range(5)]:
        words = objective.contrast.embedding(captions[text][captions[text] != pad])[None]
        read = objective.head(words + objective.look(words, features[picture][None])).mean(1)
        wanted = wanted - read.log_softmax(-1)[0, truth]
    terms = objective(model, batch)
    torch.testing.assert_close(terms["itm"][0], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["itm-contrast"], clip_loss(objective.contrast.scores(features, captions)))
    assert objective.counts(batch) == {"itm": 15, "itm-contrast": 5} == {k: count for k, (_, count) in terms.items()}


def test_a_qformer_that_reads_looks_itself(recipe: Recipe, tokenizer: Tokenizer) -> None:
    fusion = QFormerConfig(
        inputs=16, width=24, queries=3, hidden=8, depth=2, heads=2, mlp=16, vocab_size=480, max_length=64
    )
    model = initial_model(replace(recipe, model=replace(recipe.model, fusion=fusion)))
    batch = batch_of(recipe, tokenizer, initial_model(recipe))
    pad = tokenizer.control("<pad>")
    objective = Matching(model, 480, pad)
    assert objective.look is None and batch.patches is not None
    features, captions = model.encoder(batch.patches).dense(), batch.extra["captions"]
    found = objective.match(model, features, captions)
    for i in range(5):
        real = captions[i][captions[i] != pad][None]
        wanted = objective.head(model.fusion.ask(features[i][None], real)).mean(1)[0]
        torch.testing.assert_close(found[i], wanted, rtol=1e-4, atol=1e-4)
    objective(model, batch)["itm"][0].backward()
    assert all(layer.words is not None for layer in model.fusion.layers)
    assert model.fusion.queries.grad is not None and float(model.fusion.queries.grad.abs().max()) > 0
    small = initial_model(replace(recipe, model=replace(recipe.model, fusion=replace(fusion, vocab_size=100))))
    with pytest.raises(ConfigError, match="captions of 480 words for a Q-Former that reads 100"):
        Matching(small, 480, pad)
