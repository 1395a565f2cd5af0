"""Losses against values computed by hand in numpy, and against torch's own cross-entropy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.core.errors import ConfigError
from sightline.data.batch import IGNORE, Batch
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM
from sightline.training.loader import Batches
from sightline.training.objectives import BINS, DENSE_WEIGHTS, Dense, NextToken, SigLIP, Total, siglip_loss, smoothed
from sightline.training.recipe import Recipe
from sightline.training.run import initial_model, objective_of, processor_of


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> VLM:
    return initial_model(recipe)


def batch_of(recipe: Recipe, tokenizer: Tokenizer, model: VLM, stage: str) -> Batch:
    chosen = replace(recipe.stages[recipe.stage(stage)], batch=5)
    return Batches(chosen, 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))[0]


# ---------------------------------------------------------------------------------------------------------- next token


@pytest.mark.parametrize("chunk", [1, 7, 8192])
@pytest.mark.parametrize("stage", ["language", "instruct"])
def test_next_token_is_cross_entropy_of_all_logits(
    recipe: Recipe, tokenizer: Tokenizer, model: VLM, stage: str, chunk: int
) -> None:
    batch = batch_of(recipe, tokenizer, model, stage)
    assert batch.labels is not None
    total, count = NextToken(chunk=chunk)(model, batch)["next-token"]
    logits = model.logits(model(batch)).flatten(0, 1)
    wanted = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
    assert torch.allclose(total, wanted, rtol=1e-6)
    learned = [p for name, p in model.named_parameters() if name.startswith("decoder.")]
    found, expected = torch.autograd.grad(total, learned), torch.autograd.grad(wanted, learned)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert count == int((batch.labels != IGNORE).sum()) == NextToken().counts(batch)["next-token"] > 0


def test_by_answer_a_long_one_counts_as_much_as_a_short_one(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> None:
    batch = batch_of(recipe, tokenizer, model, "instruct")
    assert batch.labels is not None
    labels = torch.full_like(batch.labels, IGNORE)
    labels[0, 4:5], labels[0, 7:10], labels[2, :2] = 5, 6, 7  # three answers, the last at the beginning of its row
    batch = replace(batch, labels=labels)
    objective = NextToken(by_answer=True)
    total, count = objective(model, batch)["answers"]
    loss = F.cross_entropy(model.logits(model(batch)).flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    assert torch.allclose(total, loss[0, 4] + loss[0, 7:10].mean() + loss[2, :2].mean(), rtol=1e-5)
    assert count == objective.counts(batch)["answers"] == 3


@pytest.mark.parametrize("by_answer", [False, True])
def test_each_source_has_a_term_of_its_own_weight(
    recipe: Recipe, tokenizer: Tokenizer, model: VLM, by_answer: bool
) -> None:
    """As OpenFlamingo adds up the loss of documents and a fifth of that of pairs, each a mean over its own tokens."""
    stage = replace(recipe.stages[1], data={"text": 1.0, "captions": 1.0}, batch=4)
    batch = Batches(stage, 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))[0]
    assert sorted(batch.extra["sources"]) == ["captions", "captions", "text", "text"] and batch.labels is not None
    objective = NextToken(by_answer=by_answer, sources={"text": 1.0, "captions": 0.2, "other": 3.0})
    found, plain = objective(model, batch), NextToken(by_answer=by_answer)
    for name, weight in (("text", 1.0), ("captions", 0.2)):
        theirs = torch.tensor([source != name for source in batch.extra["sources"]])
        alone = replace(batch, labels=batch.labels.masked_fill(theirs[:, None], IGNORE))
        total, count = plain(model, alone)[plain.name]
        torch.testing.assert_close(found[f"{plain.name} {name}"][0], weight * total)
        assert found[f"{plain.name} {name}"][1] == count > 0
    total, count = found[f"{plain.name} other"]
    assert float(total) == 0 and count == 0
    assert {name: count for name, (_, count) in found.items()} == objective.counts(batch)


@pytest.mark.parametrize("by_answer", [False, True])
def test_a_batch_that_teaches_nothing_is_zero_with_gradients(
    recipe: Recipe, tokenizer: Tokenizer, model: VLM, by_answer: bool
) -> None:
    batch = batch_of(recipe, tokenizer, model, "language")
    assert batch.labels is not None
    objective = NextToken(by_answer=by_answer)
    ((total, count),) = objective(model, replace(batch, labels=torch.full_like(batch.labels, IGNORE))).values()
    total.backward()
    assert (float(total.detach()), count) == (0.0, 0)


def test_places_are_learned_as_a_hill_over_their_neighbours() -> None:
    """Vocabulary of 12 whose ids 3 to 8 are six bins; rows that are no place stay plain cross-entropy."""
    objective = NextToken(first=3, count=6, sigma=1.5)
    logits = torch.randn(5, 12)
    labels = torch.tensor([3, 8, 0, 5, 11])
    log_p = logits.double().numpy()
    log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    wanted = 0.0
    for row, label in enumerate(labels.tolist()):
        if 3 <= label < 9:
            hill = np.exp(-((np.arange(6) - (label - 3)) ** 2) / (2 * 1.5**2))
            wanted -= (hill / hill.sum() * log_p[row, 3:9]).sum()
        else:
            wanted -= log_p[row, label]
    assert float(objective.loss(logits, labels)) == pytest.approx(wanted, rel=1e-6)


def test_a_narrow_hill_is_plain_cross_entropy() -> None:
    logits, labels = torch.randn(4, 12), torch.tensor([3, 4, 8, 1])
    narrow = NextToken(first=3, count=6, sigma=1e-3).loss(logits, labels)
    assert torch.allclose(narrow, F.cross_entropy(logits, labels, reduction="sum"))


def test_smoothed_targets() -> None:
    target = smoothed(torch.tensor([0, 2]), 4, 0.8).double().numpy()
    for row, bin in enumerate((0, 2)):
        hill = [math.exp(-((k - bin) ** 2) / (2 * 0.8**2)) for k in range(4)]
        assert target[row] == pytest.approx(np.array(hill) / sum(hill), rel=1e-6)


# -------------------------------------------------------------------------------------------------------------- SigLIP


def by_hand(images: Tensor, texts: Tensor, scale: float, bias: float) -> float:
    """The loss as arXiv:2303.15343 writes it, pair by pair."""
    x, y = images.double().numpy(), texts.double().numpy()
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    total = 0.0
    for i in range(len(x)):
        for j in range(len(y)):
            z = 1 if i == j else -1
            total += math.log(1 + math.exp(z * (-scale * float(x[i] @ y[j]) - bias)))
    return total


@pytest.mark.parametrize("autocast", [False, True])
def test_siglip_is_the_formula_of_the_paper(autocast: bool) -> None:
    images, texts = torch.randn(6, 8), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # its scores are never rounded to bf16
        total, count = siglip_loss(images, texts, torch.tensor(math.log(7.0)), torch.tensor(-3.0))
    assert float(total) == pytest.approx(by_hand(images, texts, 7.0, -3.0), rel=1e-5)
    assert count == 6


def test_siglip_pools_features_and_words(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> None:
    batch = batch_of(recipe, tokenizer, model, "encoder")
    pad = tokenizer.control("<pad>")
    objective = SigLIP(16, 480, pad)
    captions = batch.extra["captions"]
    assert (captions == pad).any() and (captions != pad).any(1).all()
    assert batch.patches is not None
    images = objective.image(torch.stack([item.mean(0) for item in model.encoder(batch.patches).items()]))
    words = [objective.embedding(row[row != pad]).mean(0) for row in captions]
    total, count = objective(model, batch)["siglip"]
    wanted = by_hand(images.detach(), objective.text(torch.stack(words)).detach(), 10.0, -10.0)
    assert float(total.detach()) == pytest.approx(wanted, rel=1e-5)
    assert count == objective.counts(batch)["siglip"] == 5


# --------------------------------------------------------------------------------------------------------------- dense


def test_dense_terms_by_hand() -> None:
    """Two pictures of 2 x 2 patches with one object each, every head as weights known to numpy."""
    classes = {"color": 3, "shape": 4, "size": 2, "texture": 2}
    objective = Dense(5, classes)
    features = torch.randn(2, 4, 5)
    where = [(0, 1), (1, 2)]  # picture, patch
    truth = {
        name: torch.full((2, 4), -1) for name in ("color", "shape", "size", "texture", "cover_color", "cover_shape")
    }
    truth |= {"object": torch.zeros(2, 4, dtype=torch.int64), "box": torch.zeros(2, 4, 4)}
    for k, (picture, patch) in enumerate(where):
        truth["object"][picture, patch] = 1
        for name in classes:
            truth[name][picture, patch] = k
        truth["box"][picture, patch] = torch.tensor([0.1, 0.2, 0.5, 0.9]) + 0.05 * k
    truth["cover_color"][0, :2], truth["cover_shape"][0, :2] = 2, 3
    extra = {"dense": {name: value.unflatten(1, (2, 2)) for name, value in truth.items()}}
    ids = torch.zeros(2, 0, dtype=torch.int64)
    batch = Batch(ids, None, ids.flatten(), extra=extra)  # type: ignore[arg-type]
    found = objective.on_features(features, batch)

    def scores_of(name: str, x: Tensor) -> np.ndarray:
        head = objective.heads[name]
        return x.double().numpy() @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()

    def softmax(scores: np.ndarray) -> np.ndarray:
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    seen = torch.stack([features[i, j] for i, j in where])
    for name in classes:
        wanted = -sum(softmax(scores_of(name, seen))[k, k] for k in range(2))
        assert float(found[name][0]) == pytest.approx(DENSE_WEIGHTS[name] * wanted, rel=1e-5), name
        assert found[name][1] == 2
    for name, shift in (("object", 0), ("cover_color", 1), ("cover_shape", 1)):
        labels = truth[name].flatten().numpy() + shift
        wanted = -softmax(scores_of(name, features.flatten(0, 1)))[np.arange(8), labels].sum()
        assert float(found[name][0]) == pytest.approx(DENSE_WEIGHTS[name] * wanted, rel=1e-5), name
        assert found[name][1] == 8
    scores = softmax(scores_of("box", seen).reshape(2, 4, BINS))
    wanted = 0.0
    for k, (picture, patch) in enumerate(where):
        for side in range(4):
            center = float(truth["box"][picture, patch, side]) * BINS - 0.5  # bin b covers b / 128 to (b + 1) / 128
            hill = np.exp(-((np.arange(BINS) - center) ** 2) / (2 * 1.5**2))
            wanted -= (hill / hill.sum() * scores[k, side]).sum()
    assert float(found["box"][0]) == pytest.approx(DENSE_WEIGHTS["box"] * wanted, rel=1e-5)
    assert objective.counts(batch) == {name: count for name, (_, count) in found.items()}


def test_pictures_without_objects_teach_no_attributes(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> None:
    batch = batch_of(recipe, tokenizer, model, "encoder")
    batch.extra["dense"]["object"].zero_()
    objective = objective_of(recipe.stages[0], recipe, tokenizer, model)
    terms = objective(model, batch)
    assert terms["color"][1] == terms["box"][1] == 0 and float(terms["color"][0].detach()) == 0.0
    sum(total for total, _ in terms.values()).backward()  # type: ignore[union-attr]
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)


# --------------------------------------------------------------------------------------------------------------- total


def test_total_weighs_its_terms_and_sees_once(
    recipe: Recipe, tokenizer: Tokenizer, model: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(recipe, tokenizer, model, "encoder")
    siglip = SigLIP(16, 480, 0)
    dense = Dense(16, {"color": 11, "shape": 10, "size": 2, "texture": 4})
    passes = []
    seen = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda patches: passes.append(1) or seen(patches))
    terms = Total({"dense": dense, "siglip": siglip}, {"dense": 1.0, "siglip": 0.3})(model, batch)
    assert len(passes) == 1
    assert torch.allclose(terms["siglip"][0], 0.3 * siglip(model, batch)["siglip"][0])
    alone = dense(model, batch)
    assert all(torch.allclose(terms[name][0], alone[name][0]) for name in alone)
    assert set(terms) == set(alone) | {"siglip"}


def test_an_unknown_objective_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown objective 'next-tokens'; did you mean 'next-token'"):
        Total({"next-token": NextToken()}, {"next-tokens": 1.0})


def test_objectives_own_weights_are_not_the_model_s(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> None:
    names = {name for name, _ in objective_of(recipe.stages[0], recipe, tokenizer, model).named_parameters()}
    assert "terms.siglip.log_scale" in names and "terms.dense.heads.box.weight" in names
    assert not names & {name for name, _ in model.named_parameters()}
