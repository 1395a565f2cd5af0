"""Learning from answers of which it is known which are better: DPO, its dense form, KTO, ORPO, and a reward model.

A pair's chosen and rejected answers follow each other in the batch, as branches of one row or as rows.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batch import Batch
from ..model import VLM
from .answers import Answers, Reference, answers_of, count_of, log_probabilities
from .objectives import Objective, Term, exactly
from .settings import DenseDPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardConfig


class DPO(Objective):
    """How much likelier the chosen answer became than the rejected one, against the reference."""

    def __init__(self, cfg: DPOConfig, reference: Reference) -> None:
        super().__init__()
        self.cfg, self.reference = cfg, reference

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"dpo": count_of(batch) // 2}

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        answers, gain = _gains(model, batch, self.reference)
        score = answers.sums(gain)
        if self.cfg.loss == "ipo":  # a margin a token: else long answers weigh more (trl asked the paper's authors)
            score = score / answers.lengths
        return {"dpo": (dpo_loss(score, self.cfg).sum(), answers.count // 2)}


def dpo_loss(score: Tensor, cfg: DPOConfig) -> Tensor:
    """Losses [pairs] of gains over the reference [2 * pairs], chosen and rejected in turn."""
    margin = score[0::2] - score[1::2]
    if cfg.loss == "ipo":
        return (margin - 1 / (2 * cfg.beta)).square()
    right, wrong = F.logsigmoid(cfg.beta * margin), F.logsigmoid(-cfg.beta * margin)
    return -(1 - cfg.label_smoothing) * right - cfg.label_smoothing * wrong


class DenseDPO(Objective):
    """DPO in which a token that the correction changed counts more than one that both answers share."""

    def __init__(self, cfg: DenseDPOConfig, reference: Reference) -> None:
        super().__init__()
        self.cfg, self.reference = cfg, reference

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"dense-dpo": count_of(batch) // 2}

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        answers, gain = _gains(model, batch, self.reference)
        weight = correction_weights(answers, self.cfg.gamma)
        score = answers.sums(weight * gain)
        if self.cfg.average:
            score = score / answers.sums(weight)
        loss = -F.logsigmoid(self.cfg.beta * (score[0::2] - score[1::2]))
        return {"dense-dpo": (loss.sum(), len(loss))}


def correction_weights(answers: Answers, gamma: float) -> Tensor:
    """The weight [n] of every token: gamma where its answer differs from the other of its pair, else one."""
    said = [part.tolist() for part in answers.ids.split(answers.lengths.tolist())]
    weights = [w for one, other in zip(said[0::2], said[1::2], strict=True) for w in _differing(one, other, gamma)]
    return torch.cat(weights).to(answers.ids.device)


def _differing(one: Sequence[int], other: Sequence[int], gamma: float) -> tuple[Tensor, Tensor]:
    first, second = torch.full((len(one),), gamma), torch.full((len(other),), gamma)
    for same in SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks():
        first[same.a : same.a + same.size] = 1.0
        second[same.b : same.b + same.size] = 1.0
    return first, second


def _gains(model: VLM, batch: Batch, reference: Reference) -> tuple[Answers, Tensor]:
    """A batch's answers, and by how much more each token's log-probability [n] is than the reference's."""
    answers = answers_of(batch)
    before = reference(batch)
    return answers, log_probabilities(model, batch, answers) - before


class KTO(Objective):
    """How much better or worse an answer of known worth became than answers on the whole.

    The whole is estimated from answers to other prompts, which `batch.extra["judged"]` marks with 0 among those that
    are good (1) and bad (-1).
    """

    def __init__(self, cfg: KTOConfig, reference: Reference) -> None:
        super().__init__()
        self.cfg, self.reference = cfg, reference

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"kto": int((batch.extra["judged"] != 0).sum())}

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        answers, gain = _gains(model, batch, self.reference)
        loss = kto_loss(answers.sums(gain), batch.extra["judged"].to(gain.device), self.cfg)
        return {"kto": (loss.sum(), len(loss))}


def kto_loss(score: Tensor, judged: Tensor, cfg: KTOConfig) -> Tensor:
    """Losses of the judged ones of answers that gained so much [n] over the reference."""
    level = score[judged == 0].detach().mean().clamp(min=0)
    worth, sign = score[judged != 0] - level, judged[judged != 0]
    weight = torch.where(sign > 0, cfg.desirable, cfg.undesirable)
    return weight * (1 - torch.sigmoid(cfg.beta * sign * worth))


class ORPO(Objective):
    """Next-token loss of the chosen answer, and its odds a token against those of the rejected one."""

    def __init__(self, cfg: ORPOConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def counts(self, batch: Batch) -> dict[str, int]:
        answers = answers_of(batch)
        return {"chosen": int(answers.lengths[0::2].sum()), "orpo": answers.count // 2}

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        answers = answers_of(batch)
        total, lengths = answers.sums(log_probabilities(model, batch, answers)), answers.lengths
        odds = orpo_loss(total / lengths)
        chosen = (-total[0::2].sum(), int(lengths[0::2].sum()))
        return {"chosen": chosen, "orpo": (self.cfg.beta * odds.sum(), len(odds))}


def orpo_loss(mean: Tensor) -> Tensor:
    """Losses [pairs] of mean log-probabilities [2 * pairs] of chosen and rejected answers in turn."""
    odds = mean - _log_of_rest(mean)
    return -F.logsigmoid(odds[0::2] - odds[1::2])


def _log_of_rest(log_p: Tensor) -> Tensor:
    """log(1 - p), exact for p near one too."""
    log_p = log_p.clamp(max=-1e-7)
    return torch.log(-torch.expm1(log_p))


class Reward(Objective):
    """A number for each answer, read from its last token; the better of two is to have the larger one."""

    def __init__(self, cfg: RewardConfig, width: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.head = nn.Linear(width, 1)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"reward": count_of(batch) // 2}

    def scores(self, model: VLM, batch: Batch) -> Tensor:
        """Rewards [answers] in float32."""
        hidden: Tensor = model(batch, rows=answers_of(batch).ends)
        return exactly(self.head, hidden)[:, 0]

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        scores = self.scores(model, batch)
        better, worse = scores[0::2], scores[1::2]
        loss = -F.logsigmoid(better - worse) + self.cfg.center * (better + worse).square()
        return {"reward": (loss.sum(), len(loss))}
