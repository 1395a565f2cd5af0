"""PPO and GRPO by hand: advantages, clipped losses, and runs that are stopped and go on as if they had not been."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sightline.data.batch import Batch
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM
from sightline.training.answers import Answers, answers_of
from sightline.training.loader import Batches
from sightline.training.policy import GRPO, PPO, generalised_advantages, group_advantages, surrogate
from sightline.training.preferring import Reward
from sightline.training.recipe import Recipe, Stage
from sightline.training.reference import frozen
from sightline.training.rewards import truth_of
from sightline.training.run import initial_model, objective_of, processor_of, run
from sightline.training.settings import DINOConfig, GRPOConfig, ObjectiveConfig, PPOConfig, RewardConfig
from sightline.training.trainer import Trainer

Fresh = Callable[[str], Path]
PPO_STAGE = PPOConfig(max_new_tokens=5)
GRPO_STAGE = GRPOConfig(group=3, max_new_tokens=5, updates=2)


def stage_of(objective: ObjectiveConfig, **changes: object) -> Stage:
    base = Stage("policy", {"decoder.*": 1e-2}, {"pairs": 1.0}, steps=4, batch=2, warmup=1, precision="fp32")
    return replace(base, objective=objective, save_every=2, **changes)  # type: ignore[arg-type]


def varied(batch: Batch) -> Tensor:
    """Rewards that differ where none of the answers is right: by their length and their last token."""
    answers = answers_of(batch)
    return answers.lengths + answers.ids[answers.lengths.cumsum(0) - 1] / 480


def test_advantages_from_the_end_backwards() -> None:
    which = torch.tensor([0, 0, 0, 1, 2, 2])
    answers = Answers(torch.arange(6), torch.zeros(6, dtype=torch.int64), which, 3)
    paid, value = torch.tensor([0.1, -0.2, 1.0, 2.0, 0.0, 0.5]), torch.tensor([0.5, 0.4, 0.3, 1.0, -1.0, 2.0])
    found = generalised_advantages(answers, paid, value, 0.9, 0.8)
    wanted = [0.0] * 6
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        for t in range(start, stop):
            for k in range(t, stop):
                after = float(value[k + 1]) if k + 1 < stop else 0.0
                wanted[t] += (0.9 * 0.8) ** (k - t) * (float(paid[k]) + 0.9 * after - float(value[k]))
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    whole = generalised_advantages(answers, paid, value, 1.0, 1.0) + value
    assert whole.tolist() == pytest.approx([0.9, 0.8, 1.0, 2.0, 0.5, 0.5], abs=1e-6)  # what is still to be paid


def test_the_clip_takes_away_what_is_gained_beyond_it() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0], dtype=torch.float64)
    found = surrogate(ratio.log(), torch.zeros(5, dtype=torch.float64), advantage, 0.2)
    assert found.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -3.3])


def test_a_group_is_its_own_measure() -> None:
    found = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 0.3, 0.3]), 2)
    one = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert found.tolist() == pytest.approx([one, -one, -one, one, 0.0, 0.0])


@pytest.fixture
def model(recipe: Recipe) -> VLM:
    return initial_model(recipe)


def prepared(
    objective: PPO | GRPO, recipe: Recipe, tokenizer: Tokenizer, model: VLM, stage: Stage, micro: int = 1
) -> list[Batch]:
    data = Batches(stage, 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))
    return objective.prepare(model, [data[k] for k in range(micro)], "0 0 0")


def test_grpo_by_hand(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> None:
    cfg = GRPOConfig(group=3, kl=0.5, clip=0.1, max_new_tokens=5)
    reference = frozen(model, [n for n, _ in model.named_parameters()])
    objective = GRPO(cfg, processor_of(recipe, tokenizer, model), reference, varied)
    (batch,) = prepared(objective, recipe, tokenizer, model, stage_of(cfg))
    total, count = objective(model, batch)["grpo"]
    assert count == 6 == objective.counts(batch)["grpo"]
    assert float(total.detach()) == pytest.approx(-float(batch.extra["advantage"].sum()), abs=1e-5)  # ratios of one
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    answers = answers_of(batch)
    now = model.logits(model(batch)).flatten(0, 1).log_softmax(-1)[answers.places, answers.ids].detach().double()
    old, rewards = reference(batch).double(), varied(batch).double().view(2, 3)
    worth = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    wanted = 0.0
    for k in range(6):
        mine = answers.which == k
        ratio, away = (now - old)[mine].exp(), (old - now)[mine]
        best = torch.minimum(ratio * worth[k], ratio.clamp(0.9, 1.1) * worth[k])
        wanted += float((-best + 0.5 * (away.exp() - away - 1)).mean())
    assert float(objective(model, batch)["grpo"][0].detach()) == pytest.approx(wanted, rel=1e-4)
    assert objective.notes["reward"] == pytest.approx(float(rewards.mean()), rel=1e-5)
    assert objective.notes["tokens"] == pytest.approx(len(answers.ids) / 6)


def test_ppo_by_hand(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> None:
    cfg = PPOConfig(kl=0.3, clip=0.1, value_clip=0.05, value_weight=0.7, discount=0.9, trace=0.8, max_new_tokens=5)
    reference = frozen(model, [n for n, _ in model.named_parameters()])
    torch.manual_seed(1)
    objective = PPO(cfg, processor_of(recipe, tokenizer, model), reference, 24, varied)
    with torch.no_grad():
        assert float(objective.value.weight.abs().max()) == 0.0
        objective.value.weight.normal_(std=0.1)
        for parameter in model.decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    micro = prepared(objective, recipe, tokenizer, model, stage_of(cfg, accumulate=2), micro=2)
    raw = []
    for batch in micro:
        answers = answers_of(batch)
        hidden = model(batch).flatten(0, 1)[answers.places]
        old = model.logits(hidden).log_softmax(-1).gather(1, answers.ids[:, None])[:, 0].detach()
        value = objective.value(hidden)[:, 0].detach()
        paid = -0.3 * (old - reference(batch))
        paid[answers.lengths.cumsum(0) - 1] += varied(batch)
        raw.append((old, value, generalised_advantages(answers, paid, value, 0.9, 0.8)))
    every = torch.cat([advantage for _, _, advantage in raw])
    for batch, (old, value, advantage) in zip(micro, raw, strict=True):
        white = (advantage - every.mean()) / every.std(correction=0)
        for name, wanted in {"old": old, "value": value, "advantage": white, "return": advantage + value}.items():
            torch.testing.assert_close(batch.extra[name], wanted, rtol=1e-4, atol=1e-4)
    batch = micro[0]
    with torch.no_grad():
        objective.value.weight.add_(0.2)
        for parameter in model.decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    answers = answers_of(batch)
    hidden = model(batch).flatten(0, 1)[answers.places]
    now = model.logits(hidden).log_softmax(-1).gather(1, answers.ids[:, None])[:, 0]
    value = objective.value(hidden)[:, 0]
    terms, e = objective(model, batch), batch.extra
    ratio = (now - e["old"]).exp()
    policy = -torch.minimum(ratio * e["advantage"], ratio.clamp(0.9, 1.1) * e["advantage"]).sum()
    near = torch.minimum(torch.maximum(value, e["value"] - 0.05), e["value"] + 0.05)
    off = torch.maximum((value - e["return"]) ** 2, (near - e["return"]) ** 2).sum() / 2
    torch.testing.assert_close(terms["ppo"][0], policy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["value"][0], 0.7 * off, rtol=1e-4, atol=1e-4)
    assert objective.counts(batch) == {name: count for name, (_, count) in terms.items()}


@pytest.mark.parametrize("whiten", [False, True])
def test_what_tokens_are_paid_is_shaped(recipe: Recipe, tokenizer: Tokenizer, model: VLM, whiten: bool) -> None:
    """Only what became likelier costs; all is multiplied, or divided by its spread over both micro-batches first."""
    cfg = PPOConfig(kl=0.3, one_sided=True, scale=10.0, whiten=whiten, trace=1.0, max_new_tokens=5)
    reference = frozen(model, [n for n, _ in model.named_parameters()])
    objective = PPO(cfg, processor_of(recipe, tokenizer, model), reference, 24, varied)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    micro = prepared(objective, recipe, tokenizer, model, stage_of(cfg, accumulate=2), micro=2)
    paid = []
    for batch in micro:
        answers = answers_of(batch)
        away = batch.extra["old"] - batch.extra["reference"]
        assert bool((away > 0).any()) and bool((away < 0).any())
        paid.append(-0.3 * away.clamp(min=0))
        paid[-1][answers.lengths.cumsum(0) - 1] += varied(batch)
    spread = float(torch.cat(paid).std(correction=0)) if whiten else 1.0
    for batch, own in zip(micro, paid, strict=True):  # values of zero and no discount: all that is still to be paid
        for answer in range(answers_of(batch).count):
            mine = answers_of(batch).which == answer
            left = (10 / spread * own[mine]).flip(0).cumsum(0).flip(0)
            torch.testing.assert_close(batch.extra["return"][mine], left, rtol=1e-4, atol=1e-4)


def test_conversations_are_prompts_too(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> None:
    """Their last answer is the truth that what the model says is compared with."""
    stage = stage_of(GRPO_STAGE, data={"questions": 1.0, "pairs": 1.0})
    data = Batches(stage, 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))
    for sample, truth in zip(data[0].extra["samples"], data[0].extra["truths"], strict=True):
        assert sample.conversation[-1].role == "user" and truth == truth_of(sample.chosen)


def test_a_reward_model_may_judge(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> None:
    judge = Reward(RewardConfig(), 24)
    cfg = PPOConfig(max_new_tokens=4)
    processor = processor_of(recipe, tokenizer, model)
    same = frozen(model, [])
    objective = PPO(cfg, processor, same, 24, lambda batch: judge.scores(model, batch))
    (batch,) = prepared(objective, recipe, tokenizer, model, stage_of(cfg))
    torch.testing.assert_close(batch.extra["rewards"], judge.scores(model, batch).detach())
    assert not batch.extra["rewards"].requires_grad and len(batch.extra["rewards"]) == 2


@pytest.mark.parametrize("cfg", [PPO_STAGE, GRPO_STAGE], ids=lambda cfg: cfg.kind)
def test_two_micro_batches_are_one(recipe: Recipe, tokenizer: Tokenizer, cfg: ObjectiveConfig, tmp_path: Path) -> None:
    found = []
    for batch, accumulate in ((2, 2), (4, 1)):
        stage = stage_of(cfg, batch=batch, accumulate=accumulate)
        model = initial_model(recipe)
        torch.manual_seed(0)
        objective = objective_of(stage, recipe, tokenizer, model)
        objective.terms[cfg.kind].rollouts = replace(objective.terms[cfg.kind].rollouts, rewards=varied)
        trainer = Trainer(replace(recipe, stages=(stage,)), stage, model, objective, tmp_path)
        data = Batches(stage, 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))
        step = trainer.learn([data[i] for i in range(accumulate)])
        found.append((step.loss, step.norm, step.notes["reward"], step.notes["tokens"]))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_batch_is_learned_from_as_often_as_it_is_said(recipe: Recipe, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stage = stage_of(replace(PPO_STAGE, updates=3))
    model = initial_model(recipe)
    objective = objective_of(stage, recipe, tokenizer, model)
    trainer = Trainer(replace(recipe, stages=(stage,)), stage, model, objective, tmp_path)
    data = Batches(stage, 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))
    steps = []
    trainer.optimizers.step = steps.append  # type: ignore[method-assign]
    assert (trainer.learn([data[0]]).step, len(steps)) == (1, 3)
    assert (trainer.learn([data[1]]).step, len(steps)) == (2, 6)


@pytest.mark.parametrize(
    "cfg", [PPO_STAGE, GRPO_STAGE, DINOConfig(prototypes=8, bottleneck=4)], ids=lambda cfg: cfg.kind
)
def test_a_stopped_run_goes_on_bit_for_bit(recipe: Recipe, fresh: Fresh, cfg: ObjectiveConfig) -> None:
    """Values, the teacher and its centre come from the checkpoint, the reference from where the stage began."""
    stage = stage_of(cfg)
    if cfg.kind == "dino":
        stage = replace(stage, learn={"encoder.*": 1e-2}, data={"pictures": 1.0})
    chosen = replace(recipe, stages=(stage,))
    whole = [(step.loss, step.terms, step.notes) for step in run(chosen, fresh("whole"), workers=0)]
    folder = fresh("stopped")
    for step in run(chosen, folder, workers=0):
        if step.step == 3:
            break
    assert [(step.loss, step.terms, step.notes) for step in run(chosen, folder, workers=0)] == whole[2:]
    assert len({loss for loss, _, _ in whole}) == 4
