"""What each token of a batch is, and the one rule for who sees whom."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from .patches import Grid


class Medium(IntEnum):
    """What a token carries."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3


Run = tuple[int, int, int]  # its row, where it starts and where it stops


@dataclass(frozen=True)
class Layout:
    """Six integers per token, each of shape [batch, length].

    document: which sample the token belongs to; -1 is padding.
    block: tokens of one block see each other and every earlier block of their document.
    position: what rotary or learned positions count; [batch, length], or [batch, length, 3] for time-height-width.
    medium: a `Medium`.
    item: how many media items have begun by this token, in its document (0 before the first).
    branch: 0 is the trunk of a document; tokens of another branch see the trunk and their own branch only, so that
    several questions about one picture can follow it in one row without seeing one another.
    causal: the writer's promise that every block holds one token and no row is padded or packed, so the
    attention kernel's own causal path may be used.
    """

    document: Tensor
    block: Tensor
    position: Tensor
    medium: Tensor
    item: Tensor
    branch: Tensor
    causal: bool = False

    @property
    def batch(self) -> int:
        return self.document.shape[0]

    @property
    def length(self) -> int:
        return self.document.shape[1]

    def to(self, device: torch.device | str) -> "Layout":
        return replace(self, **{name: getattr(self, name).to(device) for name in COLUMNS})

    def rows(self, index: Tensor) -> "Layout":
        """The layout of some rows of the batch, in the order of `index`."""
        return replace(self, **{name: getattr(self, name)[index] for name in COLUMNS})

    def span(self, start: int, stop: int) -> "Layout":
        """The layout of tokens start to stop of every row."""
        return replace(self, **{name: getattr(self, name)[:, start:stop] for name in COLUMNS})

    def runs(self) -> tuple[Run, ...]:
        """Every run of tokens of one document, padding among them, in order."""
        begins = torch.ones_like(self.document, dtype=torch.bool)
        begins[:, 1:] = self.document[:, 1:] != self.document[:, :-1]
        starts = begins.nonzero().tolist()
        stops = [start or self.length for _, start in starts[1:]] + [self.length] * bool(starts)
        return tuple((row, start, stop) for (row, start), stop in zip(starts, stops, strict=True))

    def then(self, other: "Layout") -> "Layout":
        """This layout followed by another of the same batch."""
        joined = {name: torch.cat([getattr(self, name), getattr(other, name)], dim=1) for name in COLUMNS}
        return replace(self, **joined, causal=self.causal and other.causal)

    def next(self) -> "Layout":
        """The layout of one further text token per row: a block and a position past the row's largest.

        The next position is the maximum plus one, not the length: image tokens may share positions.
        """
        real = self.document >= 0
        last = (real * torch.arange(1, self.length + 1, device=real.device)).argmax(dim=1, keepdim=True)
        position = self.position if self.position.dim() == 2 else self.position.amax(dim=2)
        step = torch.where(real, position, -1).amax(dim=1, keepdim=True) + 1
        return Layout(
            document=self.document.gather(1, last),
            block=torch.where(real, self.block, -1).amax(dim=1, keepdim=True) + 1,
            position=step if self.position.dim() == 2 else step[:, :, None].expand(-1, -1, self.position.shape[2]),
            medium=torch.zeros_like(last),
            item=self.item.gather(1, last),
            branch=self.branch.gather(1, last),
            # padding on the right now lies between a row and what follows it, where the promise no longer holds
            causal=self.causal and bool(real.all()),
        )


COLUMNS = ("document", "block", "position", "medium", "item", "branch")


def visible(query: Layout, key: Layout) -> Tensor:
    """Who sees whom: same document, the key in the trunk or the query's branch, its block begun by the query's.

    Boolean [batch, queries, keys].
    """
    same = (query.document[:, :, None] == key.document[:, None, :]) & (key.document[:, None, :] >= 0)
    on_the_way = (key.branch[:, None, :] == 0) | (key.branch[:, None, :] == query.branch[:, :, None])
    return same & on_the_way & (key.block[:, None, :] <= query.block[:, :, None])


def framed(slots: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Slots [n] of pictures of so many each, in which each picture's own first and last token frame its patches.

    The slots that stay at the position of the one before them, so that all patches of a picture share one, and the last
    slots, which are read as text (CogVLM, arXiv:2311.03079).
    """
    each = torch.tensor(counts, dtype=torch.int64, device=slots.device)
    stop = each.cumsum(0)
    moves = torch.zeros(len(slots), dtype=torch.bool, device=slots.device)
    for edge in (stop - each, stop - each + 1, stop - 1):  # before the patches, the first of them, after them
        moves[edge] = True
    return slots[~moves], slots[stop - 1]


@dataclass(frozen=True)
class Axes:
    """How tokens are placed on three axes: time, height and width (M-RoPE, arXiv:2409.12191).

    A word is at one place on all three and the next word one further. Tokens of a picture or film spread from where it
    begins; what follows goes on after the largest place of it.

    fold: side of the square of patches that is one token. per_second: places that a second of film takes
    (arXiv:2502.13923); None: one for each step of its time.
    """

    fold: int = 1
    per_second: float | None = None

    def positions(self, length: int, media: Sequence[tuple[int, Grid, float]]) -> Tensor:
        """Places [length, 3] of a row; media: its pictures and films in order.

        Each is the index of its first token, the grid of its patches, and the seconds of one step of its time.
        """
        written, place, out = 0, 0, []
        for start, (frames, rows, columns), seconds in media:
            out.append(torch.arange(place, place + start - written)[:, None].expand(-1, 3))
            place += start - written
            step = 1.0 if self.per_second is None else self.per_second * seconds
            sides = (torch.arange(side // self.fold) for side in (rows, columns))
            spread = torch.cartesian_prod((torch.arange(frames) * step).long(), *sides) + place
            out.append(spread)
            written, place = start + len(spread), int(spread.max()) + 1
        out.append(torch.arange(place, place + length - written)[:, None].expand(-1, 3))
        return torch.cat(out)


def causal_layout(batch: int, length: int, device: torch.device | str = "cpu") -> Layout:
    """Plain left-to-right text: every token its own block, no padding."""
    counted = torch.arange(length, device=device).expand(batch, -1)
    zero = torch.zeros_like(counted)
    return Layout(document=zero, block=counted, position=counted, medium=zero, item=zero, branch=zero, causal=True)
