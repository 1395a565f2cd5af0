"""Keys and values of what a decoder has read, owned by the caller, with the layout of what it holds."""

import torch
from torch import Tensor

from ..core.layout import Layout
from ..core.memory import Memory


class LayerCache:
    """Keys and values [batch, kv_heads, capacity, dim] of one layer; the first `length` are filled."""

    def __init__(self, capacity: int = 0, dtype: torch.dtype | None = None) -> None:
        self.capacity, self.dtype = capacity, dtype
        self.length = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.memory = False  # it holds keys and values of a memory, not of tokens

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return views of all of them so far."""
        stop = self.length + key.shape[2]
        if self.key is None or self.value is None or stop > self.key.shape[2]:
            self.grow(key, stop)
        assert self.key is not None and self.value is not None
        self.key[:, :, self.length : stop] = key
        self.value[:, :, self.length : stop] = value
        self.length = stop
        return self.key[:, :, :stop], self.value[:, :, :stop]

    def grow(self, like: Tensor, needed: int) -> None:
        """Make room, doubling so that appending one by one stays linear in time."""
        room = max(needed, self.capacity, 2 * self.length)
        shape = (like.shape[0], like.shape[1], room, like.shape[3])
        key, value = (like.new_empty(shape, dtype=self.dtype or like.dtype) for _ in range(2))
        if self.key is not None and self.value is not None:
            key[:, :, : self.length] = self.key[:, :, : self.length]
            value[:, :, : self.length] = self.value[:, :, : self.length]
        self.key, self.value = key, value

    def extend(self, key: Tensor, value: Tensor) -> None:
        """Store keys and values of a memory; they come seldom, so there is no room for more."""
        key, value = (t.to(self.dtype or t.dtype) for t in (key, value))
        if self.key is not None and self.value is not None:
            key, value = torch.cat((self.key, key), dim=2), torch.cat((self.value, value), dim=2)
        self.key, self.value, self.length, self.memory = key, value, key.shape[2], True

    def room(self, new: int) -> tuple[Tensor, Tensor]:
        """The whole storage, grown so that `new` more tokens fit into it; there must be some already."""
        assert self.key is not None and self.value is not None
        if self.length + new > self.key.shape[2]:
            self.grow(self.key, self.length + new)
        return self.key, self.value

    def rows(self, index: Tensor) -> "LayerCache":
        """A copy that holds these rows, in this order."""
        out = LayerCache(self.capacity, self.dtype)
        out.length, out.memory = self.length, self.memory
        if self.key is not None and self.value is not None:
            out.key, out.value = self.key[index], self.value[index]
        return out


class Cache:
    """One `LayerCache` per block and the layout of every token they hold.

    `capacity` is how many tokens to make room for at once; more are taken when needed. `dtype` is the precision they
    are kept in, without one that in which they come.
    """

    def __init__(self, depth: int, capacity: int = 0, dtype: torch.dtype | None = None) -> None:
        self.layers = [LayerCache(capacity, dtype) for _ in range(depth)]
        self.layout: Layout | None = None
        self.memory: Memory | None = None  # without its values, whose keys and values the layers hold
        self.first = 0  # tokens that were read first, which settle what later ones keep to

    @property
    def length(self) -> int:
        """Tokens held per row, padding included."""
        return 0 if self.layout is None else self.layout.length

    def read(self, layout: Layout) -> Layout:
        """Remember the layout of tokens about to be read; return that of all keys they may look at."""
        self.first = self.first or layout.length
        self.layout = layout if self.layout is None else self.layout.then(layout)
        return self.layout

    def remember(self, memory: Memory | None, layout: Layout) -> Memory | None:
        """Take in what comes with the tokens about to be read, of that layout; return all that they may look at.

        The values returned are the new ones only: keys and values of those before are in the layers.
        """
        if memory is None:
            return self.memory
        memory = memory if self.memory is None else self.memory.then(memory)
        self.memory = memory.kept(layout)
        return memory

    def keep(self, rows: Tensor) -> "Cache":
        """A copy with only these rows [n] of the batch, in this order; a row may be named several times."""
        out = Cache(0)
        out.first = self.first
        out.layers = [layer.rows(rows) for layer in self.layers]
        out.layout = None if self.layout is None else self.layout.rows(rows)
        out.memory = None if self.memory is None else self.memory.rows(rows)
        return out

    def copy(self, times: int) -> "Cache":
        """A copy with every row repeated: one prefill, many continuations."""
        if self.layout is None:
            raise ValueError("an empty cache has no rows to copy")
        return self.keep(torch.arange(self.layout.batch).repeat_interleave(times))

    def cut(self, length: int) -> "Cache":
        """The same storage seen as holding only its first tokens; appending to it overwrites the rest."""
        out = Cache(0)
        out.first = min(self.first, length)
        for layer in self.layers:
            short = LayerCache(layer.capacity, layer.dtype)
            short.key, short.value, short.memory = layer.key, layer.value, layer.memory
            short.length = layer.length if layer.memory else length
            out.layers.append(short)
        out.layout = None if self.layout is None else self.layout.span(0, length)
        out.memory = None if self.memory is None or out.layout is None else self.memory.until(out.layout)
        return out
