"""Preferences and rewards that only the picture decides teach a model to look; without the picture they teach nothing.

The world is a red or blue picture and the question which of the two it is. A model that answers either, as often as
not, is where every run begins.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import PIL.Image
import pytest
import torch
from torch import Tensor

from sightline.core.sequence import Image, Message, Text, ask
from sightline.data.images import Square
from sightline.data.processor import Processor
from sightline.encoders.vit import ViTConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.language.decoder import DecoderConfig
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM, VLMConfig
from sightline.training.answers import answers_of, log_probabilities
from sightline.training.judging import Judge
from sightline.training.loader import Batches
from sightline.training.objectives import NextToken
from sightline.training.preferences import preferred
from sightline.training.preferring import Reward
from sightline.training.recipe import Recipe, Stage
from sightline.training.run import initial_model, objective_of, processor_of
from sightline.training.settings import DPOConfig, GRPOConfig, ObjectiveConfig, PPOConfig, RewardConfig
from sightline.training.sources import Sample
from sightline.training.trainer import Trainer

COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
QUESTION = "what is it?"


@dataclass(frozen=True)
class Colors:
    """Samples of the world; blank pictures for a blind model, any answer at all for one that only learns to talk."""

    blind: bool = False
    gives: Literal["pairs", "conversations"] = "pairs"
    length: int | None = None

    def __call__(self, seed: int, epoch: int, index: int) -> Sample:
        luck = torch.Generator().manual_seed(index + 1000 * seed)
        true = list(COLORS)[int(torch.randint(2, (1,), generator=luck))]
        shade = tuple(c + int(torch.randint(-20, 21, (1,), generator=luck)) for c in COLORS[true])
        image = Image(PIL.Image.new("RGB", (16, 16), (128, 128, 128) if self.blind else shade))
        said = {name: Message("assistant", (Text(name),)) for name in COLORS}
        if self.gives == "conversations":
            return Sample(ask(QUESTION, image, answer=list(COLORS)[int(torch.randint(2, (1,), generator=luck))]))
        false = "blue" if true == "red" else "red"
        return Sample(ask(QUESTION, image), name=true, chosen=said[true], rejected=said[false])


@pytest.fixture(scope="module")
def world(tokenizer: Tokenizer) -> Recipe:
    model = VLMConfig(
        image=ViTConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp=32),
        fusion=ProjectorConfig(inputs=16, width=24),
        decoder=DecoderConfig(vocab_size=480, width=24, depth=1, heads=2, mlp=48, tied=True, max_length=64),
    )
    talk = Stage("talk", {"*": 1e-2}, {"colors": 1.0}, steps=60, batch=16, warmup=5, precision="fp32")
    return Recipe("colors", model, Square(16), {}, (talk,), vocabulary=480, max_length=64)


@pytest.fixture(scope="module")
def talker(world: Recipe, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights of a model that answers with a colour, whatever it sees."""
    model, stage = initial_model(world), world.stages[0]
    data = Batches(stage, 0, 0, {"colors": Colors(gives="conversations")}, processor_of(world, tokenizer, model))
    trainer = Trainer(world, stage, model, NextToken(), tmp_path_factory.mktemp("talk"))
    for k in range(stage.steps):
        trainer.learn([data[k]])
    return model.state_dict()


@torch.no_grad()
def right(model: VLM, processor: Processor, blind: bool = False) -> float:
    """For how many of 64 unseen pictures the true answer is the likelier one."""
    batch = preferred([Colors(blind)(7, 0, k) for k in range(64)], processor, "pairs")
    answers = answers_of(batch)
    likely = answers.sums(log_probabilities(model, batch, answers))
    return float((likely[0::2] > likely[1::2]).float().mean())


STAGES: dict[str, tuple[ObjectiveConfig, float, int]] = {  # settings, rate, steps
    "dpo": (DPOConfig(beta=1.0), 2e-3, 40),
    "ppo": (PPOConfig(kl=0.01, max_new_tokens=4), 5e-3, 50),
    "grpo": (GRPOConfig(group=8, kl=0.01, max_new_tokens=4), 5e-3, 50),
}


@pytest.mark.parametrize("name", list(STAGES))
def test_only_a_model_that_sees_the_picture_learns_to_answer(
    name: str, world: Recipe, talker: dict[str, Tensor], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    objective, rate, steps = STAGES[name]
    stage = replace(world.stages[0], name=name, learn={"*": rate}, steps=steps, objective=objective, decay=0.0)
    recipe = replace(world, stages=(stage,))
    found: dict[bool, tuple[float, ...]] = {}
    for blind in (False, True):
        model = initial_model(recipe)
        model.load_state_dict(talker)
        processor = processor_of(recipe, tokenizer, model)
        data = Batches(stage, 0, 0, {"colors": Colors(blind)}, processor)
        assert 0.3 < right(model, processor) < 0.7
        trainer = Trainer(recipe, stage, model, objective_of(stage, recipe, tokenizer, model), tmp_path / str(blind))
        done = [trainer.learn([data[k]]) for k in range(steps)]
        assert all(step.applied for step in done)
        found[blind] = right(model, processor), right(model, processor, blind=True)
        if name != "dpo":  # what it sampled itself was rewarded in the end, or not
            found[blind] += (sum(step.notes["reward"] for step in done[-5:]) / 5,)
    (seen, blank, *rewarded), never = found[False], found[True]
    assert min([seen, *rewarded]) > 0.9
    assert all(0.3 < share < 0.7 for share in (blank, *never))


@pytest.fixture(scope="module")
def judge(
    world: Recipe, talker: dict[str, Tensor], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Judge:
    """A reward model that learned of pairs which answer the picture asks for."""
    stage = replace(world.stages[0], name="reward", learn={"*": 1e-3}, steps=120, objective=RewardConfig(), decay=0.0)
    model = initial_model(world)
    model.load_state_dict(talker)
    processor = processor_of(world, tokenizer, model)
    data = Batches(stage, 0, 0, {"colors": Colors()}, processor)
    objective = objective_of(stage, world, tokenizer, model)
    trainer = Trainer(replace(world, stages=(stage,)), stage, model, objective, tmp_path_factory.mktemp("reward"))
    for k in range(stage.steps):
        trainer.learn([data[k]])
    reward = objective.terms["reward"]
    assert isinstance(reward, Reward)
    return Judge(model, reward, processor)


def test_a_reward_that_was_learned_teaches_to_look(
    judge: Judge, world: Recipe, talker: dict[str, Tensor], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The policy never sees the truth: it has it from the reward model, which was shown pairs."""
    held = [Colors()(7, 0, k) for k in range(64)]
    pairs = [[each.chosen, each.rejected] for each in held if each.chosen and each.rejected]
    found = judge.judged([each.conversation for each in held], pairs, [()] * 64)
    assert float((found[0::2] > found[1::2]).float().mean()) > 0.9
    objective = PPOConfig(rewards={"judge": 1.0}, kl=0.01, max_new_tokens=4)
    stage = replace(world.stages[0], name="ppo", learn={"*": 5e-3}, steps=50, objective=objective, decay=0.0)
    recipe = replace(world, stages=(stage,))
    for blind in (False, True):
        model = initial_model(recipe)
        model.load_state_dict(talker)
        processor = processor_of(recipe, tokenizer, model)
        data = Batches(stage, 0, 0, {"colors": Colors(blind)}, processor)
        assert 0.3 < right(model, processor) < 0.7
        made = objective_of(stage, recipe, tokenizer, model, {"judge": judge})
        trainer = Trainer(recipe, stage, model, made, tmp_path / str(blind))
        assert all(trainer.learn([data[k]]).applied for k in range(stage.steps))
        if blind:
            assert 0.3 < right(model, processor) < 0.7
        else:
            assert right(model, processor) > 0.9
            assert 0.3 < right(model, processor, blind=True) < 0.7
