"""A conversation to an Example: segments to ids, images to pixels and slots, places to text; and answers back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol, runtime_checkable

import PIL.Image
import torch
from torch import Tensor

from ..core.errors import CapacityError, InputError
from ..core.geometry import Transform
from ..core.layout import Axes, Medium, framed
from ..core.patches import Grid
from ..core.sequence import Conversation, Image, Message, Video, images_of, media_of
from ..grounding.codecs import Codec, Grounded
from ..language.tokenizer import Tokenizer
from .batch import IGNORE, Example, branched
from .images import Seen
from .template import End, Places, Segment, Slot, Template, Words


class ImagePipeline(Protocol):
    """What turns a picture into what the encoder reads."""

    def seen(self, picture: PIL.Image.Image) -> Seen:
        """The views of an upright RGB picture."""
        ...


@runtime_checkable
class FilmPipeline(Protocol):
    """What turns a film, too, into what the encoder reads; others see its frames as so many pictures."""

    def film(self, pictures: Sequence[PIL.Image.Image], times: Sequence[float]) -> Seen:
        """A film of upright RGB frames at their times in seconds."""
        ...


# What stands in the place of a picture, given its views and the tokens of each: numbers are so many image tokens of it,
# names are control tokens before, between and after them.
Expand = Callable[[Seen, Sequence[int]], Sequence[int | str]]


def whole(seen: Seen, counts: Sequence[int]) -> Sequence[int | str]:
    """All tokens of a picture in a row and nothing else."""
    return [sum(counts)]


@dataclass
class _Columns:
    """The columns of an example while it is written."""

    ids: list[int]
    block: list[int]
    learned: list[bool]
    medium: list[int]
    item: list[int]
    slots: list[int]
    counts: list[int]  # slots of each picture
    media: list[tuple[int, Grid, float]]  # first token of each view, grid of its patches, seconds of a step of time

    def add(self, ids: Sequence[int], block: int, step: int, learned: bool, medium: Medium, item: int) -> int:
        """Append tokens whose block goes up by `step` each, from `block` on; return the next block."""
        self.ids += ids
        self.block += [block + step * i for i in range(len(ids))]
        self.learned += [learned] * len(ids)
        self.medium += [medium] * len(ids)
        self.item += [item] * len(ids)
        return block + step * len(ids)


class Processor:
    """Everything between a person's conversation and a model's numbers, for one checkpoint.

    num_tokens(grid) is the fusion's own count of slots; patch is the encoder's. `image_token` fills the slots' ids,
    which the model replaces. framed: as in `core.layout.framed`. expand: what stands in the place of a picture.
    axes: how tokens are placed on three axes, where the decoder knows them. video_token: fills a film's slots, where
    films are one item and not so many pictures.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        pixels: ImagePipeline,
        num_tokens: Callable[[Grid], int],
        patch: int,
        image_token: str,
        codec: Codec | None = None,
        look: Literal["causal", "prefix"] = "causal",
        max_length: int = 2048,
        framed: bool = False,
        expand: Expand = whole,
        axes: Axes | None = None,
        video_token: str | None = None,
    ) -> None:
        self.tokenizer, self.template, self.pixels = tokenizer, template, pixels
        self.num_tokens, self.patch, self.codec = num_tokens, patch, codec
        self.image_id = tokenizer.control(image_token)
        self.look, self.max_length, self.framed, self.expand = look, max_length, framed, expand
        self.axes, self.video_id = axes, None if video_token is None else tokenizer.control(video_token)

    def __call__(self, conversation: Conversation, known: dict[str, Seen] | None = None) -> Example:
        """A prompt when the conversation ends with the user, a training example when it ends with an answer.

        known: pictures that were seen before, by their content, so that each is resized once; new ones are added.
        Raises CapacityError when a prompt is longer than the context; a training example loses its last turns.
        """
        known = {} if known is None else known
        seen = [self.see(medium, known) for medium in self.media(conversation)]
        while True:
            example = self._write(self.template(conversation), seen[: len(self.media(conversation))])
            if example.length <= self.max_length:
                return example
            said = sum(message.role != "system" for message in conversation)
            if conversation[-1].role == "user" or said <= 2:
                slots = len(example.slots)
                raise CapacityError(
                    f"{example.length} tokens ({slots} of images) for a context of {self.max_length}; shorten the text"
                )
            conversation = conversation[:-2]

    def media(self, conversation: Conversation) -> Sequence[Image | Video]:
        """What of a conversation has a place of its own: pictures, and films whole or as so many pictures."""
        return images_of(conversation) if self.video_id is None else media_of(conversation)

    def see(self, medium: Image | Video, known: dict[str, Seen]) -> Seen:
        """The views of a picture, or a film, looked up in what is known."""
        if medium.digest not in known:
            if isinstance(medium, Image):
                known[medium.digest] = self.pixels.seen(medium.picture)
            else:
                assert isinstance(self.pixels, FilmPipeline)
                known[medium.digest] = self.pixels.film([frame.picture for frame in medium.frames], medium.times)
        return known[medium.digest]

    def branches(self, conversation: Conversation) -> Example:
        """A training example whose turns each follow the pictures directly and do not see one another.

        One pass through the model then learns many questions, and each looks like the first and only one.
        Raises InputError where the turns together are longer than the context, of which none may be lost.
        """
        if self.look == "prefix":
            raise InputError("a model whose pictures see the question learns one question at a time")
        seen = [self.see(medium, {}) for medium in self.media(conversation)]
        before = [message for message in conversation if message.role == "system"]
        talk = [message for message in conversation if message.role != "system"]
        pictures = tuple(part for message in talk for part in message.parts if isinstance(part, (Image, Video)))
        examples = []
        for question, answer in zip(talk[::2], talk[1::2], strict=True):
            words = tuple(part for part in question.parts if not isinstance(part, (Image, Video)))
            turn = (*before, Message("user", (*pictures, *words)), answer)
            examples.append(self._write(self.template(turn), seen))
        example = branched(examples)
        if example.length > self.max_length:
            raise InputError(f"{example.length} tokens of {len(examples)} questions for a context of {self.max_length}")
        return example

    def _write(self, segments: list[Segment], seen: list[Seen]) -> Example:
        found = sum(isinstance(segment, Slot) for segment in segments)
        if found != len(seen):
            raise InputError(f"{len(seen)} images for {found} places in the conversation")
        out = _Columns([], [], [], [], [], [], [], [])
        prefix = self.look == "prefix"
        block, item = 0, 0
        for segment in segments:
            if isinstance(segment, Slot):
                item += 1
                block = self._picture(out, seen[segment.index], block, 0 if prefix else 1, item)
                continue
            ids, learned = self._ids(segment, _ways(seen))
            if prefix and learned and not (out.learned and out.learned[-1]):
                block += 1  # an answer begins after all of its question, which must not see what it is to predict
            block = out.add(ids, block, 0 if prefix and not learned else 1, learned, Medium.TEXT, item)
        return self._example(out, seen)

    def _picture(self, out: _Columns, seen: Seen, block: int, step: int, item: int) -> int:
        """Write what stands in the place of a picture; return the next block."""
        grids = [self._grid(pixels) for pixels in seen.pixels]
        counts = [self.num_tokens(grid) for grid in grids]
        film, before, count = seen.seconds is not None, len(out.slots), 0
        fill = self.video_id if film and self.video_id is not None else self.image_id
        medium = Medium.VIDEO if film else Medium.IMAGE
        for part in self.expand(seen, counts):
            if isinstance(part, str):
                block = out.add([self.tokenizer.control(part)], block, step, False, Medium.TEXT, item)
                continue
            count += part
            out.slots += range(len(out.ids), len(out.ids) + part)
            block = out.add([fill] * part, block, step, False, medium, item)
        out.counts.append(count)
        if self.axes is not None:
            for grid, first in zip(grids, accumulate(counts, initial=before), strict=False):
                out.media.append((out.slots[first], grid, seen.seconds or 1.0))
        return block

    def _grid(self, pixels: Tensor) -> Grid:
        """The grid of the patches of a view [..., height, width], or of a film [time, ..., height, width]."""
        frames = pixels.shape[0] if pixels.dim() > 3 else 1
        return frames, pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch

    def _ids(self, segment: Segment, ways: Sequence[Transform]) -> tuple[list[int], bool]:
        if isinstance(segment, Places):
            if self.codec is None:
                raise InputError("this model has no way to write places, but the conversation names some")
            if ways and not 0 <= segment.image < len(ways):
                raise InputError(f"a place in image {segment.image + 1} of a conversation with {len(ways)}")
            # a scene told in words has no picture: its places are shares of the frame they are given in
            way = ways[segment.image] if ways else Transform(segment.places[0].frame)
            return self.tokenizer.ids(self.codec.write(segment.places, way)), segment.learned
        if isinstance(segment, Words):
            return self.tokenizer.encode(segment.text), segment.learned
        return [self.tokenizer.control(segment.name)], isinstance(segment, End)

    def _example(self, out: _Columns, seen: list[Seen]) -> Example:
        ids = torch.tensor(out.ids)
        labels = torch.full_like(ids, IGNORE)
        labels[:-1] = torch.where(torch.tensor(out.learned[1:], dtype=torch.bool), ids[1:], IGNORE)
        slots, medium = torch.tensor(out.slots, dtype=torch.int64), torch.tensor(out.medium)
        position = torch.arange(len(ids))
        if self.framed:
            still, last = framed(slots, out.counts)
            medium[last] = Medium.TEXT
            position = torch.ones_like(ids).index_fill(0, still, 0).cumsum(0) - 1
        if self.axes is not None:
            position = self.axes.positions(len(ids), out.media)
        return Example(
            ids=ids,
            block=torch.tensor(out.block),
            position=position,
            medium=medium,
            item=torch.tensor(out.item),
            branch=torch.zeros_like(ids),
            labels=labels,
            slots=slots,
            pixels=tuple(pixels for each in seen for pixels in each.pixels),
            transforms=tuple(_ways(seen)),
            causal=self.look == "causal",
        )

    def read(self, ids: Sequence[int], transforms: Sequence[Transform]) -> Grounded:
        """An answer's ids as text and places in pixels of the last image's original."""
        pieces = self.tokenizer.pieces(ids)
        if self.codec is None or not transforms:
            return Grounded("".join(piece.text for piece in pieces if not piece.control).strip())
        return self.codec.decode(pieces, transforms[-1])


def _ways(seen: Sequence[Seen]) -> list[Transform]:
    """How coordinates go into each picture, and each frame of a film."""
    return [each.way for each in seen for _ in range(each.frames)]
