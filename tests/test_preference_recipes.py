"""Recipes of published preference tuning: their settings, what they hold in memory, and each stage at a tiny size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sightline.language.tokenizer import train_tokenizer
from sightline.model import VLM
from sightline.recipes import recipe
from sightline.training.adapters import Lora, adapt
from sightline.training.cost import cost, usual
from sightline.training.plan import plan
from sightline.training.preferences import PairsSource
from sightline.training.recipe import Recipe, Source, freeze, learning_rates
from sightline.training.run import CONTROLS, last_of, run
from sightline.training.settings import DenseDPOConfig, PPOConfig
from sightline.training.sources import ScenesSource
from sightline.zoo.describe import short
from sightline.zoo.hollow import hollow

NAMES = ("llava-rlhf-13b", "llava-rlhf-7b", "rlhf-v-13b", "rlhf-v-13b-released", "silkie")


def small(name: str) -> Recipe:
    """The recipe with a model of two blocks on scenes, two steps of two samples a stage."""
    found = recipe(name)
    image = replace(found.model.image, image_size=28, width=16, depth=2, heads=2, mlp=24)
    sizes: dict[str, Any] = {"vocab_size": 512, "width": 128, "depth": 2, "heads": 2, "kv_heads": 2, "mlp": 48}
    decoder = replace(found.model.decoder, **sizes, max_length=512)
    changes = {"heads": 2, "side": 2} if name == "silkie" else {}
    fusion = replace(found.model.fusion, inputs=image.features, width=128, **changes)
    pixels = replace(found.pixels, **{"size" if hasattr(found.pixels, "size") else "side": 28})
    sources: dict[str, Source] = {}
    for key, source in found.sources.items():
        pairs = source.gives == "pairs"
        sources[key] = PairsSource(first=2) if pairs else ScenesSource(kind="plain", turns=1)
    cut: dict[str, Any] = {"steps": 2, "batch": 2, "accumulate": 1, "warmup": 0, "precision": "fp32"}
    stages = []
    for stage in found.stages:
        objective = stage.objective
        if isinstance(objective, PPOConfig):
            objective = replace(objective, max_new_tokens=3)
        stages.append(replace(stage, objective=objective, template=None, **cut))
    model = replace(found.model, image=image, fusion=fusion, decoder=decoder)
    from_nothing: dict[str, Any] = {"start": "", "added_tokens": (), "template": "sightline", "vocabulary": 512}
    parts: dict[str, Any] = {"model": model, "pixels": pixels, "sources": sources, "stages": tuple(stages)}
    return replace(found, **parts, **from_nothing, max_length=512)


def begun(folder: Path) -> Path:
    """A run's folder with a tokenizer."""
    texts = ["how many red circles are there? what color is the blue square? yes no one two"] * 30
    controls = tuple(dict.fromkeys((*CONTROLS, "<s>", "</s>")))
    tokenizer = train_tokenizer(texts, 512, controls, bos="<bos>", eos="<eos>", pad="<pad>")
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_each_stage_trains_two_steps(name: str, tmp_path: Path) -> None:
    chosen = small(name)
    if name == "llava-rlhf-7b":  # judged by the run of the other size
        other = replace(small("llava-rlhf-13b"), stages=small("llava-rlhf-13b").stages[:3])
        list(run(other, begun(tmp_path / "judge"), workers=0))
        ppo = chosen.stages[3]
        assert isinstance(ppo.objective, PPOConfig)
        rewards = {str(tmp_path / "judge"): ppo.objective.rewards["runs/llava-rlhf-13b"]}
        rewards |= {key: weight for key, weight in ppo.objective.rewards.items() if "/" not in key}
        chosen = replace(
            chosen, stages=(*chosen.stages[:3], replace(ppo, objective=replace(ppo.objective, rewards=rewards)))
        )
    folder = begun(tmp_path / "run")
    steps = list(run(chosen, folder, workers=0))
    assert [step.step for step in steps] == [1, 2] * len(chosen.stages) and all(step.applied for step in steps)
    for number, stage in enumerate(chosen.stages):
        after = last_of(folder, stage)
        assert after is not None
        if number and (before := last_of(folder, chosen.stages[chosen.path(number)[-2]])):
            base = {key: value for key, value in before.tensors["model"].items() if key in after.tensors["model"]}
            same = {key for key, value in base.items() if torch.equal(value, after.tensors["model"][key])}
            kept = {key for key in base if key.startswith("encoder.")}
            assert name.startswith("rlhf-v") or kept <= same


def test_the_policy_of_llava_rlhf_begins_where_its_reward_model_did() -> None:
    found = recipe("llava-rlhf-13b")
    names = [[found.stages[k].name for k in found.path(number)] for number in range(5)]
    assert names[2] == ["align", "instruct", "reward"] and names[4] == ["align", "instruct", "init", "ppo"]
    ppo = found.stages[4]
    assert ppo.learn == {"decoder.blocks.*": Lora(64, alpha=16, rate=3e-5)}
    assert ppo.rewards == {"reward": 1.0, "text": 2.0, "unfinished": -8.0, "length": -10.0}
    assert "{}" in found.stages[2].settings("reward").asks
    assert recipe("llava-rlhf-7b").stages[3].rewards["runs/llava-rlhf-13b"] == 1.0


def test_both_settings_of_rlhf_v() -> None:
    paper, code = recipe("rlhf-v-13b").stages[0], recipe("rlhf-v-13b-released").stages[0]
    assert paper.objective == DenseDPOConfig(beta=0.5, gamma=5.0, average=True)
    assert code.objective == DenseDPOConfig(beta=0.1, gamma=1.1, average=False)
    assert paper.learn == code.learn == {"*": 5e-7}


@pytest.mark.parametrize(
    ("name", "stage", "samples"),
    [
        ("llava-rlhf-13b", "instruct", 3 * 212_000),
        ("llava-rlhf-13b", "init", 14_500),
        ("llava-rlhf-7b", "ppo", 4 * 72_000),
        ("rlhf-v-13b", "prefer", 7 * 1400),
        ("rlhf-v-13b-released", "prefer", 2160 * 8),
        ("silkie", "prefer", round(3 * 380_000 * 0.995)),
    ],
)
def test_how_much_is_seen(name: str, stage: str, samples: int) -> None:
    found = recipe(name)
    chosen = found.stages[found.stage(stage)]
    batch = chosen.batch * chosen.accumulate
    assert abs(chosen.steps * batch - samples) < batch


def test_what_is_held_beside_the_policy_is_told() -> None:
    """LoRA on LoRA shares all weights below; there is a reference's copy, the reward model's adapters and a head."""
    chosen = small("llava-rlhf-13b")
    with hollow():
        model = VLM(chosen.model)
        blocks = sum(p.numel() for p in model.decoder.blocks.parameters())
        adapt(model, chosen.stages[4].learn)
    own = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("lora_a", "lora_b")))
    lines = list(plan(chosen, "ppo", rate=lambda precision: 1e12))
    assert f"             {short(4 * own, 'B')} of the reference, beside what it shares" in lines
    merged = own + blocks  # of `init` the adapters were merged, of the reward model not
    assert f"             reward model reward: {short(4 * merged, 'B')} of it, beside what it shares" in lines
    assert f"             {short(16 * 129, 'B')} of the value head and its state" in lines
    straight = replace(chosen, stages=(*chosen.stages[:4], replace(chosen.stages[4], after="instruct")))
    lines = list(plan(straight, "ppo", rate=lambda precision: 1e12))
    assert f"             reward model reward: {short(4 * own, 'B')} of it, beside what it shares" in lines
    lines = list(plan(recipe("llava-rlhf-7b"), "ppo", rate=lambda precision: 1e12))
    assert "             reward model runs/llava-rlhf-13b: still to be trained, no such folder yet" in lines


def test_what_is_done_without_gradients_counts_as_work() -> None:
    """DPO reads once more for the reference; PPO writes, measures, asks reference and judge, and learns twice."""
    for name, stage, before, times in (("silkie", "prefer", 1, 1), ("llava-rlhf-13b", "ppo", 4, 2)):
        chosen = small(name)
        found = chosen.stages[chosen.stage(stage)]
        with hollow():
            model = VLM(chosen.model)
            adapt(model, found.learn)
        freeze(model, learning_rates(model, found.learn))
        source = chosen.sources[next(iter(found.data))]
        spent = cost(model, usual(source))
        work = before * spent.forward + times * spent.operations
        lines = list(plan(chosen, stage, rate=lambda precision: 1e12))
        assert f"  work       {short(work, 'FLOP')} a sample, {short(2 * work, 'FLOP')} a step" in lines
