"""Answers that the model that learns samples itself, with what they are worth.

An answer's chance is its own: drawn from (seed, stage, step, place in the step), so that a run that goes on samples
what it would have sampled, and two micro-batches what one of both would.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.errors import CapacityError
from ..data.batch import Batch, Example, collate
from ..data.processor import Processor
from ..model import VLM
from .answers import extended, packed
from .chance import drawn, luck
from .rewards import Rewards, checkable


@dataclass(frozen=True)
class Rollouts:
    """Turns a batch of prompts into one of answers: `times` to each prompt, of at most `most` tokens."""

    processor: Processor
    times: int
    most: int
    rewards: Rewards = checkable

    @torch.no_grad()
    def __call__(self, model: VLM, batch: Batch, key: str, first: int = 0) -> Batch:
        """Answers as branches of their prompts, all that was sampled learned.

        key: what the chance of all answers hangs on, with the number of each prompt, counted from `first`. extra of
        the batch: "samples" that were asked, "answers" as they read, "truths" beside them, "shares" of the most tokens
        that each takes, whether it was "cut", and "rewards" [answers].
        """
        prompts: list[Example] = batch.extra["prompts"]
        chance = [f"{key} {first + i} {k}" for i in range(len(prompts)) for k in range(self.times)]
        end = self.processor.end
        said = sample(model, batch, self.times, self.most, end, chance)
        rows: list[Example] = []
        for i, prompt in enumerate(prompts):
            own = said[i * self.times : (i + 1) * self.times]
            rows += packed([extended(prompt, ids) for ids in own], self.processor)
        pad = self.processor.tokenizer.control(self.processor.tokenizer.pad or self.processor.tokenizer.eos)
        made = collate(rows, self.processor.patch, pad).to(model.device)
        ways = [prompt.transforms for prompt in prompts for _ in range(self.times)]
        read = [self.processor.read(_text(ids, end), way) for ids, way in zip(said, ways, strict=True)]
        truths = [truth for truth in batch.extra["truths"] for _ in range(self.times)]
        extra = {name: batch.extra[name] for name in ("names", "samples")} | {"answers": read, "truths": truths}
        extra["shares"] = torch.tensor([len(ids) / self.most for ids in said])
        extra["cut"] = [ids[-1] != end for ids in said]
        made = replace(made, extra=extra)
        extra["rewards"] = self.rewards(made).to(model.device, torch.float32)
        return made


def _text(ids: Sequence[int], end: int) -> list[int]:
    return [index for index in ids if index != end]


@torch.no_grad()
def sample(model: VLM, batch: Batch, times: int, most: int, end: int, chance: Sequence[str]) -> list[list[int]]:
    """Ids of `times` answers to every prompt of a batch, drawn at temperature one, the end token included.

    chance: what each answer's luck hangs on. An answer that does not end within `most` tokens is cut.
    """
    real = batch.layout.document >= 0
    longest = int(real.sum(1).max())
    most = min(most, model.config.decoder.max_length - longest)
    if most < 1:
        raise CapacityError(f"a prompt of {longest} tokens leaves the model no room for an answer")
    last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)
    last = last + torch.arange(len(last), device=last.device) * real.shape[1]
    cache = model.new_cache(real.shape[1] + most)
    logits = model.logits(model(batch, cache, rows=last)).repeat_interleave(times, 0)
    cache = cache.copy(times)
    own = torch.stack([luck(text, most) for text in chance]).to(logits.device)
    said: list[Tensor] = []
    done = torch.zeros(len(own), dtype=torch.bool, device=logits.device)
    for t in range(most):
        said.append(drawn(logits, own[:, t]))
        done = done | (said[-1] == end)
        if t == most - 1 or bool(done.all()):
            break
        assert cache.layout is not None
        step = Batch(said[-1][:, None], cache.layout.next(), torch.zeros(0, dtype=torch.int64, device=logits.device))
        logits = model.logits(model(step, cache)[:, -1])
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in torch.stack(said, 1).tolist()]
