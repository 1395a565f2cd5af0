"""Rewards that can be checked: an answer is compared with the truth, and nobody's taste comes in."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

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


def checkable(batch: Batch) -> Tensor:
    """The reward of every answer of a batch against its prompt's truth."""
    pairs = zip(batch.extra["answers"], batch.extra["truths"], strict=True)
    return torch.tensor([reward(answer, truth) for answer, truth in pairs])


def reward(answer: Grounded, truth: Grounded) -> float:
    """In [0, 1]: overlap where the truth has boxes, the exact count where it is a number, else the same words."""
    if truth.boxes:
        return box_overlap(answer.boxes, truth.boxes)
    if counted(truth.text) is not None:
        return float(counted(answer.text) == counted(truth.text))
    return float(_words(answer.text) == _words(truth.text))


def box_overlap(found: tuple[Box, ...], truth: tuple[Box, ...]) -> float:
    """IoU of the boxes that belong together, over as many as there are on the longer side: extra boxes cost too."""
    return sum(overlap for _, _, overlap in match(found, truth, threshold=0.0)) / max(len(found), len(truth))


def counted(text: str) -> int | None:
    """The number that a text is, in digits or as a word, if it is nothing else."""
    (word,) = _words(text) if len(_words(text)) == 1 else ("",)
    return int(word) if re.fullmatch(r"[0-9]{1,9}", word) else NUMBERS.index(word) if word in NUMBERS else None


def _words(text: str) -> list[str]:
    """Lower-case words and numbers, without what stands between them."""
    return re.findall(r"\w+", text.lower())
