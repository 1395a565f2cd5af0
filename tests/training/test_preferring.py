"""Objectives on pairs: their forward against losses made by hand of log-probabilities that are made by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.core.errors import InputError
from sightline.core.sequence import Message, Text
from sightline.data.batch import Batch
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM
from sightline.training.answers import Answers, answers_of
from sightline.training.loader import Batches
from sightline.training.objectives import Objective
from sightline.training.preferences import Listed
from sightline.training.preferring import KTO, ORPO, Reward, correction_weights
from sightline.training.recipe import Recipe, Stage
from sightline.training.reference import frozen
from sightline.training.run import initial_model, objective_of, processor_of
from sightline.training.settings import (
    DenseDPOConfig,
    DPOConfig,
    KTOConfig,
    ObjectiveConfig,
    ORPOConfig,
    RewardConfig,
)
from sightline.training.trainer import Trainer


@pytest.fixture
def model(recipe: Recipe) -> VLM:
    return initial_model(recipe)


def stage_of(objective: ObjectiveConfig, **changes: object) -> Stage:
    base = Stage("prefer", {"decoder.*": 1e-2}, {"pairs": 1.0}, steps=4, batch=3, warmup=1, precision="fp32")
    return replace(base, objective=objective, **changes)  # type: ignore[arg-type]


def data_of(recipe: Recipe, tokenizer: Tokenizer, model: VLM, stage: Stage) -> Batches:
    return Batches(stage, 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))


def by_hand(model: VLM, batch: Batch) -> tuple[list[Tensor], Answers]:
    """Log-probabilities of each answer's tokens, from all logits."""
    answers = answers_of(batch)
    every = model.logits(model(batch)).flatten(0, 1).log_softmax(-1).double()
    return list(every[answers.places, answers.ids].split(answers.lengths.tolist())), answers


def moved(model: VLM) -> VLM:
    """Another model near this one, whose decoder has learned something."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "cfg",
    [
        DPOConfig(beta=0.3),
        DPOConfig(beta=0.3, label_smoothing=0.1),
        DPOConfig(beta=0.3, loss="ipo"),
        DenseDPOConfig(beta=0.3, gamma=4.0),
        DenseDPOConfig(beta=0.3, gamma=4.0, average=False),
    ],
)
def test_pairs_against_the_reference(
    recipe: Recipe, tokenizer: Tokenizer, model: VLM, cfg: DPOConfig | DenseDPOConfig
) -> None:
    stage = stage_of(cfg)
    objective = objective_of(stage, recipe, tokenizer, model)
    batch = data_of(recipe, tokenizer, model, stage)[0]
    before, answers = by_hand(model, batch)
    after, _ = by_hand(moved(model), batch)
    weights = correction_weights(answers, cfg.gamma if isinstance(cfg, DenseDPOConfig) else 1.0).double()
    wanted = 0.0
    for k in range(0, answers.count, 2):
        scores = []
        for j in (k, k + 1):
            weight = weights[answers.which == j]
            score = float((weight * (after[j] - before[j])).sum().detach())
            mean = isinstance(cfg, DenseDPOConfig) and cfg.average
            ipo = isinstance(cfg, DPOConfig) and cfg.loss == "ipo"
            scores.append(score / float(weight.sum()) if mean or ipo else score)
        margin = scores[0] - scores[1]
        if isinstance(cfg, DPOConfig) and cfg.loss == "ipo":
            wanted += (margin - 1 / 0.6) ** 2
        else:
            smooth = cfg.label_smoothing if isinstance(cfg, DPOConfig) else 0.0
            wanted += (1 - smooth) * math.log1p(math.exp(-0.3 * margin))
            wanted += smooth * math.log1p(math.exp(0.3 * margin))
    ((total, count),) = objective(model, batch).values()
    assert float(total.detach()) == pytest.approx(wanted, rel=1e-4)
    assert {cfg.kind: count} == objective.counts(batch) == {cfg.kind: 3}


def test_a_stage_begins_at_the_reference_which_does_not_move(
    recipe: Recipe, tokenizer: Tokenizer, model: VLM, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stage = stage_of(DPOConfig())
    chosen = replace(recipe, stages=(stage,))
    data = data_of(recipe, tokenizer, model, stage)
    reference = frozen(model, [n for n, _ in model.decoder.named_parameters(prefix="decoder")])
    before = reference(data[0])
    trainer = Trainer(chosen, stage, model, objective_of(stage, chosen, tokenizer, model), tmp_path_factory.mktemp("x"))
    losses = [trainer.learn([data[0]]).loss for _ in range(4)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # whatever the model says, it says so itself
    assert losses[-1] < 0.95 * losses[0]
    assert torch.equal(reference(data[0]), before) and not before.requires_grad
    with torch.no_grad():
        model.encoder.positions.add_(1.0)  # what is frozen is not there twice
    assert not torch.equal(reference(data[0]), before)


def test_corrected_segments_weigh_more() -> None:
    said = [[5, 6, 7, 8, 9], [5, 1, 2, 8, 9, 3], [4], [4]]
    lengths = torch.tensor([len(ids) for ids in said])
    which = torch.arange(4).repeat_interleave(lengths)
    answers = Answers(torch.arange(13), torch.tensor([i for ids in said for i in ids]), which, 4)
    assert correction_weights(answers, 5.0).tolist() == [1, 5, 5, 1, 1, 1, 5, 5, 1, 1, 5, 1, 1]


def test_kto_judges_single_answers_against_those_to_other_prompts(
    recipe: Recipe, tokenizer: Tokenizer, model: VLM
) -> None:
    cfg = KTOConfig(beta=0.4, desirable=1.5, undesirable=0.5)
    stage = stage_of(cfg)
    pairs = [recipe.sources["pairs"](0, 0, k) for k in range(3)]
    mixed = [replace(pairs[0], rejected=None), replace(pairs[1], chosen=None), pairs[2]]
    order = [Listed(mixed)(0, 0, k) for k in range(3)]
    batch = Batches(stage, 0, 0, {"pairs": Listed(mixed)}, processor_of(recipe, tokenizer, model))[0]
    marks = [mark for s in order for mark in ([1] if s.chosen else []) + ([-1] if s.rejected else []) + [0]]
    assert batch.extra["judged"].tolist() == marks
    objective = KTO(cfg, frozen(model, [n for n, _ in model.named_parameters()]))
    before, _ = by_hand(model, batch)
    after, _ = by_hand(moved(model), batch)
    gain = [float((b - a).sum().detach()) for a, b in zip(before, after, strict=True)]
    level = max(0.0, sum(g for g, mark in zip(gain, marks, strict=True) if mark == 0) / 3)
    wanted = 0.0
    for g, mark in zip(gain, marks, strict=True):
        if mark:
            wanted += (1.5 if mark > 0 else 0.5) * (1 - 1 / (1 + math.exp(-0.4 * mark * (g - level))))
    total, count = objective(model, batch)["kto"]
    assert float(total.detach()) == pytest.approx(wanted, rel=1e-4) and count == 4
    assert objective.counts(batch) == {"kto": 4}


def test_orpo_learns_the_chosen_answer_and_the_odds(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> None:
    stage = stage_of(ORPOConfig(beta=0.2))
    batch = data_of(recipe, tokenizer, model, stage)[0]
    parts, answers = by_hand(model, batch)
    objective = ORPO(ORPOConfig(beta=0.2))
    terms = objective(model, batch)
    chosen = -sum(float(part.sum().detach()) for part in parts[0::2])
    odds = 0.0
    for good, bad in zip(parts[0::2], parts[1::2], strict=True):
        p, q = math.exp(float(good.mean().detach())), math.exp(float(bad.mean().detach()))
        odds += math.log1p(math.exp(-(math.log(p / (1 - p)) - math.log(q / (1 - q)))))
    assert float(terms["chosen"][0].detach()) == pytest.approx(chosen, rel=1e-4)
    assert float(terms["orpo"][0].detach()) == pytest.approx(0.2 * odds, rel=1e-4)
    assert terms["chosen"][1] == int(answers.lengths[0::2].sum()) and terms["orpo"][1] == 3
    assert objective.counts(batch) == {name: count for name, (_, count) in terms.items()}


def test_a_reward_is_read_from_the_end_token(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> None:
    batch = data_of(recipe, tokenizer, model, stage_of(RewardConfig()))[0]
    objective = Reward(RewardConfig(center=0.1), 24)
    hidden = model(batch).flatten(0, 1)
    ends = (batch.ids.flatten() == tokenizer.control("<eos>")).nonzero()[:, 0]
    scores = objective.head(hidden[ends])[:, 0]
    assert len(scores) == 6
    torch.testing.assert_close(objective.scores(model, batch), scores, rtol=1e-5, atol=1e-5)
    wanted = sum(-F.logsigmoid(scores[k] - scores[k + 1]) + 0.1 * (scores[k] + scores[k + 1]) ** 2 for k in (0, 2, 4))
    total, count = objective(model, batch)["reward"]
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-5)
    assert count == 3 == objective.counts(batch)["reward"]


KINDS = [DPOConfig(), DenseDPOConfig(), ORPOConfig(), RewardConfig()]


@pytest.mark.parametrize("cfg", KINDS, ids=lambda cfg: cfg.kind)
def test_two_micro_batches_are_one(
    recipe: Recipe, tokenizer: Tokenizer, cfg: ObjectiveConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = []
    for batch, accumulate in ((2, 2), (4, 1)):
        stage = stage_of(cfg, batch=batch, accumulate=accumulate)
        model = initial_model(recipe)
        data = data_of(recipe, tokenizer, model, stage)
        torch.manual_seed(0)
        objective: Objective = objective_of(stage, recipe, tokenizer, model)
        trainer = Trainer(replace(recipe, stages=(stage,)), stage, model, objective, tmp_path_factory.mktemp("x"))
        found.append([trainer.learn([data[s * accumulate + i] for i in range(accumulate)]).loss for s in range(2)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_an_answer_that_is_missing_is_told(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> None:
    sample = replace(recipe.sources["pairs"](0, 0, 0), rejected=None, chosen=Message("assistant", (Text("no"),)))
    data = Batches(stage_of(DPOConfig()), 0, 0, {"pairs": Listed([sample])}, processor_of(recipe, tokenizer, model))
    with pytest.raises(InputError, match="scene 4000000: lacks an answer that its objective learns from"):
        data[0]
