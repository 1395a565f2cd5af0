"""What a decoder looks at beside its own sequence: vectors of each row's items, or of a text that was read before."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layout import Layout


@dataclass(frozen=True)
class Memory:
    """Vectors of all items of a row side by side, padded to the row with most; or those of each token of a text.

    document: [batch, keys], the document of its row that a vector belongs to, as in `Layout`; -1 is padding.
    item: [batch, keys], the number of the vector's item in that document, from 1; 0 is there from the beginning.
    values: [batch, keys, width], or the last of them, where keys and values of those before are in a cache already.
    latest: a token looks only at the item that began last (arXiv:2204.14198, section 2.3), else at all that began.
    ends: [batch, keys], up to which item the vector counts as the latest's; None: up to its own.
    seen: [batch, tokens, keys], where a caller says for every token what it looks at; the rule is not asked then.
    """

    document: Tensor
    item: Tensor
    values: Tensor | None = None
    latest: bool = True
    seen: Tensor | None = None
    ends: Tensor | None = None

    def looks(self, query: Layout) -> Tensor:
        """Who looks at what, boolean [batch, queries, keys]."""
        if self.seen is not None:
            return self.seen.expand(-1, query.length, -1)
        same = (query.document[:, :, None] == self.document[:, None, :]) & (self.document[:, None, :] >= 0)
        item, begun = self.item[:, None, :], query.item[:, :, None]
        if self.latest and self.ends is not None:
            return same & (item <= begun) & (begun <= self.ends[:, None, :])
        return same & ((item == begun) if self.latest else (item <= begun))

    def then(self, other: "Memory") -> "Memory":
        """This memory with further items of the same rows, whose values are the new ones."""
        if self.seen is not None or other.seen is not None:
            raise ValueError("further items for tokens whose caller said what they look at")
        document, item = (torch.cat(pair, dim=1) for pair in ((self.document, other.document), (self.item, other.item)))
        ends = None
        if self.ends is not None and other.ends is not None:
            ends = torch.cat((self.ends, other.ends), dim=1)
        return replace(other, document=document, item=item, ends=ends)

    def kept(self, layout: Layout) -> "Memory":
        """What remains to be said of it once its keys and values are in a cache; layout: the tokens that were read.

        Where a caller said what tokens look at, all that follow look at what a row's last one looked at.
        """
        if self.seen is None or self.seen.shape[1] == 1:
            return replace(self, values=None)
        real = layout.document >= 0
        last = (real * torch.arange(1, layout.length + 1, device=real.device)).argmax(dim=1)
        return replace(self, values=None, seen=self.seen[torch.arange(len(last), device=last.device), last][:, None])

    def rows(self, index: Tensor) -> "Memory":
        """The memory of some rows of the batch, in the order of `index`."""
        values, seen, ends = (None if t is None else t[index] for t in (self.values, self.seen, self.ends))
        return replace(self, document=self.document[index], item=self.item[index], values=values, seen=seen, ends=ends)

    def until(self, layout: Layout) -> "Memory":
        """The same vectors, those of items that have not begun in the layout hidden for good."""
        if self.seen is not None:
            raise ValueError("a cache cannot be cut where the caller said what each token looks at")
        began = torch.where(layout.document >= 0, layout.item, 0).amax(dim=1, keepdim=True)
        ends = None if self.ends is None else torch.minimum(self.ends, began)
        return replace(self, document=torch.where(self.item <= began, self.document, -1), ends=ends)


def side_by_side(slots: Tensor, owners: Tensor) -> Tensor:
    """For each of the items [n] with one slot each, the number of the last that stands in one stretch with it.

    slots: where in the batch they stand, flat and ascending; owners: as for `arrange`.
    """
    after = (slots[1:] == slots[:-1] + 1) & (owners[1:, :2] == owners[:-1, :2]).all(dim=1)
    last = torch.cat((~after, after.new_ones(min(1, len(slots))))).nonzero()[:, 0]
    return owners[last[torch.searchsorted(last, torch.arange(len(slots), device=last.device))], 2]


def arrange(
    values: Tensor, lengths: Sequence[int], owners: Tensor, batch: int, latest: bool, ends: Tensor | None = None
) -> Memory:
    """Vectors [n, width] of items, `lengths` of each one after another, put into the rows they belong to.

    owners: [items, 3], the row, the document and the number of each item, sorted by row. ends: as in `Memory`, [items].
    """
    # places are reckoned where numbers can be read, the values stay where they are
    times = torch.tensor(lengths, device="cpu")
    row, document, item = owners.cpu().repeat_interleave(times, dim=0).unbind(1)
    counts = torch.bincount(row, minlength=batch)
    keys = int(counts.max())
    place = torch.arange(len(row), device="cpu") - (counts.cumsum(0) - counts)[row] + row * keys

    def put(column: Tensor, fill: int) -> Tensor:
        return row.new_full((batch * keys,), fill).index_copy(0, place, column).view(batch, keys).to(values.device)

    padded = values.new_zeros(batch * keys, values.shape[1]).index_copy(0, place.to(values.device), values)
    made = Memory(put(document, -1), put(item, 0), padded.view(batch, keys, -1), latest)
    return made if ends is None else replace(made, ends=put(ends.cpu().repeat_interleave(times), 0))
