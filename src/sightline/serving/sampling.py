"""How the next token is chosen: greedily, or drawn with a temperature from the likeliest, by a seed of its own."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..core.config import nearest
from ..core.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Settings of one request. Temperature 0 is greedy; `stop` texts end an answer and are not part of it."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens!r}, expected a whole number of at least 1")
        if not (isinstance(self.temperature, int | float) and 0 <= self.temperature <= 100):
            raise InputError(f"temperature is {self.temperature!r}, expected 0 (greedy) to 100")
        if not (isinstance(self.top_p, int | float) and 0 < self.top_p <= 1):
            raise InputError(f"top_p is {self.top_p!r}, expected above 0 and at most 1")
        if not isinstance(self.seed, int):
            raise InputError(f"seed is {self.seed!r}, expected a whole number")
        if not isinstance(self.stop, list | tuple) or not all(isinstance(text, str) for text in self.stop):
            raise InputError(f"stop is {self.stop!r}, expected a list of texts")
        if any(not text for text in self.stop):
            raise InputError("a stop text is empty, expected some letters")


def sampling_of(given: Mapping[str, Any]) -> Sampling:
    """Settings by their names; InputError for an unknown one tells the nearest."""
    known = [field.name for field in fields(Sampling)]
    for name in given:
        if name not in known:
            raise InputError(f"unknown setting {name!r}{nearest(name, known)}")
    return Sampling(**given)


class Chooser:
    """Draws the tokens of one request; its generator is its own, so a batch does not change an answer."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        # torch's generator looks at 32 bits of a seed only, so all of its digits go into these
        digest = hashlib.sha256(str(sampling.seed).encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

    def __call__(self, logits: Tensor) -> tuple[int, float]:
        """A token for float32 scores [vocabulary], and the model's probability of it at temperature 1."""
        if self.sampling.temperature == 0:
            index = int(logits.argmax())
        else:
            scores = kept(tempered(logits, self.sampling.temperature), self.sampling.top_p)
            index = int(torch.multinomial(scores.cpu(), 1, generator=self.generator))
        return index, float(torch.exp(logits[index] - logits.logsumexp(-1)))


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities at a temperature above 0, however small."""
    return torch.softmax((logits - logits.max()) / max(temperature, 1e-6), -1)


def kept(probabilities: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens whose probabilities [vocabulary] reach `top_p`, the rest zero."""
    if top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, order, torch.where(before < top_p, ordered, 0.0))
