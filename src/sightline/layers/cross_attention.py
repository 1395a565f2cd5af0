"""Attention of some tokens to others: queries from one side, keys and values from the other."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from ..core.errors import ConfigError
from .attention import attend
from .linear import together


class MemoryStore(Protocol):
    """What attention to a memory asks of a layer's cache: keys and values so far, and room for more."""

    key: Tensor | None
    value: Tensor | None

    def extend(self, key: Tensor, value: Tensor) -> None:
        """Store new keys and values [batch, heads, new, dim]."""
        ...


class CrossAttention(nn.Module):
    """Attention whose queries, keys, values and output are four plain linear maps.

    memory: width of what is looked at; None: `width`. qk_norm: the norm over each head of queries and keys. scale: what
    products are multiplied with; None: 1 / sqrt(head_dim). kv_heads: heads of keys and values, each shared by several
    of queries; None: as many as heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        memory: int | None = None,
        bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
        kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and width % heads:
            raise ConfigError(f"a width of {width} cannot be shared by {heads} heads alike")
        self.head_dim = head_dim or width // heads
        inner, narrow = heads * self.head_dim, (kv_heads or heads) * self.head_dim
        self.q = nn.Linear(width, inner, bias=bias)
        self.k = nn.Linear(memory or width, narrow, bias=bias)
        self.v = nn.Linear(memory or width, narrow, bias=bias)
        self.o = nn.Linear(inner, width, bias=bias)
        self.q_norm = qk_norm(self.head_dim) if qk_norm else None
        self.k_norm = qk_norm(self.head_dim) if qk_norm else None
        self.scale = scale

    def forward(self, x: Tensor, keys: Tensor, values: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [batch, queries, width] to the same shape; keys and values [batch, n, memory], values are keys if left out.

        mask: broadcasts to [batch, heads, queries, n], True where a key is seen.
        """
        q, k = self.heads(self.q(x), self.q_norm), self.heads(self.k(keys), self.k_norm)
        v = self.heads(self.v(keys if values is None else values))
        out = attend(q.to(v.dtype), k.to(v.dtype), v, mask, False, self.scale)  # a norm under autocast gives float32
        return self.o(out.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """[batch, length, heads * head_dim] as [batch, heads, length, head_dim], normed where there is a norm."""
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return x if norm is None else norm(x)


class MemoryAttention(CrossAttention):
    """Queries of tokens, keys and values of a memory; the cache holds the latter, so that they are made once."""

    def forward(  # type: ignore[override]  # what is looked at comes once, with a cache
        self, x: Tensor, values: Tensor | None, looks: Tensor | None, cache: MemoryStore | None
    ) -> Tensor:
        """x [batch, queries, width]; values [batch, keys, memory width], the new ones where there is a cache.

        looks: [batch, 1, queries, all keys], True where one is looked at.
        """
        q = self.heads(self.q(x), self.q_norm)
        if values is not None:
            k, v = together(values.to(x.dtype), (self.k, self.v))
            k, v = self.heads(k, self.k_norm).to(v.dtype), self.heads(v)  # a norm under autocast gives float32
            if cache is not None:
                cache.extend(k, v)
        if cache is not None:
            assert cache.key is not None and cache.value is not None
            k, v = cache.key, cache.value
        out = attend(q.to(k.dtype), k, v, looks, False, self.scale).to(x.dtype)
        return self.o(out.transpose(1, 2).flatten(2))
