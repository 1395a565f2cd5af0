"""A reward model that judges answers and learns no more: what a stage with the objective `reward` has made.

It reads answers by its own tokenizer and picture pipeline, so that its design need not be the policy's, and may be told
what is known of a picture, which the policy is not (LLaVA-RLHF, arXiv:2309.14525).
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..core.config import from_dict, to_dict
from ..core.errors import CheckpointError
from ..core.sequence import Conversation, Message, Region, Text
from ..data.batch import Batch, collate
from ..data.processor import Processor, Seen
from ..grounding.codecs import Codec, Grounded, LocationTokens
from ..grounding.codecs.base import Place
from ..model import VLM
from ..zoo import own
from ..zoo.checkpoint import read_json
from .answers import alternatives, asked_about
from .preferring import Reward
from .settings import RewardConfig

WEIGHTS, SETTINGS = "reward/head.safetensors", "reward/settings.json"  # beside a model's own files


class Judge:
    """Rewards of answers about pictures, without gradients; called with a batch that `rollouts` made."""

    def __init__(self, model: VLM, reward: Reward, processor: Processor) -> None:
        self.model, self.reward = model.eval().requires_grad_(False), reward.requires_grad_(False)
        self.processor, self.asks = processor, reward.cfg.asks

    def __call__(self, batch: Batch) -> Tensor:
        samples, answers = batch.extra["samples"], batch.extra["answers"]
        times = len(answers) // len(samples)
        said = [spoken(answer, self.processor.codec) for answer in answers]
        groups = [said[i * times : (i + 1) * times] for i in range(len(samples))]
        return self.judged([s.conversation for s in samples], groups, [s.facts for s in samples])

    def score(self, conversation: Conversation, facts: Sequence[str] = ()) -> float:
        """The reward of the last answer of a conversation: what `preferences.scored` asks of a judge."""
        return float(self.judged([conversation[:-1]], [[conversation[-1]]], [facts]))

    @torch.no_grad()
    def judged(
        self, prompts: Sequence[Conversation], answers: Sequence[Sequence[Message]], facts: Sequence[Sequence[str]]
    ) -> Tensor:
        """Rewards in float32 of all answers to some prompts, in order; the facts of each prompt may be asked about."""
        known: dict[str, Seen] = {}
        rows = []
        for prompt, said, told in zip(prompts, answers, facts, strict=True):
            after = asked_about(self.asks, told, prompt[-1].text)
            rows += alternatives(prompt, said, self.processor, known, after)
        tokenizer = self.processor.tokenizer
        batch = collate(rows, self.processor.patch, tokenizer.control(tokenizer.pad or tokenizer.eos))
        return self.reward.scores(self.model, batch.to(self.model.device))

    def share(self, model: VLM, learned: Collection[str]) -> None:
        """Have in memory once what a model has as well and does not learn."""
        mine = dict(self.model.named_parameters())
        for name, theirs in model.named_parameters():
            if name in learned or name not in mine or mine[name].shape != theirs.shape:
                continue
            if torch.equal(mine[name], theirs.to(mine[name].device)):
                holder, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(holder), last, theirs.requires_grad_(False))

    def to(self, device: torch.device | str) -> "Judge":
        """The same on a device."""
        self.model.to(device)
        self.reward.to(device)
        return self


def spoken(answer: Grounded, codec: Codec | None) -> Message:
    """An answer that was read as the message that it came from, in a convention's form."""
    places: list[Place] = [*answer.boxes, *answer.points]
    if isinstance(codec, LocationTokens) and places:  # there the words are the labels of places
        return Message("assistant", tuple(Region(replace(place, label=f" {place.label}")) for place in places))
    return Message("assistant", (Text(answer.text),))


def files_of(head: nn.Linear, cfg: RewardConfig) -> dict[str, bytes]:
    """What is written beside a model for it to be a reward model, by name."""
    weights = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    return {WEIGHTS: save(weights), SETTINGS: json.dumps(to_dict(cfg), indent=1).encode()}


def is_judge(folder: Path) -> bool:
    """Whether an exported model is a reward model."""
    return (folder / WEIGHTS).is_file()


def load_judge(folder: Path) -> Judge:
    """The reward model of an exported folder; CheckpointError for one that is none."""
    if not is_judge(folder):
        raise CheckpointError(f"{folder}: no {WEIGHTS} in it; a run whose last stage learns a reward model exports one")
    model = own.load_model(folder)
    cfg = from_dict(RewardConfig, read_json(folder / SETTINGS), f"{folder / SETTINGS}")
    head = with_head(own.read_beside(folder, WEIGHTS), cfg, model, folder)
    return Judge(model, head, own.load_processor(folder, model))


def with_head(tensors: dict[str, Tensor], cfg: RewardConfig, model: VLM, place: Path) -> Reward:
    """A reward objective with these weights of its head; CheckpointError where they are another model's."""
    reward = Reward(cfg, model.config.decoder.width)
    try:
        reward.head.load_state_dict(tensors)
    except RuntimeError:
        width = reward.head.in_features
        raise CheckpointError(f"{place}: its reward head does not fit a model of width {width}") from None
    return reward
