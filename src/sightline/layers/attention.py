"""Multi-head attention with grouped keys, optional rotary positions and a cache that the caller owns."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import native
from .linear import together
from .norms import RMSNorm
from .packed import PackedLinear
from .rotary import rotate


class KeyValueStore(Protocol):
    """What attention asks of a layer's cache."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [batch, kv_heads, new, dim]; all of them so far come back, in its precision."""
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
        qk_norm: bool = False,
        across_heads: bool = False,
    ) -> None:
        """across_heads: queries and keys are normalised over all heads at once (InternViT), else head by head."""
        super().__init__()
        self.head_dim = head_dim or width // heads
        kv_heads = kv_heads or heads
        self.q = nn.Linear(width, heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(width, kv_heads * self.head_dim, bias=qkv_bias)
        self.o = nn.Linear(heads * self.head_dim, width, bias=out_bias)
        # scores of normalised queries and keys cannot grow until attention looks at one token only and learns no more
        q_heads, k_heads = (heads, kv_heads) if across_heads else (1, 1)
        self.q_norm = RMSNorm(q_heads * self.head_dim) if qk_norm else None
        self.k_norm = RMSNorm(k_heads * self.head_dim) if qk_norm else None
        self.across_heads = across_heads
        self.qkv: PackedLinear | None = None  # the first three as one, once packed for inference
        self.kernels = False

    def pack(self, kernels: bool = False) -> None:
        """Join queries, keys and values into one product; for inference, there is no way back."""
        fits = self.head_dim % native.LANES == 0 and self.head_dim <= native.WIDEST_HEAD
        self.kernels = kernels and fits and self.q_norm is None
        self.qkv = PackedLinear((self.q, self.k, self.v))
        del self.q, self.k, self.v

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KeyValueStore | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x [batch, length, width]; mask broadcasts to [batch, heads, queries, keys], True where a key is seen.

        rows: the tokens [n] that are asked for, counted through the batch; then [n, width].
        """
        if self.kernels and self.qkv is not None and mask is None and (cache is None or causal):
            heads, kv_heads = (size // self.head_dim for size in self.qkv.sizes[:2])
            joined, cached = self.qkv(x), cache is not None
            out, k, v = native.self_attention(joined, heads, kv_heads, self.head_dim, causal, rotary, cached)
            if cache is not None and k is not None and v is not None:
                cache.append(k, v)
            return self.o(chosen(out, rows))
        parts = together(x, (self.q, self.k, self.v)) if self.qkv is None else self.qkv.parts(x)
        if self.across_heads and self.q_norm is not None and self.k_norm is not None:
            parts = self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if not self.across_heads and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            stored = cache.append(k, v)
            if stored[0].shape[2] > k.shape[2]:  # else all of them are here already, in the precision they came in
                k, v = stored
        out = attend(q.to(k.dtype), k, v, mask, causal).to(x.dtype)
        return self.o(chosen(out.transpose(1, 2).flatten(2), rows))


def chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some tokens [n, width] of x [batch, length, width], counted through the batch; without rows all, as they are."""
    return x if rows is None else x.flatten(0, 1)[rows]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Softmax attention [batch, heads, queries, dim] by whichever way is fastest here."""
    grouped = q.shape[1] != k.shape[1]
    if explicit_is_faster(q, k):
        return explicit_attention(q, k, v, mask, causal)
    if grouped and q.shape[2] == 1:  # one query: the heads that share keys are read as several queries of one head
        folded = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:  # a mask of its own for each head
            mask = mask.unflatten(1, (k.shape[1], -1)).squeeze(3)
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).flatten(1, 2)[:, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


LONGEST = 1024  # beyond this many keys the scores of explicit attention cost more memory than they save time


def explicit_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether explicit attention beats torch's fused kernel: in bfloat16 on a CPU it does."""
    precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    return q.device.type == "cpu" and precision == torch.bfloat16 and k.shape[2] <= LONGEST


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Softmax attention as two batched products; the same as `scaled_dot_product_attention`.

    q [batch, heads, queries, dim]; k, v with as many heads or a divisor of them. A query that sees nothing gets the
    mean of all values instead of zeros, which nothing learns from: only padding sees nothing.
    """
    batch, heads, queries, dim = q.shape
    if k.shape[1] != heads:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    if causal:
        mask = torch.ones(queries, k.shape[2], dtype=torch.bool, device=q.device).tril()
    hidden = torch.zeros((), dtype=torch.bfloat16, device=q.device)
    if mask is not None:
        hidden = torch.zeros_like(mask, dtype=torch.bfloat16).masked_fill_(~mask, torch.finfo(torch.bfloat16).min)
    hidden = hidden.expand(batch, heads, queries, k.shape[2]).reshape(-1, queries, k.shape[2])
    q, k, v = (x.to(torch.bfloat16).flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=dim**-0.5)
    return torch.bmm(torch.softmax(scores, dim=-1, dtype=torch.bfloat16), v).unflatten(0, (batch, heads))
