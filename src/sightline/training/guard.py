"""Whether a model that is being trained looks at its pictures: its loss with them, with blank ones, and with others'.

A loss that falls says nothing of that: answers can be guessed from questions. Samples that the stage never learns from
are read three times; a model that looks does clearly worse without its own picture.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import PIL.Image
import torch

from ..core.sequence import Conversation, Image, Message, Part, Video, images_of
from ..data.batch import Batch
from .loader import Batches, assemble, made_of
from .objectives import Term
from .sources import Sample
from .validation import mean_terms

PARTS = 8  # batches that the held samples come in, whose differences say how sure a gap is
SURE = 2.0  # standard errors above zero
GREY = (128, 128, 128)


@dataclass(frozen=True)
class Looking:
    """The loss on held samples with their pictures, with blank ones and with others'; sees: whether both are worse."""

    real: float
    blank: float
    shuffled: float
    sees: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Guard:
    """Looks after a stage by samples that it holds out; `samples` are those among them with pictures."""

    def __init__(self, data: Batches) -> None:
        self.data = data
        self.samples = [sample for sample in data.held() if images_of(sample.conversation)]

    @property
    def idle(self) -> bool:
        """Whether there are too few samples to be sure of anything."""
        return len(self.samples) < 2

    @cached_property
    def batches(self) -> dict[str, list[Batch]]:
        """The held samples three times, in the same parts."""
        pictures = [images_of(sample.conversation) for sample in self.samples]
        shown: dict[str, list[tuple[Image, ...]]] = {
            "real": pictures,
            "blank": [tuple(map(blank, own)) for own in pictures],
            "shuffled": shuffled(pictures),
        }
        count = len(self.samples)
        size = max(1, -(-count // PARTS))
        parts = [range(i, min(i + size, count)) for i in range(0, count, size)]
        return {
            name: [self._batch([with_images(self.samples[i], images[i]) for i in part]) for part in parts]
            for name, images in shown.items()
        }

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        made = [made_of(sample, self.data.processor) for sample in samples]
        # packed or not, the loss is the same
        return assemble(made, self.data.processor, self.data.form, asks=self.data.asks)

    def look(self, terms: Callable[[Batch], dict[str, Term]], device: torch.device) -> Looking | None:
        """How the model does now; None where fewer than two samples can be held, so that nothing is sure.

        terms: the loss of a batch. Of several processes each reads all batches, so that those with parts of a model
        gather it as often as one another.
        """
        if self.idle:
            return None
        losses = {name: _losses(batches, terms, device) for name, batches in self.batches.items()}
        means = {name: float(each.mean()) for name, each in losses.items()}
        sees = all(_clear(losses[name] - losses["real"]) for name in ("blank", "shuffled"))
        return Looking(means["real"], means["blank"], means["shuffled"], sees)


def _losses(batches: Sequence[Batch], terms: Callable[[Batch], dict[str, Term]], device: torch.device) -> torch.Tensor:
    """The loss of each batch, in float64."""
    found = [sum(mean_terms([batch.to(device)], terms).values()) for batch in batches]
    return torch.tensor(found, dtype=torch.float64)


def _clear(gaps: torch.Tensor) -> bool:
    """Whether gaps are above zero by more than chance."""
    return float(gaps.mean()) > SURE * float(gaps.std()) / len(gaps) ** 0.5


def blank(image: Image) -> Image:
    """A grey picture of the same size."""
    return Image(PIL.Image.new("RGB", image.picture.size, GREY))


def shuffled(pictures: Sequence[tuple[Image, ...]]) -> list[tuple[Image, ...]]:
    """For each sample the pictures of the next one that has others, in the sizes of its own."""
    found = []
    for i, own in enumerate(pictures):
        later = (pictures[(i + k) % len(pictures)] for k in range(1, len(pictures)))
        others = next((each for each in later if each[0] != own[0]), own)
        found.append(tuple(_sized(others[j % len(others)], image) for j, image in enumerate(own)))
    return found


def _sized(image: Image, like: Image) -> Image:
    size = like.picture.size
    return image if image.picture.size == size else Image(image.picture.resize(size))


def with_images(sample: Sample, images: Sequence[Image]) -> Sample:
    """A sample with other pictures in place of its own, one after the other."""
    left = iter(images)
    return replace(sample, conversation=_shown(sample.conversation, left))


def _shown(conversation: Conversation, left: Iterator[Image]) -> Conversation:
    def part(each: Part) -> Part:
        if isinstance(each, Video):
            return replace(each, frames=tuple(next(left) for _ in each.frames))
        return next(left) if isinstance(each, Image) else each

    return tuple(Message(message.role, tuple(map(part, message.parts))) for message in conversation)
