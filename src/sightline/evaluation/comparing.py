"""One small design with one fusion after another, on the same samples in the same order: what each of them is worth.

Each is trained from several seeds, once for the same number of steps and once for as many steps as cost the same number
of operations as the first one's. Every finished run is kept, so that a comparison that was stopped goes on.
"""

import hashlib
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..core.config import to_dict
from ..core.errors import ConfigError
from ..core.sequence import Conversation
from ..grounding.codecs import Grounded
from ..model import VLM
from ..serving.engine import Engine
from ..training import charts
from ..training.features import GIGABYTE, FeatureStore
from ..training.loader import Batches
from ..training.recipe import Recipe, learning_rates
from ..training.records import whole
from ..training.run import final_model, initial_model, objective_of, processor_of, run, tokenizer_of
from ..training.sources import ScenesSource
from ..training.trainer import Step, Trainer
from ..zoo.numbers import short
from .designs import Price, price, stretched, with_fusion
from .scenes import evaluate

Budget = Literal["steps", "operations"]
BUDGETS: tuple[Budget, ...] = ("steps", "operations")
STORE = 8 * GIGABYTE  # features of the frozen encoder, which all runs share
TIMED = 4  # steps
# two-sided 95% of Student's distribution by degrees of freedom from 1; beyond, the last is a little wide
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Outcome:
    """What one run gave. scores: right answers and questions by kind. speed: samples a second, where it was timed."""

    fusion: str
    seed: int
    budget: Budget
    steps: int
    scores: dict[str, tuple[int, int]]
    speed: float = 0.0
    settings: str = ""  # digest of the recipe and of how many questions were asked

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of right answers of all questions, then by kind."""
        right, total = (sum(each[i] for each in self.scores.values()) for i in (0, 1))
        return {"all": right / total, **{kind: r / n for kind, (r, n) in sorted(self.scores.items())}}


@dataclass(frozen=True)
class Job:
    """One run that is to be done."""

    fusion: str
    budget: Budget
    recipe: Recipe
    questions: int

    @property
    def name(self) -> str:
        return f"{self.fusion}-{self.budget}-{self.recipe.seed}"

    @property
    def settings(self) -> str:
        said = json.dumps([to_dict(self.recipe), self.questions], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.recipe.stages)


def outcome_of(job: Job, folder: Path) -> Outcome | None:
    """A run's outcome where it is finished; ConfigError where that was done with other settings."""
    path = folder / f"{job.name}.json"
    if not path.exists():
        return None
    data = json.loads(path.read_text())
    if data["settings"] != job.settings:
        raise ConfigError(f"{path}: was made with other settings; choose another folder")
    return Outcome(**{**data, "scores": {kind: (right, total) for kind, (right, total) in data["scores"].items()}})


def perform(job: Job, folder: Path, store: FeatureStore, timed: bool, told: Callable[[Step], None]) -> Outcome:
    """Train, ask, and keep the outcome; a run that was stopped goes on."""
    where, recipe = folder / job.name, job.recipe
    for step in run(recipe, where, workers=0, store=store):
        told(step)
    model, _ = final_model(recipe, where)
    scores = asked(recipe, model, where, store, job.questions)
    speed = timing(recipe, where) if timed else 0.0
    outcome = Outcome(job.fusion, recipe.seed, job.budget, job.steps, scores, speed, job.settings)
    whole(folder / f"{job.name}.json", lambda path: path.write_text(json.dumps(asdict(outcome))))
    shutil.rmtree(where / "checkpoints")
    return outcome


def scenes_of(recipe: Recipe) -> tuple[ScenesSource, int]:
    """The scenes that the last stage ends with, and the index they have reached."""
    stage = recipe.stages[-1]
    for name in stage.data:
        source = recipe.sources[name]
        if isinstance(source, ScenesSource) and source.kind in ("plain", "questions"):
            return source, stage.steps * stage.batch * stage.accumulate
    raise ConfigError(f"recipe {recipe.name!r}: its last stage has no questions about scenes, which are compared by")


def asked(recipe: Recipe, model: VLM, folder: Path, store: FeatureStore, questions: int) -> dict[str, tuple[int, int]]:
    """Right answers and questions by kind, about scenes of unseen seeds."""
    if not any(name.startswith("encoder.") for stage in recipe.stages for name in learning_rates(model, stage.learn)):
        store.serve(model.encoder, recipe.pixels)
    engine = Engine(model, processor_of(recipe, tokenizer_of(recipe, folder), model))

    def answers(talks: Sequence[Conversation]) -> list[Grounded]:
        return [reply.grounded for reply in engine.answer(talks)]

    source, index = scenes_of(recipe)
    report = evaluate(answers, questions, world=source.world(index), asking=source.asking)
    return {kind: (score.right, score.total) for kind, score in report.groups.items()}


def timing(recipe: Recipe, folder: Path) -> float:
    """Samples a second of a step of the last stage, encoder included, without making them; the best of a few steps."""
    model, stage, tokenizer = initial_model(recipe), recipe.stages[-1], tokenizer_of(recipe, folder)
    data = Batches(stage, 0, recipe.seed, recipe.sources, processor_of(recipe, tokenizer, model))
    micro = [data[k] for k in range(stage.accumulate)]
    with tempfile.TemporaryDirectory() as place:
        trainer = Trainer(recipe, stage, model, objective_of(stage, recipe, tokenizer, model), Path(place))
        best = math.inf
        for _ in range(1 + TIMED):
            began = time.perf_counter()
            trainer.learn(micro)
            best = min(best, time.perf_counter() - began)
    return stage.batch * stage.accumulate / best


# ---------------------------------------------------------------------------------------------------------- all of them


@dataclass
class Comparison:
    """Outcomes so far, and what each fusion costs."""

    recipe: Recipe
    seeds: int
    questions: int
    prices: dict[str, Price]
    outcomes: list[Outcome] = field(default_factory=list)

    def summary(self, fusion: str, budget: Budget) -> dict[str, charts.Interval]:
        """Mean accuracy over seeds with its 95% interval, of all questions and by kind; one seed has no interval."""
        found = [each.accuracy for each in self.outcomes if (each.fusion, each.budget) == (fusion, budget)]
        kinds = dict.fromkeys(kind for each in found for kind in each)
        return {kind: spread([each[kind] for each in found if kind in each]) for kind in kinds}

    def steps(self, fusion: str, budget: Budget) -> int:
        """How many steps were done under a budget."""
        return next(each.steps for each in self.outcomes if (each.fusion, each.budget) == (fusion, budget))

    def done(self, budget: Budget) -> list[str]:
        """The fusions with an outcome under a budget."""
        return [f for f in self.prices if any((o.fusion, o.budget) == (f, budget) for o in self.outcomes)]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON knows it."""
        return {
            "recipe": to_dict(self.recipe),
            "questions": self.questions,
            "prices": {name: asdict(each) for name, each in self.prices.items()},
            "outcomes": [asdict(each) for each in self.outcomes],
            "accuracy": {
                budget: {fusion: self.summary(fusion, budget) for fusion in self.done(budget)} for budget in BUDGETS
            },
        }

    def markdown(self) -> str:
        """The tables."""
        speeds = {each.fusion: each.speed for each in self.outcomes if each.speed}
        lines = [
            f"# {self.recipe.name}: fusions compared",
            "",
            f"Accuracy on {self.questions} questions about unseen scenes: the mean of {_seeds(self.seeds)} and the 95% "
            "interval of that mean.",
        ]
        titles = {"steps": "At equal steps", "operations": f"At the operations of {next(iter(self.prices))}"}
        for budget in BUDGETS:
            if not (fusions := self.done(budget)):
                continue
            kinds = list(self.summary(fusions[0], budget))
            lines += ["", f"## {titles[budget]}", "", _row(["fusion", "steps", "seeds", *kinds])]
            lines.append(_row(["---", *["---:"] * (2 + len(kinds))]))
            for fusion in fusions:
                found = self.summary(fusion, budget)
                count = sum((each.fusion, each.budget) == (fusion, budget) for each in self.outcomes)
                shares = [_said(found.get(kind)) for kind in kinds]
                lines.append(_row([fusion, f"{self.steps(fusion, budget):,}", str(count), *shares]))
        lines += ["", "## What they cost", "", _row(COSTS), _row(["---", *["---:"] * (len(COSTS) - 1)])]
        samples = sum(stage.steps * stage.batch * stage.accumulate for stage in self.recipe.stages)
        for name, each in self.prices.items():
            speed = f"{speeds[name]:.0f}" if name in speeds else "–"
            work, memory = short(round(each.operations / samples), "FLOP"), short(each.memory, "B")
            lines.append(_row([name, str(each.visual), short(each.learned), work, speed, memory]))
        return "\n".join(lines) + "\n"

    def plot(self) -> str:
        """Accuracy of all questions under both budgets, as SVG."""
        rows = {fusion: [self.summary(fusion, budget).get("all") for budget in BUDGETS] for fusion in self.prices}
        title = f"{self.recipe.name}: right answers, mean of {_seeds(self.seeds)}, 95% interval"
        return charts.intervals(title, rows, ["equal steps", "equal operations"])

    def write(self, folder: Path) -> None:
        """`comparison.json`, `.md` and `.svg`."""
        whole(folder / "comparison.json", lambda path: path.write_text(json.dumps(self.to_dict(), indent=1)))
        whole(folder / "comparison.md", lambda path: path.write_text(self.markdown()))
        whole(folder / "comparison.svg", lambda path: path.write_text(self.plot()))


COSTS = ["fusion", "tokens a picture", "parameters learned", "work a sample", "samples a second", "memory"]


def spread(values: Sequence[float]) -> charts.Interval:
    """Mean of shares and its 95% interval by Student's distribution, cut at 0 and 1; of one value the value alone."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean, mean
    wide = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, max(0.0, mean - wide), min(1.0, mean + wide)


def _said(interval: charts.Interval | None) -> str:
    if interval is None:
        return "–"
    mean, low, high = interval
    return f"{mean:.1%}" if low == high else f"{mean:.1%} ({low:.1%} – {high:.1%})"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def jobs_of(recipe: Recipe, fusions: Sequence[str], seeds: int, questions: int) -> tuple[list[Job], dict[str, Price]]:
    """Every run of a comparison, and what the designs cost; runs of equal steps first, seed by seed."""
    if seeds < 1 or questions < 1:
        raise ConfigError(f"{seeds} seeds and {questions} questions, expected at least 1")
    if not fusions or len(set(fusions)) < len(fusions):
        raise ConfigError(f"fusions {', '.join(fusions) or 'none'}: expected some, each once")
    designs = {name: with_fusion(recipe, name) for name in fusions}
    prices = {name: price(design) for name, design in designs.items()}
    allowed = prices[fusions[0]].operations
    jobs = []
    for budget in BUDGETS:
        for seed in range(recipe.seed, recipe.seed + seeds):
            for name, design in designs.items():
                factor = 1.0 if budget == "steps" else allowed / prices[name].operations
                jobs.append(Job(name, budget, stretched(replace(design, seed=seed), factor), questions))
    return jobs, prices


def compare(
    recipe: Recipe,
    fusions: Sequence[str],
    folder: Path,
    seeds: int = 3,
    questions: int = 400,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Comparison:
    """Train and ask every fusion, and write tables and a plot into the folder after each run."""
    scenes_of(recipe)
    jobs, prices = jobs_of(recipe, fusions, seeds, questions)
    found = Comparison(recipe, seeds, questions, prices)
    runs = folder / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    store = FeatureStore(folder / "features", STORE)
    total, before = sum(job.steps for job in jobs), 0
    for job in jobs:
        # as many steps under both budgets are one run
        same = next((each for each in found.outcomes if each.settings == job.settings), None)
        outcome = same or outcome_of(job, runs)
        if outcome is None:
            done = before

            def told(step: Step, name: str = job.name, done: int = done) -> None:
                progress(done + step.step, total, f"{name}, loss {step.loss:.3f}")

            timed = job.budget == "steps" and job.recipe.seed == recipe.seed
            outcome = perform(job, runs, store, timed, told)
        found.outcomes.append(replace(outcome, budget=job.budget))
        before += job.steps
        found.write(folder)
    return found
