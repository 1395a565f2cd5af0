"""What a run would do, told before it does anything."""

from collections.abc import Iterator

from ..model import VLM
from ..zoo.describe import short
from ..zoo.hollow import hollow
from .recipe import Recipe, Stage, check_sources, learning_rates

STATE = 12  # bytes of a learned parameter besides its weight: gradient and two moments in float32


def plan(recipe: Recipe, stage: str | None = None) -> Iterator[str]:
    """Lines about every stage, or one; ConfigError where a stage's patterns or sources match nothing."""
    with hollow():
        model = VLM(recipe.model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    chosen = recipe.stages if stage is None else (recipe.stages[recipe.stage(stage)],)
    yield f"{recipe.name}: {short(sum(sizes.values()))} parameters, seed {recipe.seed}"
    for each in chosen:
        rates = learning_rates(model, each.learn)
        check_sources(each, recipe.sources)
        yield ""
        yield from _stage(each, sum(sizes.values()), sum(sizes[name] for name in rates))


def _stage(stage: Stage, total: int, learned: int) -> Iterator[str]:
    per_step = stage.batch * stage.accumulate
    yield f"{stage.name}"
    yield f"  learns     {short(learned)} of {short(total)} parameters ({learned / total:.1%})"
    yield from (f"             {pattern} at {rate:g}" for pattern, rate in stage.learn.items())
    yield f"  from       {_weighted(stage.data)}, to lower {_weighted(stage.terms)}"
    yield f"  steps      {stage.steps:,} of {per_step} samples, {short(stage.steps * per_step)} samples in all"
    yield f"  with       {stage.optimizer}, {stage.precision}, {stage.warmup} steps of warm-up"
    yield f"  saved      every {stage.save_every} steps"
    memory = short(4 * total + STATE * learned, "B")
    yield f"  memory     {memory} of weights, gradients and optimiser state, activations apart"


def _weighted(weights: dict[str, float]) -> str:
    return " + ".join(f"{name} x {weight:g}" if weight != 1 else name for name, weight in weights.items())
