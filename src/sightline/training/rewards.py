"""What an answer is worth: compared with the truth, by its length, or as a judge says.

A reward is a function of a batch that `rollouts` made; a stage names those that it pays for, and their weights.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import nearest
from ..core.errors import ConfigError
from ..core.geometry import Box, match
from ..core.sequence import Message, Region, Text
from ..data.batch import Batch
from ..grounding.codecs import Grounded
from ..worlds.words import NUMBERS

Rewards = Callable[[Batch], Tensor]  # a number for each answer [answers] of a batch that `rollouts` made


def truth_of(message: Message) -> Grounded:
    """A true answer in the form in which a model's is read."""
    shapes = [part.shape for part in message.parts if isinstance(part, Region)]
    boxes = tuple(shape for shape in shapes if isinstance(shape, Box))
    points = tuple(shape for shape in shapes if not isinstance(shape, Box))
    return Grounded(" ".join(part.text for part in message.parts if isinstance(part, Text)), boxes, points)


def reward(answer: Grounded, truth: Grounded) -> float:
    """In [0, 1]: overlap where the truth has boxes, the exact count where it is a number, else the same words."""
    if truth.boxes:
        return box_overlap(answer, truth)
    return same_words(answer, truth) if counted(truth.text) is None else same_count(answer, truth)


def box_overlap(answer: Grounded, truth: Grounded) -> float:
    """IoU of the boxes that belong together, over as many as there are on the longer side: extra boxes cost too."""
    total = sum(overlap for _, _, overlap in match(answer.boxes, truth.boxes, threshold=0.0))
    return total / max(len(answer.boxes), len(truth.boxes), 1)


def same_count(answer: Grounded, truth: Grounded) -> float:
    """One for the number that the truth is."""
    return float(counted(truth.text) is not None and counted(answer.text) == counted(truth.text))


def same_words(answer: Grounded, truth: Grounded) -> float:
    """One for the words of the truth in their order."""
    return float(_words(answer.text) == _words(truth.text))


def counted(text: str) -> int | None:
    """The number that a text is, in digits or as a word, if it is nothing else."""
    (word,) = _words(text) if len(_words(text)) == 1 else ("",)
    return int(word) if re.fullmatch(r"[0-9]{1,9}", word) else NUMBERS.index(word) if word in NUMBERS else None


def _words(text: str) -> list[str]:
    """Lower-case words and numbers, without what stands between them."""
    return re.findall(r"\w+", text.lower())


# ------------------------------------------------------------------------------------------------------------ by name


def compared(worth: Callable[[Grounded, Grounded], float]) -> Rewards:
    """Every answer of a batch against its prompt's truth."""

    def rewards(batch: Batch) -> Tensor:
        pairs = zip(batch.extra["answers"], batch.extra["truths"], strict=True)
        return torch.tensor([worth(answer, truth) for answer, truth in pairs])

    return rewards


def length(batch: Batch) -> Tensor:
    """The share of the most tokens that an answer may have."""
    found: Tensor = batch.extra["shares"]
    return found


def unfinished(batch: Batch) -> Tensor:
    """One for an answer that was cut before it ended."""
    return torch.tensor(batch.extra["cut"], dtype=torch.float32)


checkable = compared(reward)
REWARDS: dict[str, Rewards] = {
    "truth": checkable,  # whichever of the next three fits the truth
    "count": compared(same_count),
    "iou": compared(box_overlap),
    "text": compared(same_words),
    "length": length,
    "unfinished": unfinished,
}


@dataclass(frozen=True)
class Weighted:
    """The weighted sum of some rewards, by name."""

    rewards: Mapping[str, Rewards]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        for name in self.weights:
            if name not in self.rewards:
                raise ConfigError(f"unknown reward {name!r}{nearest(name, self.rewards)}")

    def __call__(self, batch: Batch) -> Tensor:
        parts = [weight * self.rewards[name](batch).float().cpu() for name, weight in self.weights.items()]
        return torch.stack(parts).sum(0)
