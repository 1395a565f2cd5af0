"""The plan of a run: it names what learns and how much, and finds what matches nothing, before anything is done."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from sightline.core.config import override
from sightline.core.errors import ConfigError
from sightline.model import VLM
from sightline.recipes import sightline_mini, tiny
from sightline.training.adapters import Lora
from sightline.training.cost import Cost, Usual, cost, machine_memory, usual
from sightline.training.plan import STATE, lasting, plan
from sightline.training.recipe import Recipe, freeze, learning_rates
from sightline.zoo.numbers import short


def test_every_stage_is_told_with_what_it_learns() -> None:
    recipe = sightline_mini()
    sizes = {name: p.numel() for name, p in VLM(recipe.model).named_parameters()}
    lines = list(plan(recipe))
    assert [line for line in lines if line in {stage.name for stage in recipe.stages}] == [
        s.name for s in recipe.stages
    ]
    fusion = sum(size for name, size in sizes.items() if name.startswith("fusion."))
    total = sum(sizes.values())
    align = list(plan(recipe, "align"))
    assert f"  learns     {short(fusion)} of {short(total)} parameters ({fusion / total:.1%})" in align
    assert any(short(4 * total + STATE * fusion, "B") in line for line in align)
    assert "instruct" not in align


def test_what_it_begins_from_is_told() -> None:
    assert "  begins     encoder.* from sightline-mini" in list(plan(tiny()))
    assert "  begins     all from sightline-mini" in list(
        plan(replace(sightline_mini(), start="sightline-mini"), "align")
    )


def test_what_matches_nothing_is_told() -> None:
    with pytest.raises(ConfigError, match="no stage 'algin'; did you mean 'align'"):
        list(plan(sightline_mini(), "algin"))
    with pytest.raises(ConfigError, match=r"'fussion\.\*' matches no parameter"):
        list(plan(override(sightline_mini(), ["stages.2.learn={fussion.*: 0.1}"])))


def learned_cost(recipe: Recipe, sample: Usual) -> Cost:
    """What a sample costs the recipe's only stage."""
    model = VLM(recipe.model)
    freeze(model, learning_rates(model, recipe.stages[0].learn))
    return cost(model.to("meta"), sample)


def test_tokens_work_memory_and_time_are_those_of_the_samples(recipe: Recipe, alone: Callable[..., Recipe]) -> None:
    """A stage of 6 steps, 3 micro-batches of 2, from two sources of weights 3 and 1."""
    chosen = alone(recipe, "instruct", accumulate=3)
    samples = {name: usual(source) for name, source in recipe.sources.items()}
    asked, told = (learned_cost(chosen, samples[name]) for name in ("questions", "captions"))
    lines = list(plan(chosen, rate=lambda precision: 1e6))
    tokens = 36 * (0.75 * asked.tokens + 0.25 * told.tokens)
    work = 0.75 * asked.operations + 0.25 * told.operations
    assert f"  sample     4 tokens of pictures, about {asked.text} of text, questions" in lines
    assert f"  steps      6 of 6 samples, 36 samples and {short(tokens)} tokens in all" in lines
    assert f"  work       {short(work, 'FLOP')} a sample, {short(6 * work, 'FLOP')} a step" in lines
    kept = max(asked.memory(2, "fp32"), told.memory(2, "fp32"))
    assert f"             {short(kept, 'B')} of activations, 2 samples at a time" in lines
    assert f"             of {short(machine_memory(), 'B')} that this machine has" in lines
    assert f"  time       {lasting(36 * work / 1e6)} at this machine's 1.00 MFLOP a second" in lines


def test_blocks_that_are_computed_again_keep_less_for_the_same_work(
    recipe: Recipe, alone: Callable[..., Recipe]
) -> None:
    lines = {
        again: list(plan(alone(recipe, "instruct", recompute=again), rate=lambda precision: 1e6))
        for again in (False, True)
    }
    changed = [(a, b) for a, b in zip(lines[False], lines[True], strict=True) if a != b]
    ((kept, less),) = changed
    assert kept.endswith("of activations, 2 samples at a time")
    number, unit = less.split()[:2]
    whole, _ = kept.split()[:2]
    assert kept.split()[1] == unit and float(number) < 0.7 * float(whole)


def test_adapters_are_told_and_only_they_have_a_state(recipe: Recipe, alone: Callable[..., Recipe]) -> None:
    chosen = alone(recipe, "language", learn={"decoder.*": Lora(2, dora=True)})
    again = replace(chosen.stages[0], name="again")
    lines = list(plan(replace(chosen, stages=(*chosen.stages, again)), rate=lambda precision: 1e6))
    total = sum(p.numel() for p in VLM(recipe.model).parameters())
    # four maps of 24 x 24, three of 24 x 48; a magnitude for each output
    own = 2 * (4 * 48 + 3 * 72) + (4 * 24 + 48 + 48 + 24)
    assert lines.count(f"  learns     {short(own)} of {short(total + own)} parameters ({own / (total + own):.1%})") == 2
    assert "             decoder.* at 0.0002, DoRA of rank 2, alpha 2" in lines
    memory = short(4 * (total + own) + STATE * own, "B")
    assert f"  memory     {memory} of weights, gradients and optimiser state" in lines


def test_the_machine_is_measured_once_for_each_precision(recipe: Recipe) -> None:
    asked: list[str] = []
    list(plan(recipe, rate=lambda precision: asked.append(precision) or 1e9))  # type: ignore[func-returns-value]
    assert asked == ["fp32"]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.4, "under a second"),
        (1.4, "1 second"),
        (100, "100 seconds"),
        (120, "2 minutes"),
        (7200, "2 hours"),
        (2.6e5, "3 days"),
        (1e9, "32 years"),
    ],
)
def test_spans_of_time(seconds: float, told: str) -> None:
    assert lasting(seconds) == told


def test_what_each_of_several_processes_takes(recipe: Recipe, alone: Callable[..., Recipe]) -> None:
    chosen = alone(recipe, "instruct", batch=8, accumulate=2)
    model = VLM(recipe.model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total, block = sum(sizes.values()), sum(n for name, n in sizes.items() if name.startswith("decoder.blocks."))
    learned = sum(n for name, n in sizes.items() if not name.startswith("encoder."))
    whole = list(plan(chosen, rate=lambda precision: 1e6, world=4))
    assert "  processes  4, each with 4 samples of a step" in whole
    memory = 4 * total + STATE * learned
    assert f"  memory     {short(memory, 'B')} of weights, gradients and optimiser state on each" in whole
    assert any(line.endswith("of activations, 4 samples at a time") for line in whole)
    shards = list(plan(chosen, rate=lambda precision: 1e6, world=4, shard=True))
    assert f"  memory     {short(-(-memory // 4), 'B')} of weights, gradients and optimiser state on each" in shards
    assert f"             {short(4 * (total - block) + 8 * block, 'B')} of weights that are gathered from all" in shards
    with pytest.raises(ConfigError, match="5 processes cannot share 16 samples"):
        list(plan(chosen, world=5))
    with pytest.raises(ConfigError, match="learns by muon"):
        list(plan(alone(recipe, "language"), world=2, shard=True))


def test_what_a_process_takes_that_computes_blocks_with_others(recipe: Recipe, alone: Callable[..., Recipe]) -> None:
    """64 processes in groups of 8: an eighth of each block's maps, of which eight hold parts, and all else by 64."""
    decoder = replace(recipe.model.decoder, width=256, heads=8, mlp=512)
    model = replace(recipe.model, decoder=decoder, fusion=replace(recipe.model.fusion, width=256))  # type: ignore[type-var]
    chosen = alone(replace(recipe, model=model), "instruct", batch=16, accumulate=2)
    lines = list(plan(chosen, rate=lambda precision: 1e6, world=64, shard=True, tensor_parallel=8))
    sizes = {name: p.numel() for name, p in VLM(model).named_parameters()}
    maps = 4 * 256 * 256 + 3 * 256 * 512
    block = sum(size for name, size in sizes.items() if name.startswith("decoder.blocks."))
    mine, others = maps // 8 + block - maps, sum(sizes.values()) - block
    encoder = sum(size for name, size in sizes.items() if name.startswith("encoder."))
    held = -(-((4 + STATE) * (8 * mine + others) - STATE * encoder) // 64)
    assert "  processes  64 in groups of 8, each with 4 samples of a step" in lines
    assert f"  memory     {short(held, 'B')} of weights, gradients and optimiser state on each" in lines
    assert f"             {short(4 * (others + 2 * mine), 'B')} of weights that are gathered from all" in lines
    kept = {
        count: next(
            line
            for line in plan(chosen, world=64 // 8 * count, shard=True, tensor_parallel=count)
            if "activations" in line
        )
        for count in (1, 8)
    }
    assert kept[1] != kept[8] and all("4 samples at a time" in line for line in kept.values())
