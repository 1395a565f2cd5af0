"""Examples made of ids and media, and how several become one batch: padded on a side, or packed into rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.errors import InputError
from ..core.geometry import Transform
from ..core.layout import Layout
from ..core.patches import Patches, Tiling, join, patchify, patchify_film
from ..encoders.audio import Sounds
from ..grounding.heads import PlaceTargets
from ..grounding.sampler import Regions

IGNORE = -100  # a label that teaches nothing


@dataclass(frozen=True)
class Example:
    """One sequence; every column has its length.

    ids, block, position, medium, item, branch: int64 [length], as in `core.layout`; position may be [length, 3].
    labels: int64 [length]; labels[t] is the id to predict after token t, -100 where nothing is learned.
    slots: int64 [n], where image tokens go, in order; pixels: one float tensor [3, height, width] per view, or [time,
    frames of a patch, 3, height, width] per picture or film.
    transforms: one per image, from the original picture to what the model sees. tilings: one per image, where the
    model lays its views out itself.
    instruction: int64 [words], what a fusion that reads text is given with each of the pictures.
    source: what an encoder of text reads, with the pictures, where this is what is written beside it.
    sounds, regions: what else tokens are made of, and where these go in this sequence. places: those to be written.
    """

    ids: Tensor
    block: Tensor
    position: Tensor
    medium: Tensor
    item: Tensor
    branch: Tensor
    labels: Tensor
    slots: Tensor
    pixels: tuple[Tensor, ...] = ()
    transforms: tuple[Transform, ...] = ()
    tilings: tuple[Tiling, ...] = ()
    causal: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    instruction: Tensor | None = None
    source: "Example | None" = None
    sounds: Sounds | None = None
    regions: Regions | None = None
    places: PlaceTargets | None = None

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def read(self) -> "Example":
        """What is read before anything is written: the source, or the example itself, with its pictures."""
        return self if self.source is None else self.source


@dataclass(frozen=True)
class Batch:
    """What a model reads in one step.

    ids, labels: [batch, length]; slots: flat indices row * length + t of image tokens; patches: raw pixel vectors.
    instruction: [pictures, ids], -1 where padded, for a fusion that reads text with each picture.
    owners: [pictures, 3], the row, document and number of each picture for cross-attention, sorted by row; without them
    the slots say so. looks: [batch, length, number of pictures], which of its row's each token looks at; without them
    the layout says so. sounds, regions: what else tokens are made of, and where these go. places: those of the answers,
    for a head that reads them; slots are flat indices, as those of pictures.
    source: what an encoder of text reads, with the pictures, where this is what is written beside it.
    """

    ids: Tensor
    layout: Layout
    slots: Tensor
    patches: Patches | None = None
    labels: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    instruction: Tensor | None = None
    owners: Tensor | None = None
    looks: Tensor | None = None
    source: "Batch | None" = None
    sounds: Sounds | None = None
    regions: Regions | None = None
    places: PlaceTargets | None = None

    def to(self, device: torch.device | str) -> "Batch":
        parts = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if hasattr(part, "to")})


def tokens_of(batch: Batch) -> int:
    """Tokens of a batch without its padding; of pictures alone, their patches."""
    if not batch.ids.numel():
        return 0 if batch.patches is None else len(batch.patches.values)
    return int((batch.layout.document >= 0).sum())


COLUMNS = ("block", "position", "medium", "item", "branch", "labels")
_FILL = {"document": -1, **dict.fromkeys(COLUMNS, 0), "labels": IGNORE}


def collate(
    examples: Sequence[Example], patch: int, pad_id: int, side: Literal["left", "right"] = "right", multiple: int = 1
) -> Batch:
    """One example per row, padded on one side to the longest length rounded up to `multiple`.

    Causal rows padded on the right keep the promise of `Layout.causal`: no real token comes after the padding. Sources
    are padded on the same side to their own length.
    """
    longest = max(example.length for example in examples)
    length = -(-longest // multiple) * multiple
    offsets = [length - example.length if side == "left" else 0 for example in examples]
    rows = [[(example, offset)] for example, offset in zip(examples, offsets, strict=True)]
    plain = all(example.causal for example in examples) and not any(offsets)
    batch, sources = _assemble(rows, length, patch, pad_id, causal=plain), _sources(examples)
    return replace(batch, source=collate(sources, patch, pad_id, side, multiple)) if sources else batch


def _sources(examples: Sequence[Example]) -> list[Example]:
    """What is read beside the examples: all of them have it, or none."""
    return [example.source for example in examples if example.source is not None]


def pack(examples: Sequence[Example], patch: int, pad_id: int, length: int) -> Batch:
    """Several examples per row of `length`, each its own document; longest first into the first row with room.

    Sources lie in the same rows of a sequence beside, in which there must be room as well.
    """
    rows = [[(examples[i], offset) for i, offset in row] for row in _first_fit(sizes_of(examples), length)]

    def made(rows: list[list[tuple[Example, int]]]) -> Batch:
        causal = all(len(row) == 1 and row[0][0].causal for row in rows)
        return _assemble(rows, length, patch, pad_id, causal)

    if not _sources(examples):
        return made(rows)
    return replace(made(rows), source=made([_beside(row) for row in rows]))


Size = tuple[int, int]  # tokens of an example, and of what is read beside it


def sizes_of(examples: Sequence[Example]) -> list[Size]:
    """What each example takes of a row."""
    return [(example.length, example.read.length) for example in examples]


def row_length(sizes: Sequence[Size], most: int) -> int:
    """The shortest rows into which `pack` puts examples of these sizes as few as into rows of `most` tokens.

    Rows are then filled alike, with little padding (the search of MULTIFIT, Coffman et al. 1978).
    """
    fewest = len(_first_fit(sizes, most))
    shortest = max(*map(max, sizes), *(-(-sum(column) // fewest) for column in zip(*sizes, strict=True)))
    return next(length for length in range(shortest, most + 1) if len(_first_fit(sizes, length)) <= fewest)


def _first_fit(sizes: Sequence[Size], length: int) -> list[list[tuple[int, int]]]:
    """Rows of (number of an example, where it begins): longest first into the first row with room."""
    if (too_long := max(map(max, sizes))) > length:
        raise ValueError(f"an example of {too_long} tokens does not fit rows of {length}")
    rows: list[list[tuple[int, int]]] = []
    used: list[Size] = []
    for i in sorted(range(len(sizes)), key=lambda each: -sizes[each][1]):
        size, beside = sizes[i]
        row = next((r for r, (n, m) in enumerate(used) if max(n + size, m + beside) <= length), len(rows))
        if row == len(rows):
            rows.append([])
            used.append((0, 0))
        rows[row].append((i, used[row][0]))
        used[row] = used[row][0] + size, used[row][1] + beside
    return rows


def _beside(row: Sequence[tuple[Example, int]]) -> list[tuple[Example, int]]:
    """The sources of a row's examples, one after another."""
    starts = accumulate((example.read.length for example, _ in row), initial=0)
    return [(example.read, start) for (example, _), start in zip(row, starts, strict=False)]


def branched(examples: Sequence[Example]) -> Example:
    """Several continuations of one prompt as one example: the tokens all begin with are the trunk, the rest branches.

    The trunk must hold every picture and sound; each branch goes on from the trunk's positions and sees nothing of the
    others. InputError for a question that refers to a region.
    """
    first = examples[0]
    if len(examples) == 1:
        return first
    # what is learned belongs to a branch, also where answers to several questions happen to begin alike
    shortest = min(int((example.labels != IGNORE).long().argmax()) for example in examples)
    same = torch.stack([example.ids[:shortest] for example in examples])
    trunk = int((same == same[:1]).all(0).long().cumprod(0).sum())
    if len(first.slots) and int(first.slots.max()) >= trunk:
        raise ValueError(f"the examples differ from token {trunk} on, before the end of their pictures")
    if first.sounds is not None and int(first.sounds.slots.max()) >= trunk:
        raise ValueError(f"the examples differ from token {trunk} on, before the end of their sounds")
    if any(example.regions is not None for example in examples):
        raise InputError("questions that refer to a region are learned one at a time")

    def column(name: str) -> Tensor:
        parts = [getattr(first, name)[:trunk], *(getattr(example, name)[trunk:] for example in examples)]
        return torch.cat(parts)

    lengths = torch.tensor([trunk, *(example.length - trunk for example in examples)])
    columns = {name: column(name) for name in ("ids", *COLUMNS)}
    # the label after the trunk's last token belongs to one branch only, and none of them to the trunk
    columns["labels"][:trunk] = IGNORE
    columns["branch"] = torch.arange(len(lengths)).repeat_interleave(lengths)
    starts = accumulate((example.length - trunk for example in examples), initial=0)
    places = [e.places.moved(start) for e, start in zip(examples, starts, strict=False) if e.places is not None]
    return replace(first, **columns, causal=False, places=PlaceTargets.joined(places) if places else None)


def _assemble(rows: list[list[tuple[Example, int]]], length: int, patch: int, pad_id: int, causal: bool) -> Batch:
    """Write every example into its row at its offset."""
    ids = torch.full((len(rows), length), pad_id)
    columns = {name: torch.full((len(rows), length), fill) for name, fill in _FILL.items()}
    axes = next((example.position.shape[1:] for row in rows for example, _ in row), torch.Size())
    columns["position"] = torch.zeros((len(rows), length, *axes), dtype=torch.int64)
    slots, patches, tilings, instructions = [], [], [], []
    sounds: list[Sounds] = []
    regions: list[Regions] = []
    places: list[PlaceTargets] = []
    for r, row in enumerate(rows):
        for document, (example, offset) in enumerate(row):
            span = slice(offset, offset + example.length)
            ids[r, span] = example.ids
            columns["document"][r, span] = document
            for name in COLUMNS:
                columns[name][r, span] = getattr(example, name)
            slots.append(example.slots + r * length + offset)
            if example.sounds is not None:
                sounds.append(example.sounds.moved(r * length + offset))
            if example.regions is not None:
                regions.append(example.regions.moved(r * length + offset, len(patches)))
            if example.places is not None:
                places.append(example.places.moved(r * length + offset))
            patches += [_cut(pixels, patch) for pixels in example.pixels]
            tilings += example.tilings
            if example.instruction is not None:
                instructions += [example.instruction] * len(example.pixels)
    labels = columns.pop("labels")
    return Batch(
        ids=ids,
        layout=Layout(**columns, causal=causal),
        slots=torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64),
        patches=replace(join(patches), tilings=tuple(tilings)) if patches else None,
        labels=labels,
        extra={"examples": [[example.extra for example, _ in row] for row in rows]},
        instruction=pad_sequence(instructions, True, -1) if instructions else None,
        sounds=Sounds.joined(sounds) if sounds else None,
        regions=Regions.joined(regions) if regions else None,
        places=PlaceTargets.joined(places) if places else None,
    )


def _cut(pixels: Tensor, patch: int) -> Patches:
    """The patches of one picture or film."""
    return patchify(pixels[None], patch) if pixels.dim() == 3 else patchify_film(pixels, patch)
