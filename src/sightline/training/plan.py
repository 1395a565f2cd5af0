"""What a run would do, told before it does anything."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import torch
from torch import nn

from ..core.config import load_yaml
from ..layers.adapted import OWN, adapted, merge
from ..model import VLM
from ..zoo.hollow import hollow
from ..zoo.numbers import short
from ..zoo.own import read_card
from . import distributed
from .adapters import Lora, adapt
from .budget import recompute
from .cost import BYTES, Cost, Usual, cost, machine_memory, matmul_rate, taught_by, usual_samples
from .features import repeats
from .judging import is_judge
from .loader import Share, check_seen
from .recipe import Recipe, Stage, check_sources, freeze, learning_rates, without_files
from .rewards import REWARDS
from .settings import REFERRED, SAMPLED
from .sharding import check_shards
from .starting import given, missing
from .tensor_parallel import check_tensor_parallel, divided

STATE = 12  # bytes of a learned parameter besides its weight: gradient and two moments in float32
SPANS = {"years": 31_557_600, "days": 86_400, "hours": 3600, "minutes": 60}


@dataclass(frozen=True)
class Processes:
    """How many processes a run would have, and whether each would keep a part of the model only."""

    world: int = 1
    shard: bool = False
    tensor: int = 1

    @property
    def groups(self) -> int:
        """How many groups of processes there are, each with samples of its own."""
        return self.world // self.tensor

    def memory(self, model: VLM, stage: Stage) -> tuple[int, int]:
        """Bytes on one process: of its weights, gradients and optimiser state, and of what it gathers for a while.

        model: what one process computes, with the gradients it asks for. Gathered are two blocks of the decoder, one
        computing while the next one comes, and all that is not in one.
        """
        total, inside = _lasting(model), sum(map(_lasting, model.decoder.blocks))
        if not self.shard:
            return total, 0
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.decoder.blocks]
        others = sum(p.numel() for p in model.parameters()) - sum(blocks)
        gathered = 4 * others + BYTES[stage.precision] * 2 * max(blocks)
        return -(-(total - inside + self.tensor * inside) // self.world), gathered


def _lasting(module: nn.Module) -> int:
    """Bytes of a module's weights in float32, and of gradients and optimiser state of those that learn."""
    return sum((4 + STATE * p.requires_grad) * p.numel() for p in module.parameters())


def plan(
    recipe: Recipe,
    stage: str | None = None,
    rate: Callable[[str], float] = matmul_rate,
    world: int = 1,
    shard: bool = False,
    tensor_parallel: int = 1,
) -> Iterator[str]:
    """Lines about every stage, or one; ConfigError where a stage's patterns or sources match nothing.

    rate: operations a second of this machine, by precision. world, shard, tensor_parallel: as many processes, which
    share each step, keep parts of the model, and compute blocks together.
    """
    with hollow():
        model = VLM(recipe.model)
    rate = cache(rate)
    chosen = recipe.stages if stage is None else (recipe.stages[recipe.stage(stage)],)
    absent = missing(recipe)
    yield f"{recipe.name}: {short(sum(p.numel() for p in model.parameters()))} parameters, seed {recipe.seed}"
    for key, name in ({"start": recipe.start} if isinstance(recipe.start, str) else given(recipe.start)).items():
        if name:
            yield _begins(recipe, key, name, absent)
    for each in chosen:
        check_sources(each, recipe.sources)
        check_tensor_parallel(recipe.model, each, tensor_parallel, world, shard)
        Share(0, world // tensor_parallel).check(each)
        if shard:
            check_shards(each)
        yield ""
        yield from _stage(recipe, each, model, rate, Processes(world, shard, tensor_parallel))


def _stage(
    recipe: Recipe, stage: Stage, model: VLM, rate: Callable[[str], float], processes: Processes
) -> Iterator[str]:
    with hollow():
        adapt(model, stage.learn)
    rates = learning_rates(model, stage.learn)
    check_seen(stage, recipe.sources, model)
    freeze(model, rates)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, learned = sum(sizes.values()), sum(sizes[name] for name in rates)
    samples = usual_samples(recipe, stage)
    costs = costs_of(recipe, stage, model, samples)
    mine, own_costs = model, costs
    if processes.tensor > 1 or stage.recompute:
        mine = _own(recipe, stage, processes.tensor)
        own_costs = costs_of(recipe, stage, mine, samples)
    held, gathered = processes.memory(mine, stage)
    with hollow():
        merge(model)
    shares = {name: weight / sum(stage.data.values()) for name, weight in stage.data.items()}
    tokens = sum(shares[name] * each.tokens for name, each in costs.items())
    before, times = _passes(stage)
    per_sample, own_per_sample = (
        sum(shares[name] * (before * each.forward + times * each.operations) for name, each in found.items())
        for found in (costs, own_costs)
    )
    per_step = stage.batch * stage.accumulate
    count = stage.steps * per_step
    speed = rate(stage.precision)
    sees = any(each.pictures for each in samples.values())
    yield f"{stage.name}"
    yield f"  learns     {short(learned)} of {short(total)} parameters ({learned / total:.1%})"
    for pattern, how in stage.learn.items():
        yield f"             {pattern} at {how if isinstance(how, Lora) else f'{how:g}'}"
    worth = f", {_weighted(stage.loss_weights)}" if stage.loss_weights else ""
    yield f"  from       {_weighted(stage.data)}, to lower {_weighted(stage.terms)}{worth}"
    for name, source in without_files(stage, recipe.sources).items():
        yield f"  files      sources.{name}.path=FILE is still to be given, in the format {source.format}"
    for name, each in costs.items():
        guess = ", a guess until there are files" if samples[name].guess else ""
        whose = f", {name}" if len(costs) > 1 else ""
        yield f"  sample     {each.visual:,} tokens of pictures, about {each.text:,} of text{guess}{whose}"
    whole = f"{short(count)} samples and {short(count * tokens)} tokens in all"
    yield f"  steps      {stage.steps:,} of {per_step:,} samples, {whole}"
    yield f"  with       {stage.optimizer}, {stage.precision}, {_steps(stage.warmup)} of warm-up{_apart(stage)}"
    frozen = sees and not any(name.startswith("encoder.") for name in rates)
    if frozen and stage.feature_store and not without_files(stage, recipe.sources):
        yield f"  features   of the frozen encoder are {_features(stage, recipe)}"
    if stage.eval_data:
        when = f"every {_steps(stage.eval_every)} and at the end" if stage.eval_every else "at the end"
        yield f"  evaluated  on {_weighted(stage.eval_data)}, {stage.eval_samples:,} samples at most, {when}"
    yield f"  saved      every {stage.save_every} steps"
    world, groups = processes.world, processes.groups
    own = Share(0, groups).largest(stage)
    if world > 1:
        those = "" if groups == world else f" in groups of {processes.tensor}"
        yield f"  processes  {world:,}{those}, each with {per_step // groups:,} samples of a step"
    where = " on each" if world > 1 else ""
    yield f"  memory     {short(held, 'B')} of weights, gradients and optimiser state{where}"
    if gathered:
        yield f"             {short(gathered, 'B')} of weights that are gathered from all"
    yield from _held_beside(recipe, stage, model, rates, sizes, processes)
    kept = max(each.memory(own * _answers(stage), stage.precision) for each in own_costs.values())
    yield f"             {short(kept, 'B')} of activations, {own:,} samples at a time"
    yield f"             of {short(machine_memory(), 'B')} that this machine has"
    yield f"  work       {short(per_sample, 'FLOP')} a sample, {short(per_sample * per_step, 'FLOP')} a step"
    spent = own_per_sample * count / speed / groups
    whose = "this machine's" if world == 1 else f"{world:,} times this one's"
    yield f"  time       {lasting(spent)} at {whose} {short(speed, 'FLOP')} a second"


def _begins(recipe: Recipe, key: str, name: str, absent: Mapping[str, str]) -> str:
    """Where a part comes from, or how it is still to be given."""
    part, way = (key, f"start.{key}")
    if isinstance(recipe.start, str):
        part, way = ("all" if recipe.taken == ("*",) else ", ".join(recipe.taken)), key
    if way not in absent:
        return f"  begins     {part} from {name}"
    return f"  begins     {way}=FOLDER is still to be given: {name}"


def _apart(stage: Stage) -> str:
    """The patterns whose rates rise over steps of their own, and what is unusual."""
    more = "".join(f", {pattern} over {steps:,}" for pattern, steps in stage.warmups.items())
    for name, usually in (("dropout", 0), ("drop_path", 0), ("layer_decay", 1)):
        if (value := getattr(stage, name)) != usually:
            more += f", {name.replace('_', ' ')} {value:g}"
    if stage.trainable_tokens:
        more += f", of words only {' '.join(stage.trainable_tokens)}"
    return more


def _steps(count: int) -> str:
    return f"{count:,} step{'s' if count != 1 else ''}"


def _passes(stage: Stage) -> tuple[int, int]:
    """How often a sample is read without gradients and learned from, whichever answers it is read with."""
    if not SAMPLED & set(stage.terms):
        return int(bool(REFERRED & set(stage.terms))), 1
    updates = next(stage.settings(name).updates for name in stage.terms if name in SAMPLED)
    judges = sum(name not in REWARDS for name in stage.rewards)
    # written, measured, by the reference as well, judged
    return _answers(stage) * (3 + judges), _answers(stage) * updates


def _answers(stage: Stage) -> int:
    """How many answers a prompt gets, of a stage that learns from its own."""
    return int(next((stage.settings(name).group for name in stage.terms if name == "grpo"), 1))


def _held_beside(
    recipe: Recipe,
    stage: Stage,
    model: VLM,
    rates: Mapping[str, float],
    sizes: Mapping[str, int],
    processes: Processes,
) -> Iterator[str]:
    """What else is in memory: the model as it was, reward models, a value head, what an objective has of its own."""
    if REFERRED & set(stage.terms) and processes.shard:
        yield f"             {short(4 * sum(sizes.values()) / processes.world, 'B')} of the reference"
    elif REFERRED & set(stage.terms):
        own = sum(sizes[name] for name in rates)
        yield f"             {short(4 * own, 'B')} of the reference, beside what it shares"
    for name in stage.rewards:
        if name in REWARDS:
            continue
        found = _judge_size(recipe, stage, name, rates)
        told = (
            "still to be trained, no such folder yet"
            if found is None
            else f"{short(4 * found, 'B')} of it, beside what it shares"
        )
        yield f"             reward model {name}: {told}"
    if (taught := taught_by(recipe, stage, model)) is not None:
        yield f"             {short(_lasting(taught), 'B')} of what the objective learns for itself"
    if "ppo" in stage.terms:
        head = (4 + STATE) * (recipe.model.decoder.width + 1)
        yield f"             {short(head, 'B')} of the value head and its state"


def _judge_size(recipe: Recipe, stage: Stage, name: str, rates: Mapping[str, float]) -> int | None:
    """Parameters that a reward model has for itself; None where there is none yet.

    One of an earlier stage shares with the policy what neither of them, nor a stage on the way of one alone, changed.
    """
    stages = {each.name: number for number, each in enumerate(recipe.stages)}
    if name not in stages:
        folder = Path(name)
        ran = (folder / "run.yaml").is_file()
        if not is_judge(folder) and not ran:
            return None
        with hollow():
            other = VLM(load_yaml(Recipe, folder / "run.yaml").model if ran else read_card(folder).model)
        return sum(p.numel() for p in other.parameters())
    judge = recipe.stages[stages[name]]
    mine, its = recipe.path(stages[stage.name])[:-1], recipe.path(stages[name])
    alone = [recipe.stages[k] for k in {*mine} ^ {*its} if k != stages[name]]
    changed = [pattern for each in alone for pattern in each.learn]  # adapters of those were merged
    changed += [pattern for pattern, how in judge.learn.items() if not isinstance(how, Lora) or stages[name] in mine]
    with hollow():
        model = VLM(recipe.model)
        adapt(model, judge.learn)
    adapters = {f"{base}.{own}" for base in adapted(model) for own in OWN}
    own = 0
    for each, p in model.named_parameters():
        if each in adapters or each in rates or any(fnmatchcase(each, pattern) for pattern in changed):
            own += p.numel()
    return own


def _own(recipe: Recipe, stage: Stage, count: int) -> VLM:
    """What one of so many processes computes of a stage's model, in the way that it does, without content."""
    with hollow():
        model = VLM(divided(recipe.model, count) if count > 1 else recipe.model)
        adapt(model, stage.learn)
    freeze(model, learning_rates(model, stage.learn))
    if stage.recompute:
        recompute(model)
    return model


def _features(stage: Stage, recipe: Recipe) -> str:
    """What becomes of a frozen encoder's features."""
    times = repeats(stage, recipe.sources)
    if times > 1:
        return f"kept, {stage.feature_store:g} GB at most: samples are met {times:.1f} times"
    return f"computed each time: {'no sample is met twice' if times else 'its sources never repeat'}"


def costs_of(recipe: Recipe, stage: Stage, model: VLM, samples: Mapping[str, Usual]) -> dict[str, Cost]:
    """What a sample of each source costs; sources whose samples are alike are measured once."""
    known: dict[tuple[Usual, bool], Cost] = {}
    found = {}
    ways = torch.device(distributed.device()).type, stage.precision
    taught = taught_by(recipe, stage, model)
    for name, sample in samples.items():
        key = sample, recipe.sources[name].gives != "pictures"
        if key not in known:
            known[key] = cost(model, *key, taught, *ways)
        found[name] = known[key]
    return found


def lasting(seconds: float) -> str:
    """A span of time in the largest unit that it holds two of."""
    for name, length in SPANS.items():
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {name}"
    whole = round(seconds)
    return "under a second" if whole == 0 else f"{whole} second{'s' if whole != 1 else ''}"


def _weighted(weights: Mapping[str, float]) -> str:
    return " + ".join(f"{name} x {weight:g}" if weight != 1 else name for name, weight in weights.items())
