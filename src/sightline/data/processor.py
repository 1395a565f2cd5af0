"""A conversation to an Example: segments to ids, images to pixels and slots, places to text; and answers back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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

    def frame(self, picture: PIL.Image.Image) -> Seen:
        """The view of a film's frame."""
        ...


@runtime_checkable
class FilmPipeline(Protocol):
    """What turns a film, too, into what the encoder reads; others see its frames as so many pictures."""

    def film(self, pictures: Sequence[PIL.Image.Image], times: Sequence[float]) -> Seen:
        """A film of upright RGB frames at their times in seconds."""
        ...


# What stands in the place of a picture, given its views and the tokens of each, or of all that the model lays out:
# numbers are so many image tokens of it, names are control tokens before, between and after them.
Expand = Callable[[Seen, Sequence[int]], Sequence[int | str]]


def whole(seen: Seen, counts: Sequence[int]) -> Sequence[int | str]:
    """All tokens of a picture in a row and nothing else."""
    return [sum(counts)]


@dataclass
class _Columns:
    """The columns of an example while it is written."""

    ids: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    medium: list[int] = field(default_factory=list)
    item: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # slots of each picture
    # first token of each view, grid of its patches, seconds of a step of time
    media: list[tuple[int, Grid, float]] = field(default_factory=list)

    def add(self, ids: Sequence[int], block: int, step: int, learned: bool, medium: Medium, item: int) -> int:
        """Append tokens whose block goes up by `step` each, from `block` on; return the next block."""
        self.ids += ids
        self.block += [block + step * i for i in range(len(ids))]
        self.learned += [learned] * len(ids)
        self.medium += [medium] * len(ids)
        self.item += [item] * len(ids)
        return block + step * len(ids)


def _is_learned(segment: Segment) -> bool:
    """Whether the model is to write it."""
    return isinstance(segment, End) or (isinstance(segment, Words | Places) and segment.learned)


class Processor:
    """Everything between a person's conversation and a model's numbers, for one checkpoint.

    num_tokens(grid) is the fusion's own count of slots, num_tokens(grid, tiling) that of a picture whose views the
    model lays out itself; patch is the encoder's. `image_token` fills the slots' ids, which the model replaces. framed:
    as in `core.layout.framed`. expand: what stands in the place of a picture. start: the id that begins what is
    written, where that is a sequence beside what is read. instruct: the ids of what is asked, at most
    `instruction_length`, for a fusion that reads it with each picture. axes: how tokens are placed on three axes, where
    the decoder knows them. video_token: fills a film's slots, where films are one item and not so many pictures.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        pixels: ImagePipeline,
        num_tokens: Callable[..., int],
        patch: int,
        image_token: str,
        codec: Codec | None = None,
        look: Literal["causal", "prefix"] = "causal",
        max_length: int = 2048,
        framed: bool = False,
        expand: Expand = whole,
        start: int | None = None,
        instruct: Callable[[str], Sequence[int]] | None = None,
        instruction_length: int = 512,
        axes: Axes | None = None,
        video_token: str | None = None,
    ) -> None:
        self.tokenizer, self.template, self.pixels = tokenizer, template, pixels
        self.num_tokens, self.patch, self.codec = num_tokens, patch, codec
        self.image_id = tokenizer.control(image_token)
        self.look, self.max_length, self.framed, self.expand = look, max_length, framed, expand
        self.start, self.instruct, self.instruction_length = start, instruct, instruction_length
        self.axes, self.video_id = axes, None if video_token is None else tokenizer.control(video_token)

    @property
    def apart(self) -> bool:
        """Whether what is made of a picture depends on what is asked, so that questions share nothing of it."""
        return self.look == "prefix" or self.start is not None or self.instruct is not None

    @property
    def end(self) -> int:
        """The id that ends an answer: a control token, or words that are one token, such as a line break."""
        name = self.tokenizer.eos
        ids = [] if name in self.tokenizer.controls else self.tokenizer.encode(name)
        return ids[0] if len(ids) == 1 else self.tokenizer.control(name)

    def __call__(self, conversation: Conversation, known: dict[str, Seen] | None = None) -> Example:
        """A prompt when the conversation ends with the user, a training example when it ends with an answer.

        known: pictures that were seen before, by their content, so that each is resized once; new ones are added.
        Raises CapacityError when a prompt is longer than the context; a training example loses its last turns.
        """
        known = {} if known is None else known
        seen = self.see(conversation, known)
        while True:
            example = self._write(self.template(conversation), seen[: len(self.media(conversation))])
            length = max(example.length, example.read.length)
            if length <= self.max_length:
                return example
            said = sum(message.role != "system" for message in conversation)
            if conversation[-1].role == "user" or said <= 2:
                slots = len(example.read.slots)
                raise CapacityError(
                    f"{length} tokens ({slots} of images) for a context of {self.max_length}; shorten the text"
                )
            conversation = conversation[:-2]

    def media(self, conversation: Conversation) -> Sequence[Image | Video]:
        """What of a conversation has a place of its own: pictures, and films whole or as so many pictures."""
        return images_of(conversation) if self.video_id is None else media_of(conversation)

    def see(self, conversation: Conversation, known: dict[str, Seen]) -> list[Seen]:
        """The views of what has a place of its own, in order, looked up in what is known."""
        seen = []
        for part in (part for message in conversation for part in message.parts):
            if isinstance(part, Image):
                seen.append(self._look(part.digest, known, lambda part=part: self.pixels.seen(part.picture)))
            elif isinstance(part, Video) and self.video_id is not None:
                seen.append(self._look(part.digest, known, lambda part=part: self._film(part)))
            elif isinstance(part, Video):
                for image in part.frames:
                    key = f"{image.digest} frame"
                    seen.append(self._look(key, known, lambda image=image: self.pixels.frame(image.picture)))
        return seen

    @staticmethod
    def _look(key: str, known: dict[str, Seen], make: Callable[[], Seen]) -> Seen:
        if key not in known:
            known[key] = make()
        return known[key]

    def _film(self, video: Video) -> Seen:
        assert isinstance(self.pixels, FilmPipeline)
        return self.pixels.film([frame.picture for frame in video.frames], video.times)

    def branches(self, conversation: Conversation) -> Example:
        """A training example whose turns each follow the pictures directly and do not see one another.

        One pass through the model then learns many questions, and each looks like the first and only one.
        Raises InputError where the turns together are longer than the context, of which none may be lost.
        """
        if self.apart and sum(message.role == "user" for message in conversation) == 1:
            return self(conversation)
        if self.apart:
            raise InputError("a model whose pictures see the question learns one question at a time")
        seen = self.see(conversation, {})
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
        cut = len(segments)
        while cut and _is_learned(segments[cut - 1]):
            cut -= 1
        asked = self._instruction(segments[:cut]) if seen else None
        if self.start is None:
            return replace(self._sequence(_Columns(), segments, seen), instruction=asked)
        source = self._sequence(_Columns(), segments[:cut], seen)
        source = replace(source, labels=torch.full_like(source.labels, IGNORE), instruction=asked)
        written = _Columns()
        written.add([self.start], 0, 1, False, Medium.TEXT, 0)
        return replace(self._sequence(written, segments[cut:], seen), pixels=(), source=source)

    def _instruction(self, segments: list[Segment]) -> Tensor | None:
        """The ids of all that is said before the answer, in the vocabulary of a fusion that reads it."""
        if self.instruct is None:
            return None
        ids = self.instruct("".join(segment.text for segment in segments if isinstance(segment, Words)))
        if len(ids) > self.instruction_length:
            most = self.instruction_length
            raise CapacityError(f"a question of {len(ids)} tokens, what reads it with the picture takes {most}")
        return torch.tensor(ids, dtype=torch.int64)

    def _sequence(self, out: _Columns, segments: list[Segment], seen: list[Seen]) -> Example:
        """The example of some segments after those that the columns hold."""
        prefix = self.look == "prefix"
        block, item = len(out.ids), 0
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
        if seen.tiling is not None:
            counts = [self.num_tokens(grids[0], seen.tiling)]
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
            tilings=tuple(each.tiling for each in seen if each.tiling is not None),
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
