"""Reward models that judge: from a run's own stage, from another run, from an exported folder; never learning."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sightline.core.errors import CheckpointError, ConfigError, InputError
from sightline.core.geometry import Box, Frame
from sightline.core.sequence import Message, Region, Text, images_of
from sightline.data.batch import collate
from sightline.grounding.codecs import Decimals, Grounded, LocationTokens
from sightline.language.tokenizer import Tokenizer
from sightline.training.adapters import Lora, adapt
from sightline.training.answers import alternatives
from sightline.training.export import export
from sightline.training.judging import Judge, load_judge, spoken
from sightline.training.loader import Batches
from sightline.training.policy import PPO
from sightline.training.preferring import Reward
from sightline.training.recipe import Recipe, learning_rates
from sightline.training.run import (
    check_rewards,
    final_model,
    initial_model,
    judge_of,
    last_of,
    objective_of,
    processor_of,
    run,
    stage_judge,
    weights_before,
)
from sightline.training.settings import PPOConfig, RewardConfig
from sightline.training.sources import Sample

Fresh = Callable[[str], Path]


@pytest.fixture(scope="module")
def aligned(recipe: Recipe) -> Recipe:
    """Instructed, a reward model that is told the facts, and a policy that begins where the reward model began."""
    told = replace(recipe.stages[3], steps=1)
    reward = replace(
        told,
        name="reward",
        learn={"decoder.blocks.*": Lora(2, rate=1e-2)},
        data={"pairs": 1.0},
        objective=RewardConfig(asks="is it so? {}"),
        steps=2,
    )
    ppo = replace(
        told,
        name="ppo",
        after="instruct",
        learn={"decoder.blocks.*": 1e-2},
        data={"pairs": 1.0},
        objective=PPOConfig(rewards={"reward": 1.0, "length": -0.5}, max_new_tokens=4),
        steps=3,
        save_every=1,
    )
    return replace(recipe, stages=(told, reward, ppo))


def samples(recipe: Recipe, count: int = 2) -> list[Sample]:
    return [recipe.sources["pairs"](0, 0, 100 + k) for k in range(count)]


def scores(judge: Judge, recipe: Recipe) -> list[float]:
    return [judge.score((*s.conversation, s.chosen), s.facts) for s in samples(recipe) if s.chosen]


def test_a_recipe_trains_its_reward_model_and_then_a_policy_by_it(aligned: Recipe, fresh: Fresh) -> None:
    whole = [(step.stage, step.loss, step.notes) for step in run(aligned, fresh("whole"), workers=0)]
    assert [stage for stage, *_ in whole] == ["instruct", "reward", "reward", "ppo", "ppo", "ppo"]
    folder = fresh("stopped")
    for step in run(aligned, folder, workers=0):
        if step.stage == "ppo" and step.step == 2:
            break
    again = [(step.stage, step.loss, step.notes) for step in run(aligned, folder, workers=0)]
    assert again == whole[-len(again) :] and len(again) in (1, 2)
    assert all(notes["reward"] != 0 for stage, _, notes in whole if stage == "ppo")

    model, judge = initial_model(aligned), stage_judge(aligned, folder, 1)
    weights_before(aligned, folder, 2, model)
    found = last_of(folder, aligned.stages[0])
    assert found is not None
    assert all(torch.equal(value, found.tensors["model"][name]) for name, value in model.state_dict().items())
    assert final_model(aligned, folder)[1] == (aligned.stages[0], aligned.stages[2])
    saved = last_of(folder, aligned.stages[2])
    assert saved is not None
    assert set(saved.tensors["objective"]) == {"terms.ppo.value.weight", "terms.ppo.value.bias"}
    assert set(saved.tensors["model"]) == set(model.state_dict())

    learned = learning_rates(model, aligned.stages[2].learn)
    before = scores(judge, aligned)
    judge.share(model, learned)
    shared = {name for name, p in judge.model.named_parameters() if any(p is q for q in model.parameters())}
    assert shared == {name for name, _ in model.named_parameters()} - set(learned)
    assert scores(judge, aligned) == before
    assert not any(p.requires_grad for p in [*judge.model.parameters(), *judge.reward.parameters()])


def test_it_is_the_same_from_a_folder_and_from_another_run(aligned: Recipe, fresh: Fresh) -> None:
    recipe = replace(aligned, stages=aligned.stages[:2])
    folder = fresh("other")
    list(run(recipe, folder, workers=0))
    wanted = scores(stage_judge(recipe, folder, 1), recipe)
    exported = export(recipe, folder, folder / "model")
    assert scores(load_judge(exported), recipe) == pytest.approx(wanted, abs=0.05)  # its weights are in bf16
    chosen = replace(aligned, stages=(aligned.stages[0], aligned.stages[2]))
    assert scores(judge_of(chosen, folder, 1, str(folder)), recipe) == wanted
    stage = replace(chosen.stages[1], objective=PPOConfig(rewards={str(exported): 1.0}, max_new_tokens=3), steps=1)
    chosen = replace(chosen, stages=(chosen.stages[0], stage))
    assert [step.stage for step in run(chosen, fresh("third"), workers=0)] == ["instruct", "ppo"]
    with pytest.raises(CheckpointError, match=r"no reward/head\.safetensors in it"):
        load_judge(folder)
    head = exported / "reward" / "head.safetensors"
    content = bytearray(head.read_bytes())
    content[-1] ^= 1
    head.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"head\.safetensors: the content differs from its sha256"):
        load_judge(exported)


def judge_by_hand(recipe: Recipe, tokenizer: Tokenizer, cfg: RewardConfig) -> Judge:
    model = initial_model(recipe)
    return Judge(model, Reward(cfg, 24), processor_of(recipe, tokenizer, model))


def test_answers_that_were_sampled_are_judged_about_their_pictures(recipe: Recipe, tokenizer: Tokenizer) -> None:
    judge = judge_by_hand(recipe, tokenizer, RewardConfig(asks="so? {}"))
    stage = replace(
        recipe.stages[3], data={"pairs": 1.0}, objective=PPOConfig(rewards={"judge": 1.0}, max_new_tokens=4)
    )
    model = initial_model(recipe)
    data = Batches(stage, 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))
    objective = objective_of(stage, recipe, tokenizer, model, {"judge": judge})
    ppo = objective.terms["ppo"]
    assert isinstance(ppo, PPO)
    (batch,) = objective.prepare(model, [data[0]], "0 0 0")
    for sample, answer, paid in zip(
        batch.extra["samples"], batch.extra["answers"], batch.extra["rewards"].tolist(), strict=True
    ):
        said = spoken(answer, judge.processor.codec)
        question = Message("user", (Text(f"so? {sample.facts[0]}"),))
        after = (question, Message("assistant", (Text(""),)))
        (row,) = alternatives(sample.conversation, [said], judge.processor, after=after)
        read = collate([row], judge.processor.patch, tokenizer.control("<pad>"))
        assert images_of(sample.conversation) and int(read.ids[0, -1]) == tokenizer.control("<eos>")
        head = judge.reward.head
        wanted = head(judge.model(read)[0, -1])
        assert paid == pytest.approx(float(wanted), abs=1e-5)
        words = tokenizer.encode(sample.facts[0])
        text = tokenizer.encode(question.text)
        assert text[-len(words) :] == words or sample.facts[0] in question.text
    assert not any(sample.facts[0] in sample.conversation[-1].text for sample in batch.extra["samples"])
    assert not any(p.grad is not None for p in judge.model.parameters())
    assert not any("judge" in name or "reward" in name for name in objective.state_dict())


def test_another_picture_is_another_reward(recipe: Recipe, tokenizer: Tokenizer) -> None:
    judge = judge_by_hand(recipe, tokenizer, RewardConfig())
    one, other = samples(recipe)
    assert one.chosen is not None
    (image,), words = images_of(other.conversation), one.conversation[0].parts[1:]
    moved = (Message("user", (image, *words)), one.chosen)
    assert judge.score((*one.conversation, one.chosen)) != judge.score(moved)


def test_facts_that_are_missing_are_told(recipe: Recipe, tokenizer: Tokenizer) -> None:
    judge = judge_by_hand(recipe, tokenizer, RewardConfig(asks="so? {}"))
    sample = samples(recipe)[0]
    assert sample.chosen is not None
    with pytest.raises(InputError, match="nothing is known of its picture, which a reward model is told"):
        judge.score((*sample.conversation, sample.chosen))


def test_a_reward_that_is_nowhere_is_told_before_anything_begins(aligned: Recipe, fresh: Fresh) -> None:
    for name, hint in (("rewrad", "did you mean 'reward'"), ("runs/nowhere", "known: ")):
        stage = replace(aligned.stages[2], objective=PPOConfig(rewards={name: 1.0}))
        chosen = replace(aligned, stages=(*aligned.stages[:2], stage))
        with pytest.raises(ConfigError, match=f"stage 'ppo': '{name}' is not a reward, an earlier stage") as failure:
            next(run(chosen, fresh(name.replace("/", "-")), workers=0))
        assert hint in str(failure.value)
    check_rewards(chosen, 2, {"runs/nowhere": lambda batch: torch.zeros(2)})
    with pytest.raises(CheckpointError, match="stage 'reward' is not finished; train the reward model first"):
        judge_of(aligned, fresh("none"), 2, "reward")


def test_a_callable_may_pay(aligned: Recipe, fresh: Fresh) -> None:
    stage = replace(aligned.stages[2], after="", objective=PPOConfig(rewards={"mine": 2.0}, max_new_tokens=3), steps=1)
    seen: list[int] = []

    def mine(batch: object) -> torch.Tensor:
        seen.append(len(batch.extra["samples"]))  # type: ignore[attr-defined]
        return torch.ones(seen[-1])

    steps = list(run(replace(aligned, stages=(stage,)), fresh("mine"), workers=0, rewards={"mine": mine}))
    assert [step.notes["reward"] for step in steps] == [2.0] and seen == [stage.batch]


def test_places_are_said_in_the_words_of_a_convention() -> None:
    place = Box(1, 2, 3, 4, Frame(10, 10), label="circle")
    found = Grounded("circle", (place,))
    assert spoken(found, LocationTokens()) == Message("assistant", (Region(replace(place, label=" circle")),))
    assert spoken(found, Decimals()) == spoken(found, None) == Message("assistant", (Text("circle"),))


def test_adapters_of_the_policy_share_the_weights_below(aligned: Recipe, fresh: Fresh) -> None:
    folder = fresh("adapters")
    list(run(replace(aligned, stages=aligned.stages[:2]), folder, workers=0))
    judge, model = stage_judge(aligned, folder, 1), initial_model(aligned)
    weights_before(aligned, folder, 2, model)
    learn = {"decoder.blocks.*": Lora(4)}
    adapt(model, learn)
    judge.share(model, learning_rates(model, learn))
    own = [name for name, p in judge.model.named_parameters() if not any(p is q for q in model.parameters())]
    assert own and all(name.endswith(("lora_a", "lora_b")) for name in own)
