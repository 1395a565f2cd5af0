"""From conversations to answers: pictures are seen once, prefixes shared, questions read and answered together."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..core.errors import InputError, SightlineError
from ..core.geometry import Box, Point
from ..core.sequence import Conversation, images_of
from ..data.batch import COLUMNS, Batch, Example, collate
from ..data.processor import Processor, Seen
from ..fusion.bridge import Bridge
from ..grounding.codecs import Grounded
from ..grounding.heads import BOX, POINT, places_of
from ..language.cache import Cache
from ..model import VLM
from .sampling import Chooser, Sampling


@dataclass(frozen=True)
class Reply:
    """One answer: its ids, its text and places, how sure the model was, what it cost; or why there is none.

    probabilities: of each id. confidence: their mean, the end token's among them. timing: seconds to the first token
    and in all.
    """

    ids: tuple[int, ...] = ()
    grounded: Grounded = field(default_factory=lambda: Grounded(""))
    probabilities: tuple[float, ...] = ()
    confidence: float = 0.0
    usage: dict[str, int] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    error: SightlineError | None = None


@dataclass
class _Row:
    """One request while it is answered."""

    example: Example
    choose: Chooser
    ids: list[int] = field(default_factory=list)
    sure: list[float] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)  # the ids with the stop text that ended them
    done: bool = False
    first: float = 0.0
    begun: list[tuple[Tensor, bool]] = field(default_factory=list)  # what a head read where a place began; a box or not


@dataclass(frozen=True)
class _Chunk:
    """Requests by their numbers that are read together, those about the same pictures in a group.

    shared: how many first tokens the requests of each group have in common; 0 where every request is read whole.
    """

    groups: list[list[tuple[int, Example]]]
    shared: int = 0

    @property
    def members(self) -> list[tuple[int, Example]]:
        return [member for group in self.groups for member in group]

    @property
    def sizes(self) -> list[int]:
        return [len(group) for group in self.groups]


class Engine:
    """Answers conversations with one model; stateless between calls."""

    def __init__(self, model: VLM, processor: Processor, batch: int = 32) -> None:
        self.model, self.processor, self.batch = model.eval(), processor, batch
        self.end = processor.end
        self.pad = processor.tokenizer.controls.get(processor.tokenizer.pad, self.end)

    # ------------------------------------------------------------------------------------------------------- answers

    def answer(
        self, conversations: Sequence[Conversation], sampling: Sampling | Sequence[Sampling] = Sampling()
    ) -> list[Reply]:
        """One reply per conversation, in order; one that cannot be read gets its error, the others their answer."""
        settings = [sampling] * len(conversations) if isinstance(sampling, Sampling) else list(sampling)
        if len(settings) != len(conversations):
            raise InputError(f"{len(settings)} samplings for {len(conversations)} conversations, expected one for each")
        replies: list[Reply] = [Reply()] * len(conversations)
        groups: dict[tuple[str, ...], list[tuple[int, Example]]] = {}
        known: dict[str, Seen] = {}
        for i, conversation in enumerate(conversations):
            try:
                example = self.processor(conversation, known)
            except SightlineError as error:
                replies[i] = Reply(error=error)
                continue
            key = tuple(image.digest for image in images_of(conversation))
            groups.setdefault(key, []).append((i, example))
        for chunk in self._chunks(groups):
            rows = [_Row(example, Chooser(settings[i])) for i, example in chunk.members]
            for (i, _), reply in zip(chunk.members, self._run(rows, chunk), strict=True):
                replies[i] = reply
        return replies

    def _chunks(self, groups: dict[tuple[str, ...], list[tuple[int, Example]]]) -> Iterator[_Chunk]:
        """Questions about the same pictures together, several such groups at once; single ones by like length."""
        single: list[tuple[int, Example]] = []
        alike: dict[int, list[list[tuple[int, Example]]]] = {}
        for members in groups.values():
            for start in range(0, len(members), self.batch):
                part = members[start : start + self.batch]
                shared = self._shared([example for _, example in part])
                if shared:
                    alike.setdefault(shared, []).append(part)
                else:
                    single += part
        for shared, parts in alike.items():
            chunk: list[list[tuple[int, Example]]] = []
            for part in parts:
                if chunk and sum(map(len, chunk)) + len(part) > self.batch:
                    yield _Chunk(chunk, shared)
                    chunk = []
                chunk.append(part)
            yield _Chunk(chunk, shared)
        single.sort(key=lambda each: each[1].read.length)
        for start in range(0, len(single), self.batch):
            yield _Chunk([[each] for each in single[start : start + self.batch]])

    def _run(self, rows: list[_Row], chunk: _Chunk) -> list[Reply]:
        began = time.perf_counter()
        for _ in self._tokens(rows, chunk.sizes, chunk.shared):
            pass
        return [self._reply(row, began) for row in rows]

    def stream(self, conversation: Conversation, sampling: Sampling = Sampling()) -> Iterator[str | Reply]:
        """The answer's text as it comes, then the whole reply; control tokens are not shown."""
        row = _Row(self.processor(conversation), Chooser(sampling))
        began, shown = time.perf_counter(), ""
        for _ in self._tokens([row], [1], 0):
            text = self.processor.read(row.ids, row.example.transforms).text
            text = text[: len(text) - begun(text, sampling.stop)].rstrip()
            half = text.endswith("�")  # the rest of a letter is still to come
            if len(text) > len(shown) and text.startswith(shown) and not half and not row.done:
                yield text[len(shown) :]
                shown = text
        reply = self._reply(row, began)
        rest = reply.grounded.text[len(shown) :] if reply.grounded.text.startswith(shown) else ""
        if rest:
            yield rest
        yield reply

    def _words(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids)

    def _reply(self, row: _Row, began: float) -> Reply:
        example = row.example
        grounded = self._measured(self.processor.read(row.ids, example.transforms), row)
        if row.stopped:
            text = self.processor.read(row.stopped, example.transforms).text
            cut = found(text, row.choose.sampling.stop)  # none where reading took away the space it begins with
            grounded = grounded if cut is None else replace(grounded, text=text[:cut].rstrip())
        usage = {
            "image_tokens": len(example.read.slots),
            "prompt_tokens": example.read.length,
            "completion_tokens": len(row.ids),
        }
        timing = {"first_token": round(row.first - began, 6), "total": round(time.perf_counter() - began, 6)}
        sure = sum(row.sure) / len(row.sure) if row.sure else 0.0
        return Reply(tuple(row.ids), grounded, tuple(row.sure[: len(row.ids)]), sure, usage, timing)

    # ---------------------------------------------------------------------------------------------------- generation

    @torch.inference_mode()  # on while a token is made, off while the caller has it
    def _tokens(self, rows: list[_Row], sizes: list[int], shared: int) -> Iterator[None]:
        """Read the prompts, then one token per unfinished row and turn."""
        cache, hidden = self._prefill(rows, sizes, shared)
        logits = self.model.logits(hidden)
        alive = list(range(len(rows)))
        while True:
            for place, index in enumerate(alive):
                self._advance(rows[index], logits[place])
            yield
            keep = [place for place, index in enumerate(alive) if not rows[index].done]
            if not keep:
                return
            if len(keep) < len(alive):
                cache = cache.keep(torch.tensor(keep))
                alive = [alive[place] for place in keep]
            ids = torch.tensor([[rows[index].ids[-1]] for index in alive])
            assert cache.layout is not None
            step = Batch(ids, cache.layout.next(), torch.zeros(0, dtype=torch.int64))
            hidden = self.model(step.to(self.model.device), cache)[:, -1]
            if self.model.box_head is not None:
                self._note([rows[index] for index in alive], hidden)
            logits = self.model.logits(hidden)

    def _note(self, rows: list[_Row], hidden: Tensor) -> None:
        """Keep what a head reads at those last tokens [rows, width] that begin a place."""
        begins = {self.processor.tokenizer.control(name): name == BOX for name in (BOX, POINT)}
        for row, state in zip(rows, hidden, strict=True):
            if row.ids[-1] in begins:
                row.begun.append((self.model.places(state), begins[row.ids[-1]]))

    def _measured(self, grounded: Grounded, row: _Row) -> Grounded:
        """The places of an answer as a head read them, unless some were begun that are none."""
        if not row.begun or len(row.begun) != len(grounded.boxes) + len(grounded.points):
            return grounded
        shares, boxes = torch.stack([shares for shares, _ in row.begun]), torch.tensor([box for _, box in row.begun])
        measured = places_of(shares.cpu(), boxes, row.example.transforms[-1])
        sized = (place for place in measured if isinstance(place, Box))
        dots = (place for place in measured if isinstance(place, Point))
        return replace(
            grounded,
            boxes=tuple(replace(new, label=old.label) for new, old in zip(sized, grounded.boxes, strict=True)),
            points=tuple(replace(new, label=old.label) for new, old in zip(dots, grounded.points, strict=True)),
        )

    def _advance(self, row: _Row, logits: Tensor) -> None:
        index, sure = row.choose(logits)
        row.first = row.first or time.perf_counter()
        sampling = row.choose.sampling
        if index == self.end:
            row.sure.append(sure)
            row.done = True
            return
        row.ids.append(index)
        row.sure.append(sure)
        if sampling.stop:
            self._stop(row)
        full = row.example.length + len(row.ids) >= self.model.config.decoder.max_length
        row.done = row.done or full or len(row.ids) >= sampling.max_new_tokens

    def _stop(self, row: _Row) -> None:
        """End the row at the first stop text; a token that holds its beginning and something before it stays."""
        text = self._words(row.ids)
        cut = found(text, row.choose.sampling.stop)
        if cut is not None:
            row.stopped, row.done = list(row.ids), True
            kept = len(text[:cut].rstrip())
            # location tokens have no text: those before the stop text stay
            while row.ids and len(self._words(row.ids)) > kept and len(self._words(row.ids[:-1])) >= kept:
                row.ids.pop()

    def _prefill(self, rows: list[_Row], sizes: list[int], shared: int) -> tuple[Cache, Tensor]:
        """Read all prompts; the hidden state [rows, width] of each one's last token."""
        examples = [row.example for row in rows]
        room = max(example.length for example in examples) + max(row.choose.sampling.max_new_tokens for row in rows)
        cache = self.model.new_cache(min(room, self.model.config.decoder.max_length))
        if not shared:
            return cache, self._read(examples, cache, None)
        each = torch.tensor(sizes)
        self._read([_part(examples[i], 0, shared) for i in (each.cumsum(0) - each).tolist()], cache, None)
        cache = cache.keep(torch.arange(len(sizes)).repeat_interleave(each))
        return cache, self._read([_part(example, shared, example.length) for example in examples], cache, None)

    def _read(self, examples: list[Example], cache: Cache, bridge: Bridge | None) -> Tensor:
        batch = collate(examples, self.processor.patch, self.pad).to(self.model.device)
        length = batch.ids.shape[1]
        last = [row * length + example.length - 1 for row, example in enumerate(examples)]
        hidden: Tensor = self.model(batch, cache, bridge, torch.tensor(last, device=self.model.device))
        return hidden

    def _shared(self, examples: list[Example]) -> int:
        """How many first tokens all prompts have in common, if these hold every picture; 0 where nothing is gained."""
        if len(examples) < 2 or self.processor.apart or not all(len(e.slots) for e in examples):
            return 0
        first = examples[0]
        if any(len(e.pixels) != len(first.pixels) or e.tilings != first.tilings for e in examples):
            return 0
        if any(e.sounds is not None or e.regions is not None for e in examples):
            return 0
        pairs = (pair for e in examples[1:] for pair in zip(first.pixels, e.pixels, strict=True))
        if not all(a is b or torch.equal(a, b) for a, b in pairs):
            return 0
        shortest = min(e.length for e in examples) - 1  # every row keeps a token of its own to answer from
        ids = torch.stack([e.ids[:shortest] for e in examples])
        places = torch.stack([e.position[:shortest].flatten() for e in examples]).view(len(ids), shortest, -1)
        alike = (ids == ids[:1]) & (places == places[:1]).all(2)  # a film at other times has other places
        same = int(alike.all(0).long().cumprod(0).sum())
        return same if same > int(first.slots.max()) else 0


def found(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins, if any is there."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def begun(text: str, stops: Sequence[str]) -> int:
    """How many letters at the end of a text may turn out to be the beginning of a stop text."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    ends = (n for n in range(min(longest, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in stops))
    return next(ends, 0)


def _part(example: Example, start: int, stop: int) -> Example:
    """Some tokens of an example; its pictures go with the part that holds their slots."""
    columns = {name: getattr(example, name)[start:stop] for name in ("ids", *COLUMNS)}
    inside = (example.slots >= start) & (example.slots < stop)
    kept = bool(inside.any())
    pixels, tilings = (example.pixels, example.tilings) if kept else ((), ())
    return replace(example, **columns, slots=example.slots[inside] - start, pixels=pixels, tilings=tilings)
