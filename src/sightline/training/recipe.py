"""A recipe is a value that says the whole run: model, data, and stages that list what learns and how fast."""

import math
import re
from collections.abc import Mapping
from dataclasses import field, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from ..core.config import config, nearest
from ..core.errors import ConfigError
from ..data.tiles import Pipeline
from ..layers.adapted import OWN, adapted
from ..model import VLMConfig
from .adapters import Learning, Lora, nearest_pattern
from .preferences import PairsSource
from .settings import COMPARES, DEFAULTS, FROM_PAIRS, PREPARES, READS, SAMPLED, ObjectiveConfig, check_names
from .sources import FilesSource, ScenesSource

BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")
Share = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Source = ScenesSource | FilesSource | PairsSource  # told apart by `kind`


def _weights(said: Any) -> Any:
    """Weights as they are meant where a mapping names no kind: `{clip: 1}` is CLIP, not PPO with a clip of 1."""
    if not isinstance(said, Mapping) or "kind" in said:
        return said
    return {name: float(value) if type(value) is int else value for name, value in said.items()}


@config
class Stage:
    """One stage of a run.

    learn: patterns over parameter names and their learning rates; everything else is frozen. A pattern that matches
    nothing is an error; a parameter that two patterns match takes the later one's rate. Under a `Lora` the parameters
    stay frozen as well and adapters beside the linear maps among them learn (`training.adapters`).
    data: weights of the recipe's sources. objective: weights of the terms of the loss, or one term with its settings.
    template: how its conversations are laid out, where that is not the recipe's way; of a published model with its
    convention for places.
    warmups, weight_decays: patterns of `learn` whose rates rise over other numbers of steps than `warmup`, or whose
    parameters decay by other shares than `weight_decay`.
    trainable_tokens: of tables of words that learn, only the rows of these control tokens do, where there are some.
    loss_weights: of its sources, which then have a term of the loss each, divided by what was learned from it alone.
    layer_decay: what each block of the encoder has of the rate of the one after it, the last of that of all
    (arXiv:2106.08254). dropout: the share of numbers that each branch of a block leaves out, in blocks of decoder and
    fusion that learn. drop_path: how many pictures a branch of the encoder's last block leaves out (arXiv:1603.09382);
    of those before, fewer in even steps, and none of the first.
    after: the earlier stage whose weights it begins from; the one before it where nothing is said.
    eval_data: weights of sources on which its loss is measured and from which it does not learn; none: it is not.
    """

    name: str
    learn: dict[str, float | Lora]
    data: dict[str, float]
    steps: PositiveInt
    after: str = ""
    batch: PositiveInt = 16
    objective: Annotated[ObjectiveConfig | dict[str, float], BeforeValidator(_weights)] = field(
        default_factory=lambda: {"next-token": 1.0}
    )
    optimizer: Literal["adamw", "muon"] = "adamw"
    warmup: NonNegativeInt = 50
    schedule: Literal["linear", "cosine", "rsqrt"] = "linear"  # how the rate falls
    timescale: PositiveInt = 10_000  # of rsqrt: it has fallen to 1 / sqrt(2) so many steps after the warm-up
    decay: Share = 0.5  # share of the stage, at its end, over which it falls; 0 keeps it constant
    floor: Share = 0.03  # what it falls to, as a share
    weight_decay: NonNegativeFloat = 0.01
    betas: tuple[Momentum, Momentum] = (0.9, 0.98)  # of AdamW
    eps: PositiveFloat = 1e-8  # of AdamW
    clip: PositiveFloat = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    accumulate: PositiveInt = 1  # micro-batches a step
    save_every: PositiveInt = 250
    packing: NonNegativeInt = 0  # tokens of a row that several conversations share; 0: each has its own
    group: PositiveInt = 1  # batches whose samples are sorted by length among them
    recompute: bool = False  # blocks are computed again for their gradients instead of kept (arXiv:1604.06174)
    max_bad: Share = 0.01  # how many samples may be passed over, of the first 1,000 or of all
    feature_store: NonNegativeFloat = 8.0  # gigabytes of a frozen encoder's features, where samples repeat; 0: none
    guard_every: NonNegativeInt = 0  # steps between two looks at whether pictures are used; 0: never
    eval_data: dict[str, float] = field(default_factory=dict)
    eval_every: NonNegativeInt = 0  # steps between two looks at the loss on `eval_data`; 0: at the stage's end only
    eval_samples: PositiveInt = 64  # of all of `eval_data`, the same ones at each look
    template: str | None = None
    warmups: dict[str, NonNegativeInt] = field(default_factory=dict)
    weight_decays: dict[str, NonNegativeFloat] = field(default_factory=dict)
    loss_weights: dict[str, NonNegativeFloat] = field(default_factory=dict)
    trainable_tokens: tuple[str, ...] = ()
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ConfigError(f"a stage is called {self.name!r}, expected a name that a folder can have")
        if not self.data or not all(0 < weight < math.inf for weight in self.data.values()):
            raise ConfigError(f"stage {self.name!r} reads {self.data}, expected sources with weights above 0")
        if not self.learn:
            raise ConfigError(f"stage {self.name!r} learns nothing, expected patterns with their learning rates")
        for pattern, how in self.learn.items():
            rate = how.rate if isinstance(how, Lora) else how
            if not 0 <= rate <= 1e3:  # nor is it no number
                raise ConfigError(f"stage {self.name!r} learns {pattern!r} at {rate:g}, expected from 0 to 1000")
        for does, patterns in (("warms up", self.warmups), ("decays", self.weight_decays)):
            for pattern in patterns:
                if pattern not in self.learn:
                    near = nearest(pattern, self.learn)
                    raise ConfigError(f"stage {self.name!r} {does} {pattern!r}, which is not learned{near}")
        self._check_loss_weights()
        self._check_eval()
        if not self.objective:
            raise ConfigError(f"stage {self.name!r} has no objective, expected terms of a loss with their weights")
        for name, weight in self.objective.items() if isinstance(self.objective, dict) else ():
            if not 0 <= weight < math.inf:
                raise ConfigError(f"stage {self.name!r}: objective {name!r} weighs {weight:g}, expected 0 or more")

    def _check_loss_weights(self) -> None:
        if not self.loss_weights:
            return
        for name in {*self.loss_weights} ^ {*self.data}:
            raise ConfigError(f"stage {self.name!r}: loss_weights are of all its sources or of none, {name!r} differs")
        if other := {*self.terms} - {"next-token", "answers"}:
            raise ConfigError(f"stage {self.name!r}: loss_weights are for 'next-token', not for {min(other)!r}")
        if self.packing or self.guard_every:
            other_than = "packing" if self.packing else "guard_every"
            raise ConfigError(f"stage {self.name!r}: loss_weights need rows of one source each, without {other_than}")

    def _check_eval(self) -> None:
        if not self.eval_data:
            if self.eval_every:
                raise ConfigError(f"stage {self.name!r}: eval_every measures nothing without eval_data")
            return
        told = f"stage {self.name!r}: eval_data"
        if not all(0 < weight < math.inf for weight in self.eval_data.values()):
            raise ConfigError(f"{told} is {self.eval_data}, expected sources with weights above 0")
        for name in PREPARES & set(self.terms):
            raise ConfigError(f"{told} needs a loss on data, of which objective {name!r} has none")
        for name in COMPARES & set(self.terms) if self.eval_samples < self.batch else ():
            raise ConfigError(f"{told}: {name!r} compares {self.batch} samples, set eval_samples to so many at least")
        for name in {*self.eval_data} - {*self.loss_weights} if self.loss_weights else ():
            raise ConfigError(f"{told}: source {name!r} has no term of the loss, as loss_weights are of those of data")

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of all sources that it reads."""
        return tuple({**self.data, **self.eval_data})

    @property
    def validated(self) -> "Stage":
        """The stage as if it learned from what its loss is measured on."""
        return replace(self, data=self.eval_data, eval_data={}, eval_every=0, guard_every=0, loss_weights={})

    @property
    def terms(self) -> dict[str, float]:
        """The terms of the loss by name, and their weights."""
        return self.objective if isinstance(self.objective, dict) else {self.objective.kind: 1.0}

    def settings(self, name: str) -> Any:
        """The settings of one of the terms: the stage's, or the default ones."""
        return DEFAULTS[name] if isinstance(self.objective, dict) else self.objective

    @property
    def rewards(self) -> dict[str, float]:
        """What answers that the model samples itself are paid for, and the weights; none where it samples none."""
        return next((dict(self.settings(name).rewards) for name in self.terms if name in SAMPLED), {})

    def warmup_of(self, name: str) -> int:
        """Over how many steps the rate of a parameter rises, as its last pattern says."""
        return self.warmups.get(self._pattern(name), self.warmup)

    def decay_of(self, name: str) -> float:
        """By which share of its rate a parameter decays, as its last pattern says."""
        return self.weight_decays.get(self._pattern(name), self.weight_decay)

    def _pattern(self, name: str) -> str:
        """The last pattern that names a parameter."""
        return next((pattern for pattern in reversed(self.learn) if fnmatchcase(name, pattern)), "")

    def rate(self, step: int, warmup: int | None = None) -> float:
        """The learning rate at a step (from 0) as a share of its peak; warmup: steps it rises over, if not as usual."""
        warmup = self.warmup if warmup is None else warmup
        rising = min(1.0, (step + 1) / max(1, warmup))
        if self.schedule == "rsqrt":
            rising /= math.sqrt(1 + max(0, step - warmup) / self.timescale)
        left = min(1.0, (self.steps - step) / max(1.0, self.steps * self.decay))
        if self.schedule == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return rising * (self.floor + (1 - self.floor) * left)


@config
class Parts:
    """Folders that the parts of a model begin from, each of such a part alone or of a whole model; "": it is drawn.

    A name that is no folder here is that under which others published the part: its folder is still to be given.
    tokenizer: the folder whose words it reads; "": that of the decoder.
    """

    encoder: str = ""
    fusion: str = ""
    decoder: str = ""
    tokenizer: str = ""


@config
class Recipe:
    """Everything a run needs; the same recipe and seed give the same weights.

    template: how conversations are laid out: one of `data.template`, or the name of a published model, whose way it is.
    start: a model folder, or the name of a shipped one, whose weights and tokenizer a run begins from, at whichever
    stage is trained first; or the parts that its first stage begins from. Without one the weights are drawn from the
    seed and the tokenizer is learned.
    taken: patterns over the parameters that come from one folder; the others are drawn, and may be of another design.
    added_tokens: control tokens that follow those of the tokenizer it starts with, where it lacks them.
    """

    name: str
    model: VLMConfig
    pixels: Pipeline
    sources: dict[str, Source]
    stages: tuple[Stage, ...]
    template: str = "sightline"
    codec: str | None = "location-tokens"
    vocabulary: PositiveInt = 1024
    max_length: PositiveInt = 768
    seed: int = 0
    start: str | Parts = ""
    taken: tuple[str, ...] = ("*",)
    added_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ConfigError(f"a recipe is called {self.name!r}, expected a name that a folder can have")
        if self.taken != ("*",) and isinstance(self.start, Parts):
            raise ConfigError(f"recipe {self.name!r} starts from parts, of which `taken` chooses nothing; leave it out")
        for number, stage in enumerate(self.stages):
            earlier = [each.name for each in self.stages[:number]]
            if stage.name in earlier:
                raise ConfigError(f"recipe {self.name!r} has two stages {stage.name!r}, expected a name for each")
            if stage.after and stage.after not in earlier:
                near = nearest(stage.after, earlier)
                raise ConfigError(f"stage {stage.name!r} comes after {stage.after!r}, expected an earlier one{near}")

    def stage(self, name: str) -> int:
        """The index of a stage; ConfigError tells the nearest name."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise ConfigError(f"recipe {self.name!r} has no stage {name!r}{nearest(name, names)}")
        return names.index(name)

    def path(self, number: int) -> tuple[int, ...]:
        """The stages, by their indices, that the weights of a stage go through, itself the last."""
        after = self.stages[number].after
        before = self.stage(after) if after else number - 1
        return (*(self.path(before) if before >= 0 else ()), number)


def is_name(name: str) -> bool:
    """Whether a folder can be called so, alone."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def check_sources(stage: Stage, sources: Mapping[str, Source]) -> str:
    """What a batch of the stage holds, as in `READS`; ConfigError where its sources and objective do not fit."""
    for name in stage.data:
        if name not in sources:
            raise ConfigError(f"stage {stage.name!r} has no source {name!r}{nearest(name, sources)}")
    check_names(stage.terms)
    wanted = {READS[name] for name in stage.terms}
    given = {sources[name].gives for name in stage.data}
    needed = {"pairs" if form in FROM_PAIRS else form for form in wanted}
    if wanted == {"prompts"} and given <= {"pairs", "conversations"}:
        needed = given  # whose last answer is the true one
    if given != needed or len(wanted) > 1:
        reads, learns = " and ".join(sorted(given)), " and ".join(sorted(needed if len(wanted) == 1 else wanted))
        raise ConfigError(
            f"stage {stage.name!r} reads {reads}, its objective learns from {learns}; one batch is one of them"
        )
    dense = {"dense", "words", "boxes"} & set(stage.terms)
    if dense and (files := [name for name in stage.data if isinstance(sources[name], FilesSource)]):
        raise ConfigError(f"objective {min(dense)!r} learns the truth of every patch; source {files[0]!r} has none")
    if stage.packing and given != {"conversations"}:
        reads = given.pop()
        raise ConfigError(f"stage {stage.name!r} packs rows, but reads {reads}; only conversations are packed")
    if stage.guard_every and wanted & {"pictures", "prompts"}:
        raise ConfigError(f"stage {stage.name!r}: guard_every needs losses of answers, of which its objective has none")
    for name in {"kto", "itm", "qformer"} & set(stage.terms):
        if stage.batch < 2:
            raise ConfigError(f"stage {stage.name!r}: {name!r} compares samples of a batch, expected one of at least 2")
    if stage.eval_data:
        try:
            check_sources(stage.validated, sources)
        except ConfigError as error:
            raise ConfigError(f"eval_data: {error}") from None
    return wanted.pop()


def without_files(stage: Stage, sources: Mapping[str, Source]) -> dict[str, FilesSource]:
    """The sources of a stage that are read from files and name none yet."""
    found = {name: sources[name] for name in stage.reads}
    return {name: each for name, each in found.items() if isinstance(each, FilesSource) and not each.path}


def check_files(stage: Stage, sources: Mapping[str, Source], besides: str = "") -> None:
    """ConfigError for a source of a stage that is unknown, or is read from files and names none yet.

    besides: what else is missing, told in the same line.
    """
    check_sources(stage, sources)
    told = [
        f"source {name!r} names no file; set sources.{name}.path=FILE, {found.kind} in the format {found.format!r}"
        for name, found in without_files(stage, sources).items()
    ]
    if besides:
        told.append(besides)
    if told:
        raise ConfigError("; ".join(told))


def learning_rates(model: nn.Module, learn: Learning) -> dict[str, float]:
    """The rate of every parameter that a stage's patterns name; the others are frozen.

    Under a `Lora` these are the adapters' own, where `adapt` has put some.
    """
    beside = {f"{name}.{own}": f"{name}.weight" for name in adapted(model) for own in OWN}
    names = [name for name, _ in model.named_parameters()]
    rates: dict[str, float] = {}
    for pattern, how in learn.items():
        matched = [name for name in names if fnmatchcase(beside.get(name, name), pattern)]
        if not matched:
            raise ConfigError(f"pattern {pattern!r} matches no parameter{nearest_pattern(pattern, names)}")
        low = isinstance(how, Lora)
        rate = how.rate if isinstance(how, Lora) else how
        rates |= dict.fromkeys((name for name in matched if (name in beside) == low), rate)
    return rates


def layered(rates: Mapping[str, float], decay: float) -> dict[str, float]:
    """Rates that fall by `decay` from each block of the encoder to the one before, and to what comes before them all.

    What comes after its last block keeps its rate.
    """
    place = {name: int(found[1]) for name in rates if (found := BLOCK.match(name))}
    depth = max(place.values(), default=0) + 1
    under = {name: depth + 1 for name in rates if name.startswith("encoder.") and not name.startswith("encoder.norm.")}
    steps = under | {name: depth - at for name, at in place.items()}
    return {name: rate * decay ** steps.get(name, 0) for name, rate in rates.items()}


def freeze(model: nn.Module, rates: dict[str, float]) -> None:
    """Let exactly the named parameters ask for gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in rates)
