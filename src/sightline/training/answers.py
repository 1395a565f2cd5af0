"""Answers inside a batch, and how likely a model is to write them: what every objective on answers begins with.

Several answers to one prompt share one row as branches, so that the picture is seen and the question read once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..core.errors import CapacityError, InputError
from ..core.sequence import Conversation, Message, Text
from ..data.batch import IGNORE, Batch, Example, branched
from ..data.processor import Processor, Seen
from ..model import VLM


def begins(learned: Tensor) -> Tensor:
    """Where an answer begins in rows [batch, length] of what is learned: after something that is not."""
    before = F.pad(learned[:, :-1], (1, 0), value=False)
    return learned & ~before


@dataclass(frozen=True)
class Answers:
    """The learned tokens of a batch, row by row.

    places: [n], the tokens after which something is learned, counted through the batch; ids: [n], what is to be
    written there; which: [n], the answer that each belongs to, of `count` in all.
    """

    places: Tensor
    ids: Tensor
    which: Tensor
    count: int

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer."""
        return torch.bincount(self.which, minlength=self.count)

    @property
    def ends(self) -> Tensor:
        """The last token of each answer, counted through the batch."""
        return self.places[self.lengths.cumsum(0) - 1] + 1

    def sums(self, values: Tensor) -> Tensor:
        """The sum [count] of what each answer's tokens have [n]."""
        return values.new_zeros(self.count).index_add(0, self.which, values)

    def rows(self, values: Tensor) -> Tensor:
        """Values [n] as [count, longest], zeros after the end of shorter answers."""
        return pad_sequence(list(values.split(self.lengths.tolist())), batch_first=True)

    def flat(self, rows: Tensor) -> Tensor:
        """The way back from `rows`."""
        real = torch.arange(rows.shape[1], device=rows.device) < self.lengths[:, None]
        return rows[real]


def answers_of(batch: Batch) -> Answers:
    """What is learned in a batch, as answers."""
    assert batch.labels is not None
    learned = batch.labels != IGNORE
    places = learned.flatten().nonzero()[:, 0]
    which = begins(learned).flatten()[places].long().cumsum(0) - 1
    return Answers(places, batch.labels.flatten()[places], which, count_of(batch))


def count_of(batch: Batch) -> int:
    """How many answers a batch holds."""
    assert batch.labels is not None
    return int(begins(batch.labels != IGNORE).sum())


def written(model: VLM, hidden: Tensor, ids: Tensor, chunk: int = 8192) -> Tensor:
    """Log-probabilities [n] in float32 of writing ids [n] after hidden states [n, width]; the head goes in chunks."""
    parts = [
        -F.cross_entropy(model.logits(h), i, reduction="none")
        for h, i in zip(hidden.split(chunk), ids.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def log_probabilities(model: VLM, batch: Batch, answers: Answers) -> Tensor:
    """Of every learned token [n] of a batch; the model's head is applied to nothing else."""
    return written(model, model(batch, rows=answers.places), answers.ids)


Reference = Callable[[Batch], Tensor]  # log-probabilities [n] of the learned tokens of a batch, without gradients


# ------------------------------------------------------------------------------------------------------------- packing


def alternatives(
    prompt: Conversation,
    answers: Sequence[Message],
    processor: Processor,
    known: dict[str, Seen] | None = None,
    after: Conversation = (),
) -> list[Example]:
    """Several answers to one prompt, in order, in one example; of each only the answer is learned.

    Where pictures see the question, nothing can branch off it: then each answer is an example of its own. after: what
    follows each answer, the last of which is then learned in its place.
    """
    known = {} if known is None else known
    talks = [(*prompt, said, *after) for said in answers]
    return packed([_answered(processor(talk, known), talk) for talk in talks], processor)


def asked_about(asks: str, facts: Sequence[str], name: str) -> Conversation:
    """A question about an answer, with what is known of its picture, and the empty reply whose end is read.

    Nothing where nothing is asked; InputError where the facts are missing that it speaks of.
    """
    if "{}" in asks and not facts:
        raise InputError(f"{name:.60}: nothing is known of its picture, which a reward model is told; set facts=FILE")
    question = Message("user", (Text(asks.replace("{}", "; ".join(facts))),))
    return (question, Message("assistant", (Text(""),))) if asks else ()


def packed(examples: Sequence[Example], processor: Processor) -> list[Example]:
    """Examples of one prompt as one that branches, where the processor's look allows it."""
    return list(examples) if processor.look == "prefix" else [branched(examples)]


def _answered(example: Example, conversation: Conversation) -> Example:
    """The example with nothing learned but its last answer; CapacityError where that did not fit."""
    start = begins((example.labels != IGNORE)[None])[0].nonzero()[:, 0]
    if len(start) < sum(message.role == "assistant" for message in conversation):
        raise CapacityError("a prompt and its answer are longer than the context; shorten the conversation")
    labels = example.labels.clone()
    labels[: int(start[-1])] = IGNORE
    return replace(example, labels=labels)


def extended(prompt: Example, ids: Sequence[int]) -> Example:
    """A prompt with ids that a model has written after it, all of them learned."""
    new = len(ids)
    count = torch.arange(1, new + 1)

    def column(name: str, more: Tensor) -> Tensor:
        return torch.cat((getattr(prompt, name), more))

    labels = column("labels", torch.full((new,), IGNORE))
    labels[prompt.length - 1 : -1] = torch.tensor(ids)
    return replace(
        prompt,
        ids=column("ids", torch.tensor(ids)),
        block=column("block", prompt.block.max() + count),
        position=column("position", prompt.position.max() + count),
        medium=column("medium", torch.zeros_like(count)),
        item=column("item", prompt.item[-1].expand(new)),
        branch=column("branch", torch.zeros_like(count)),
        labels=labels,
    )
