"""A conversation to an Example: segments to ids, images to pixels and slots, places to text; and answers back."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal, Protocol, runtime_checkable

import PIL.Image
import torch
from torch import Tensor

from ..core.errors import CapacityError, ConfigError, InputError
from ..core.geometry import Mask, Transform
from ..core.layout import Axes, Medium
from ..core.patches import Grid
from ..core.sequence import Audio, Conversation, Image, Message, Piece, Video, images_of, media_of, sounds_of
from ..encoders.audio import AudioConfig, heard
from ..grounding.codecs import Codec, FerretNumbers, Grounded, LocationTokens
from ..grounding.codecs.base import Place
from ..grounding.codecs.ferret import REGION
from ..grounding.heads import BOX, POINT, PlaceTargets, shares_of
from ..grounding.sampler import Regions, SamplerConfig, points_of
from ..language.tokenizer import Tokenizer
from .batch import IGNORE, Example, branched
from .columns import Columns
from .images import Seen, ways
from .template import End, Places, Segment, Slot, Sound, Template, Words


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


def tagged(before: str, after: str) -> Expand:
    """The same between two control tokens."""
    return lambda seen, counts: [before, sum(counts), after]


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
    the decoder knows them. video_token: fills a film's slots, where films are one item and not so many pictures. audio:
    the encoder of sounds, where there is one. regions: the sampler that makes tokens of what a user refers to.
    box_head: whether a head reads the places of answers, in this project's own convention.
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
        audio: AudioConfig | None = None,
        regions: SamplerConfig | None = None,
        box_head: bool = False,
    ) -> None:
        self.tokenizer, self.template, self.pixels = tokenizer, template, pixels
        self.num_tokens, self.patch, self.codec = num_tokens, patch, codec
        self.image_id = tokenizer.control(image_token)
        self.look, self.max_length, self.framed, self.expand = look, max_length, framed, expand
        self.start, self.instruct, self.instruction_length = start, instruct, instruction_length
        self.axes, self.video_id = axes, None if video_token is None else tokenizer.control(video_token)
        self.audio, self.regions, self.box_head = audio, regions, box_head
        if box_head and not isinstance(codec, LocationTokens):
            raise ConfigError("a head reads places at the tokens that begin them, which location-tokens have")
        if regions is not None and not isinstance(codec, FerretNumbers):
            raise ConfigError("a region sampler's tokens have a place in Ferret's convention only")

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
            pictures, sounds = seen[: len(self.media(conversation))], sounds_of(conversation)
            example = self._write(self.template(conversation), pictures, sounds)
            length = max(example.length, example.read.length)
            if length <= self.max_length:
                return example
            said = sum(message.role != "system" for message in conversation)
            if conversation[-1].role == "user" or said <= 2:
                slots = len(example.read.slots)
                less = "hand in fewer pictures" if slots >= self.max_length else "shorten the text"
                raise CapacityError(f"{length} tokens ({slots} of images) for a context of {self.max_length}; {less}")
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
        media = (Image, Video, Audio)
        pictures = tuple(part for message in talk for part in message.parts if isinstance(part, media))
        examples = []
        for question, answer in zip(talk[::2], talk[1::2], strict=True):
            words = tuple(part for part in question.parts if not isinstance(part, media))
            turn = (*before, Message("user", (*pictures, *words)), answer)
            examples.append(self._write(self.template(turn), seen, sounds_of(turn)))
        example = branched(examples)
        if example.length > self.max_length:
            raise InputError(f"{example.length} tokens of {len(examples)} questions for a context of {self.max_length}")
        return example

    def _write(self, segments: list[Segment], seen: list[Seen], sounds: Sequence[Audio] = ()) -> Example:
        for kind, given in ((Slot, seen), (Sound, sounds)):
            if (found := sum(isinstance(segment, kind) for segment in segments)) != len(given):
                what = "images" if kind is Slot else "sounds"
                raise InputError(f"{len(given)} {what} for {found} places in the conversation")
        cut = len(segments)
        while cut and _is_learned(segments[cut - 1]):
            cut -= 1
        asked = self._instruction(segments[:cut]) if seen else None
        if self.start is None:
            return replace(self._sequence(Columns(), segments, seen, sounds), instruction=asked)
        source = self._sequence(Columns(), segments[:cut], seen, sounds)
        source = replace(source, labels=torch.full_like(source.labels, IGNORE), instruction=asked)
        written = Columns()
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

    def _sequence(
        self, out: Columns, segments: list[Segment], seen: list[Seen], sounds: Sequence[Audio] = ()
    ) -> Example:
        """The example of some segments after those that the columns hold."""
        prefix = self.look == "prefix"
        block, item = len(out.ids), 0
        for segment in segments:
            if isinstance(segment, Slot):
                item += 1
                block = self._picture(out, seen[segment.index], block, 0 if prefix else 1, item)
                continue
            if isinstance(segment, Sound):
                item += 1
                block = self._sound(out, sounds[segment.index], block, 0 if prefix else 1, item)
                continue
            ids, learned = self._ids(segment, ways(seen))
            if self.regions is not None and isinstance(segment, Places) and not learned:
                self._refer(out, segment, ids, seen)
            if self.box_head and isinstance(segment, Places) and learned and seen:
                self._place(out, segment, ids, seen)
            if prefix and learned and not (out.learned and out.learned[-1]):
                block += 1  # an answer begins after all of its question, which must not see what it is to predict
            block = out.add(ids, block, 0 if prefix and not learned else 1, learned, Medium.TEXT, item)
        return out.example(seen, self.look == "causal", self.framed, self.axes)

    def _picture(self, out: Columns, seen: Seen, block: int, step: int, item: int) -> int:
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

    def _sound(self, out: Columns, sound: Audio, block: int, step: int, item: int) -> int:
        """Write the tokens of a sound; return the next block."""
        if self.audio is None:
            raise InputError("this model reads text and images, not audio")
        frames = heard(torch.as_tensor(sound.samples), sound.rate, self.audio.bins)
        pieces = frames.split(2 * self.audio.positions)  # what is longer is heard piece by piece
        count = sum(self.audio.num_tokens(len(piece)) for piece in pieces)
        out.sounds += range(len(out.ids), len(out.ids) + count)
        out.frames += pieces
        return out.add([self.image_id] * count, block, step, False, Medium.AUDIO, item)

    def _refer(self, out: Columns, segment: Places, ids: Sequence[int], seen: list[Seen]) -> None:
        """Note where the tokens of regions go that are written next, and of which points they are made."""
        assert self.regions is not None
        holder = _holder(seen, segment.image) if seen else -1
        if holder < 0 or len(seen[holder].pixels) != 1 or seen[holder].seconds is not None:
            raise InputError("a region is referred to in a picture that is seen in one view, here there is none")
        way, count = seen[holder].way, self.regions.points
        item = sum(len(each.pixels) for each in seen[:holder])
        marks = [len(out.ids) + i for i, index in enumerate(ids) if index == self.tokenizer.control(REGION)]
        points = torch.stack([points_of(place, way, count) for place in segment.places])
        out.regions.append(Regions(torch.tensor(marks), torch.full((len(marks),), item), points))

    def _place(self, out: Columns, segment: Places, ids: Sequence[int], seen: list[Seen]) -> None:
        """Note which tokens begin the places that are written next, and what they are."""
        begins = {self.tokenizer.control(name) for name in (BOX, POINT)}
        slots = [len(out.ids) + i for i, index in enumerate(ids) if index in begins]
        out.places.append(PlaceTargets(torch.tensor(slots), *shares_of(_boxed(segment), ways(seen)[segment.image])))

    def _ids(self, segment: Segment, ways: Sequence[Transform]) -> tuple[list[int], bool]:
        if isinstance(segment, Places):
            if self.codec is None:
                raise InputError("this model has no way to write places, but the conversation names some")
            if ways and not 0 <= segment.image < len(ways):
                raise InputError(f"a place in image {segment.image + 1} of a conversation with {len(ways)}")
            # a scene told in words has no picture: its places are shares of the frame they are given in
            way = ways[segment.image] if ways else Transform(segment.places[0].frame)
            places = _boxed(segment)
            if self.regions is not None and not segment.learned:
                assert isinstance(self.codec, FerretNumbers)
                parts = ((*_comma(i), *self.codec.refer(place, way)) for i, place in enumerate(places))
                return self.tokenizer.ids(piece for part in parts for piece in part), False
            return self.tokenizer.ids(self.codec.write(places, way)), segment.learned
        if isinstance(segment, Words):
            return self.tokenizer.encode(segment.text), segment.learned
        assert not isinstance(segment, Slot | Sound)
        return [self.tokenizer.control(segment.name)], isinstance(segment, End)

    def read(self, ids: Sequence[int], transforms: Sequence[Transform]) -> Grounded:
        """An answer's ids as text and places in pixels of the last image's original."""
        pieces = self.tokenizer.pieces(ids)
        if self.codec is None or not transforms:
            return Grounded("".join(piece.text for piece in pieces if not piece.control).strip())
        return self.codec.decode(pieces, transforms[-1])


def _holder(seen: Sequence[Seen], image: int) -> int:
    """The number among what is seen of that which a picture is, or the film whose frame it is."""
    return next(i for i, end in enumerate(accumulate(each.frames for each in seen)) if image < end)


def _boxed(segment: Places) -> list[Place]:
    """Places as words have a form for them: of a mask the box around it."""
    return [place.box if isinstance(place, Mask) else place for place in segment.places]


def _comma(place: int) -> list[Piece]:
    """What stands between a place and the one before it."""
    return [Piece(", ")] if place else []
