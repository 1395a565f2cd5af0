"""How fast a run is against what its machine could do, in a line for a progress bar."""

from ..model import VLM
from ..zoo.hollow import hollow
from ..zoo.numbers import short
from .adapters import adapt
from .cost import matmul_rate, usual_samples
from .plan import costs_of
from .recipe import Recipe, Stage, freeze, learning_rates
from .trainer import EVAL, Step


def operations(recipe: Recipe, stage: Stage) -> float:
    """What a usual sample of a stage costs, forwards and backwards."""
    with hollow():
        model = VLM(recipe.model)
        adapt(model, stage.learn)
    freeze(model, learning_rates(model, stage.learn))
    costs = costs_of(recipe, stage, model, usual_samples(recipe, stage))
    return sum(stage.data[name] * each.operations for name, each in costs.items()) / sum(stage.data.values())


class Pace:
    """The note of each step: its loss, the last one on `eval_data`, tokens a second, and the share of the machine used.

    The share counts what the model's design costs a sample; where features are read from the disk less is computed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.evaluated: dict[str, float] = {}  # the last loss on `eval_data` of each stage
        self.known: dict[str, tuple[float, float]] = {}  # operations of a sample and of this machine in a second

    def share(self, step: Step) -> float:
        """How much of this machine's peak a step used."""
        if step.stage not in self.known:
            stage = self.recipe.stages[self.recipe.stage(step.stage)]
            self.known[step.stage] = operations(self.recipe, stage), matmul_rate(stage.precision)
        each, peak = self.known[step.stage]
        return step.samples_per_second * each / peak

    def note(self, step: Step) -> str:
        """What a bar says beside its own count and time left."""
        speed = short(round(step.tokens_per_second))
        if EVAL in step.notes:
            self.evaluated[step.stage] = step.notes[EVAL]
        last = f", eval {self.evaluated[step.stage]:.3f}" if step.stage in self.evaluated else ""
        return f"{step.stage}, loss {step.loss:.3f}{last}, {speed} tokens/s, {self.share(step):.0%} of peak"
