"""Multi-head attention with grouped keys, optional rotary positions and a cache that the caller owns."""

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from .rotary import rotate


class KeyValueStore(Protocol):
    """What attention asks of a layer's cache."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [batch, kv_heads, new, dim]; return all of them so far."""
        ...


class Attention(nn.Module):
    """Attention whose queries, keys, values and output are four plain linear maps."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim or width // heads
        kv_heads = kv_heads or heads
        self.grouped = kv_heads != heads
        self.q = nn.Linear(width, heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(width, kv_heads * self.head_dim, bias=qkv_bias)
        self.o = nn.Linear(heads * self.head_dim, width, bias=out_bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KeyValueStore | None = None,
    ) -> Tensor:
        """x [batch, length, width]; mask broadcasts to [batch, heads, queries, keys], True where a key is seen."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in (self.q, self.k, self.v))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o(out.transpose(1, 2).flatten(2))
