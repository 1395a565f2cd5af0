"""A recipe is a value that says the whole run: model, data, and stages that list what learns and how fast."""

import math
from collections.abc import Iterable
from dataclasses import field
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt
from torch import nn

from ..core.config import config, nearest
from ..core.errors import ConfigError
from ..data.tiles import Pipeline
from ..model import VLMConfig
from .sources import Source

Share = Annotated[float, Field(ge=0, le=1)]


@config
class Stage:
    """One stage of a run.

    learn: patterns over parameter names and their learning rates; everything else is frozen. A pattern that matches
    nothing is an error; a parameter that two patterns match takes the later one's rate.
    data: weights of the recipe's sources. objective: weights of the terms of the loss.
    """

    name: str
    learn: dict[str, float]
    data: dict[str, float]
    steps: PositiveInt
    batch: PositiveInt = 16
    objective: dict[str, float] = field(default_factory=lambda: {"next-token": 1.0})
    optimizer: Literal["adamw", "muon"] = "adamw"
    warmup: NonNegativeInt = 50
    schedule: Literal["linear", "cosine"] = "linear"  # how the rate falls
    decay: float = 0.5  # share of the stage, at its end, over which it falls; 0 keeps it constant
    floor: float = 0.03  # what it falls to, as a share
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    accumulate: PositiveInt = 1  # micro-batches a step
    save_every: PositiveInt = 250
    packing: NonNegativeInt = 0  # tokens of a row that several conversations share; 0: each has its own
    group: PositiveInt = 1  # batches whose samples are sorted by length among them
    recompute: bool = False  # blocks are computed again for their gradients instead of kept (arXiv:1604.06174)
    max_bad: Share = 0.01  # how many samples may be passed over, of the first 1,000 or of all

    def rate(self, step: int) -> float:
        """The learning rate at a step (from 0) as a share of its peak."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        left = min(1.0, (self.steps - step) / max(1.0, self.steps * self.decay))
        if self.schedule == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return rising * (self.floor + (1 - self.floor) * left)


@config
class Recipe:
    """Everything a run needs; the same recipe and seed give the same weights.

    start: a model folder, or the name of a shipped one, whose weights and tokenizer a run begins from, at whichever
    stage is trained first; without one the weights are drawn from the seed and the tokenizer is learned.
    """

    name: str
    model: VLMConfig
    pixels: Pipeline
    sources: dict[str, Source]
    stages: tuple[Stage, ...]
    template: str = "sightline"
    codec: str = "location-tokens"
    vocabulary: int = 1024
    max_length: int = 768
    seed: int = 0
    start: str = ""

    def stage(self, name: str) -> int:
        """The index of a stage; ConfigError tells the nearest name."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise ConfigError(f"recipe {self.name!r} has no stage {name!r}{nearest(name, names)}")
        return names.index(name)


def check_sources(stage: Stage, known: Iterable[str]) -> None:
    """ConfigError, telling the nearest, for a source of a stage that a recipe does not have."""
    known = list(known)
    for name in stage.data:
        if name not in known:
            raise ConfigError(f"stage {stage.name!r} has no source {name!r}{nearest(name, known)}")


def learning_rates(model: nn.Module, learn: dict[str, float]) -> dict[str, float]:
    """The rate of every parameter that a stage's patterns name; the others are frozen."""
    names = [name for name, _ in model.named_parameters()]
    rates: dict[str, float] = {}
    for pattern, rate in learn.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(f"pattern {pattern!r} matches no parameter{nearest(pattern, names)}")
        rates |= dict.fromkeys(matched, rate)
    return rates


def freeze(model: nn.Module, rates: dict[str, float]) -> None:
    """Let exactly the named parameters ask for gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in rates)
