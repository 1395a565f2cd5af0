"""Learning from answers that the model samples itself and that are rewarded: PPO and GRPO.

`prepare` turns prompts into answers with old log-probabilities and advantages; what follows is a loss like others.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.processor import Processor
from ..model import VLM
from . import distributed
from .answers import Answers, Reference, answers_of, count_of, written
from .objectives import Objective, Term, exactly
from .rewards import Rewards, checkable
from .rollouts import Rollouts
from .settings import GRPOConfig, PPOConfig


class OnPolicy(Objective):
    """What both share: one round of answers a step, learned from `updates` times."""

    def __init__(self, rollouts: Rollouts, reference: Reference, updates: int) -> None:
        super().__init__()
        self.rollouts, self.reference, self.updates = rollouts, reference, updates

    @torch.no_grad()
    def prepare(self, model: VLM, micro: list[Batch], key: str) -> list[Batch]:
        learning = model.training
        model.eval()  # what an adapter leaves out by chance would be no part of the policy
        made = [self.rollouts(model, batch, key, batch.extra["first"]) for batch in micro]
        found = [self.measure(model, batch) for batch in made]
        model.train(learning)
        rewards = torch.cat([batch.extra["rewards"] for batch in made])
        reward, tokens, count = over_all(rewards.sum(), sum(len(answers.ids) for answers, _ in found), len(rewards))
        self.notes = {"reward": reward / count, "tokens": tokens / count}
        more = self.advantages(rewards, found)
        return [
            replace(batch, extra=batch.extra | known | told)
            for batch, (_, known), told in zip(made, found, more, strict=True)
        ]

    def measure(self, model: VLM, batch: Batch) -> tuple[Answers, dict[str, Tensor]]:
        """What is known of each token [n] before anything is learned: "old" and "reference" log-probabilities."""
        answers = answers_of(batch)
        hidden = model(batch, rows=answers.places)
        known = {"old": written(model, hidden, answers.ids), "reference": self.reference(batch)}
        return answers, known | self.more(hidden)

    def more(self, hidden: Tensor) -> dict[str, Tensor]:
        """Whatever else is to be known of hidden states [n, width]."""
        return {}

    @abstractmethod
    def advantages(self, rewards: Tensor, found: list[tuple[Answers, dict[str, Tensor]]]) -> list[dict[str, Any]]:
        """What the loss of each micro-batch is told of the worth of its tokens; rewards [answers] of all of them."""


def over_all(*values: Tensor | float) -> list[float]:
    """Sums over the answers of all processes."""
    return distributed.summed(torch.tensor([float(value) for value in values], dtype=torch.float64)).tolist()


def spread_of(parts: list[Tensor]) -> tuple[float, float]:
    """Mean and standard deviation of values over all micro-batches and processes."""
    every = torch.cat(parts).double()
    total, count = over_all(every.sum(), len(every))
    mean = total / count
    return mean, max((over_all((every - mean).square().sum())[0] / count) ** 0.5, 1e-8)


def surrogate(now: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The clipped loss [n] of tokens by how much likelier they became."""
    ratio = torch.exp(now - old)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


class PPO(OnPolicy):
    """A value head beside the policy says what to expect from each token on; advantages are what came beyond it."""

    def __init__(
        self, cfg: PPOConfig, processor: Processor, reference: Reference, width: int, rewards: Rewards = checkable
    ) -> None:
        super().__init__(Rollouts(processor, 1, cfg.max_new_tokens, rewards), reference, cfg.updates)
        self.cfg = cfg
        self.value = nn.Linear(width, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def counts(self, batch: Batch) -> dict[str, int]:
        tokens = len(answers_of(batch).ids)
        return {"ppo": tokens, "value": tokens}

    def values(self, hidden: Tensor) -> Tensor:
        return exactly(self.value, hidden)[:, 0]

    def more(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"value": self.values(hidden)}

    def advantages(self, rewards: Tensor, found: list[tuple[Answers, dict[str, Tensor]]]) -> list[dict[str, Any]]:
        told = []
        parts = rewards.split([answers.count for answers, _ in found])
        paid = [self.paid(answers, known, own) for (answers, known), own in zip(found, parts, strict=True)]
        scale = self.cfg.scale / (spread_of(paid)[1] if self.cfg.whiten else 1.0)
        for (answers, known), own in zip(found, paid, strict=True):
            gained = generalised_advantages(answers, scale * own, known["value"], self.cfg.discount, self.cfg.trace)
            told.append({"advantage": gained, "return": gained + known["value"]})
        mean, spread = spread_of([each["advantage"] for each in told])
        return [each | {"advantage": (each["advantage"] - mean) / spread} for each in told]

    def paid(self, answers: Answers, known: dict[str, Tensor], rewards: Tensor) -> Tensor:
        """What each token [n] is paid: less for leaving the reference, and at its answer's end the reward [answers]."""
        away = known["old"] - known["reference"]
        paid = -self.cfg.kl * (away.clamp(min=0) if self.cfg.one_sided else away)
        paid[answers.lengths.cumsum(0) - 1] += rewards
        return paid

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        cfg, extra, answers = self.cfg, batch.extra, answers_of(batch)
        hidden = model(batch, rows=answers.places)
        now, value, count = written(model, hidden, answers.ids), self.values(hidden), len(answers.ids)
        near = extra["value"] + (value - extra["value"]).clamp(-cfg.value_clip, cfg.value_clip)
        off = torch.maximum((value - extra["return"]).square(), (near - extra["return"]).square()) / 2
        policy = surrogate(now, extra["old"], extra["advantage"], cfg.clip)
        return {"ppo": (policy.sum(), count), "value": (cfg.value_weight * off.sum(), count)}


def generalised_advantages(answers: Answers, paid: Tensor, value: Tensor, discount: float, trace: float) -> Tensor:
    """Advantages [n] of tokens that were paid and valued so [n], from each answer's end back (arXiv:1506.02438)."""
    paid, value = answers.rows(paid), answers.rows(value)
    after = torch.zeros_like(value[:, 0])
    gained, found = torch.zeros_like(after), []
    for t in reversed(range(value.shape[1])):
        gained = paid[:, t] + discount * after - value[:, t] + discount * trace * gained
        after = value[:, t]
        found.append(gained)
    return answers.flat(torch.stack(found[::-1], dim=1))


class GRPO(OnPolicy):
    """No value head: what to expect from a prompt is what its other answers earn."""

    def __init__(
        self, cfg: GRPOConfig, processor: Processor, reference: Reference, rewards: Rewards = checkable
    ) -> None:
        super().__init__(Rollouts(processor, cfg.group, cfg.max_new_tokens, rewards), reference, cfg.updates)
        self.cfg = cfg

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"grpo": count_of(batch)}

    def advantages(self, rewards: Tensor, found: list[tuple[Answers, dict[str, Tensor]]]) -> list[dict[str, Any]]:
        gained = group_advantages(rewards, self.cfg.group)
        return [{"advantage": part} for part in gained.split([answers.count for answers, _ in found])]

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        extra, answers = batch.extra, answers_of(batch)
        now = written(model, model(batch, rows=answers.places), answers.ids)
        loss = surrogate(now, extra["old"], extra["advantage"][answers.which], self.cfg.clip)
        away = extra["reference"] - now
        loss = loss + self.cfg.kl * (torch.expm1(away) - away)  # never negative, and right on average
        return {"grpo": ((loss / answers.lengths[answers.which]).sum(), answers.count)}


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """Rewards [n] less their group's mean, over its spread; nothing where a whole group earned the same."""
    rows = rewards.view(-1, group)
    return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-4)).flatten()
