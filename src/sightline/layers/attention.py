"""Multi-head attention with grouped keys, optional rotary positions and a cache that the caller owns."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import config
from ..core.errors import ConfigError
from ..core.layout import Run
from . import native
from .linear import together
from .norms import HeadNorm, LayerAcrossHeads, RMSNorm, UnitNorm
from .packed import PackedLinear, added
from .rotary import rotate
from .scores import HIDDEN, Places, Scores


class KeyValueStore(Protocol):
    """What attention asks of a layer's cache."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [batch, kv_heads, new, dim]; all of them so far come back, in its precision."""
        ...


@config
class QKNorm:
    """A norm over each head of queries and keys (arXiv:2302.05442).

    Scores of normalised queries and keys cannot grow until attention looks at one token only and learns no more.
    kind: "rms"; "layer", which has biases as well; "unit", which has no weights. own: weights of its own for each head.
    across: one norm over all heads of a token at once, without biases (MosaicGPT).
    """

    kind: Literal["rms", "layer", "unit"] = "rms"
    eps: float = 1e-6
    own: bool = False
    after_rotary: bool = False
    across: bool = False

    def __post_init__(self) -> None:
        if self.own and self.kind != "layer":
            raise ConfigError(f"a {self.kind!r} norm has no weights of its own for each head, expected kind 'layer'")
        if self.across and (self.own or self.kind != "layer"):
            raise ConfigError("a norm across heads is of kind 'layer', without weights of its own for each head")

    def build(self, heads: int, dim: int) -> nn.Module:
        """The norm of queries or keys [batch, heads, length, dim]."""
        if self.kind == "unit":
            return UnitNorm(self.eps)
        if self.own:
            return HeadNorm(heads, dim, self.eps)
        if self.across:
            return LayerAcrossHeads(heads * dim, self.eps, bias=False)
        return RMSNorm(dim, self.eps) if self.kind == "rms" else nn.LayerNorm(dim, self.eps)


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
        qk_norm: bool | QKNorm = False,
        scores: Scores | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim or width // heads
        kv_heads = kv_heads or heads
        self.q = nn.Linear(width, heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(width, kv_heads * self.head_dim, bias=qkv_bias)
        self.norm = nn.Identity() if norm is None else norm
        self.o = nn.Linear(heads * self.head_dim, width, bias=out_bias)
        qk = QKNorm() if qk_norm is True else qk_norm or None
        self.q_norm = None if qk is None else qk.build(heads, self.head_dim)
        self.k_norm = None if qk is None else qk.build(kv_heads, self.head_dim)
        self.norm_last = qk is not None and qk.after_rotary
        self.scores = scores or Scores()
        self.qkv: PackedLinear | None = None  # the first three as one, once packed for inference
        self.kernels = False

    @property
    def plain(self) -> bool:
        """Whether it is nothing but softmax attention between its four maps, as `layers.native` knows it."""
        return self.q_norm is None and self.scores == Scores() and isinstance(self.norm, nn.Identity)

    def pack(self, kernels: bool = False) -> None:
        """Join queries, keys and values into one product; for inference, there is no way back."""
        fits = self.head_dim % native.LANES == 0 and self.head_dim <= native.WIDEST_HEAD
        self.kernels = kernels and fits and self.plain
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
        places: Places | None = None,
        onto: Tensor | None = None,
        runs: Sequence[Run] | None = None,
    ) -> Tensor:
        """x [batch, length, width]; mask broadcasts to [batch, heads, queries, keys], True where a key is seen.

        A mask of numbers is added to the scores instead. rows: the tokens [n] that are asked for, counted through the
        batch; then [n, width]. places: needed where positions have a say in the scores. onto: what the result is added
        to, of its shape. runs: as `attend` takes them.
        """
        whole = rotary is None or rotary[0].shape[-1] == self.head_dim
        if self.kernels and self.qkv is not None and mask is None and (cache is None or causal) and whole:
            heads, kv_heads = (size // self.head_dim for size in self.qkv.sizes[:2])
            joined, cached = self.qkv(x), cache is not None
            out, k, v = native.self_attention(joined, heads, kv_heads, self.head_dim, causal, rotary, cached)
            if cache is not None and k is not None and v is not None:
                cache.append(k, v)
            return added(self.o, chosen(out, rows), onto)
        parts = together(x, (self.q, self.k, self.v)) if self.qkv is None else self.qkv.parts(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if self.q_norm is not None and self.k_norm is not None and not self.norm_last:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.q_norm is not None and self.k_norm is not None and self.norm_last:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.scores.by_place:
            assert places is not None
            q = self.scores.stretched(q, places)
            mask, causal = self.scores.limited(mask, causal, places, q.shape[1])
        if cache is not None:
            stored = cache.append(k, v)
            if stored[0].shape[2] > k.shape[2]:  # else all of them are here already, in the precision they came in
                k, v = stored
        out = attend(q.to(k.dtype), k, v, mask, causal, self.scores.scale, self.scores.softcap, runs).to(x.dtype)
        return added(self.o, self.norm(chosen(out.transpose(1, 2).flatten(2), rows)), onto)


def chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some tokens [n, width] of x [batch, length, width], counted through the batch; without rows all, as they are."""
    return x if rows is None else x.flatten(0, 1)[rows]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None = None,
    softcap: float | None = None,
    runs: Sequence[Run] | None = None,
) -> Tensor:
    """Softmax attention [batch, heads, queries, dim] by whichever way is fastest here.

    mask: what is seen, or numbers that are added to the scores; scale: None for 1 / sqrt(dim). runs: all tokens of all
    rows in runs, in order, of which the mask shows none to another; each then costs no more than it would alone.
    """
    if runs is not None and mask is not None:
        return attend_in_runs(q, k, v, mask, runs, scale, softcap)
    grouped = q.shape[1] != k.shape[1]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    if softcap is not None:
        return capped_attention(q, k, v, mask, causal, scale, softcap)
    if explicit_is_faster(q, k):
        return explicit_attention(q, k, v, mask, causal, scale)
    if grouped and q.shape[2] == 1:  # one query: the heads that share keys are read as several queries of one head
        folded = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:  # a mask of its own for each head
            mask = mask.unflatten(1, (k.shape[1], -1)).squeeze(3)
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale).flatten(1, 2)[:, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def attend_in_runs(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, runs: Sequence[Run], scale: float | None, softcap: float | None
) -> Tensor:
    """Attention of each run to itself; the mask has a row for each of the batch."""
    lengths = [stop - start for _, start, stop in runs]
    parts = zip(*(x.transpose(0, 1).flatten(1, 2).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    out = []
    for (row, start, stop), part in zip(runs, parts, strict=True):
        own = mask[row : row + 1, :, start:stop, start:stop]
        out.append(attend(*(x[None] for x in part), own, False, scale, softcap)[0])
    return torch.cat(out, dim=1).unflatten(1, (q.shape[0], -1)).transpose(0, 1)


LONGEST = 1024  # beyond this many keys the scores of explicit attention cost more memory than they save time


def explicit_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether explicit attention beats torch's fused kernel for these queries and keys."""
    precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    return is_explicit(q.device.type, precision, k.shape[2])


def is_explicit(device: str, precision: torch.dtype, keys: int) -> bool:
    """Whether attention is explicit, which keeps its scores for the gradients: in bfloat16 on a CPU."""
    return device == "cpu" and precision == torch.bfloat16 and keys <= LONGEST


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None = None
) -> Tensor:
    """Softmax attention as two batched products; the same as `scaled_dot_product_attention`.

    q [batch, heads, queries, dim]; k, v with as many heads or a divisor of them. A query that sees nothing gets the
    mean of all values instead of zeros, which nothing learns from: only padding sees nothing.
    """
    batch, heads, queries, dim = q.shape
    shared, keys = k.shape[1:3]
    rows = heads // shared * queries
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
    hidden = torch.zeros((), dtype=torch.bfloat16, device=q.device)
    if mask is not None and mask.is_floating_point():
        hidden = mask.to(torch.bfloat16)
    elif mask is not None:
        hidden = torch.zeros_like(mask, dtype=torch.bfloat16).masked_fill_(~mask, torch.finfo(torch.bfloat16).min)
    # heads that share keys are so many more queries of one head: no key is copied, and their gradients are one sum
    if hidden.dim() < 3 or hidden.shape[:2] == (1, 1):  # the same for all: not written for each
        hidden = hidden.expand(1, heads // shared, queries, keys).reshape(1, rows, keys)
    else:
        hidden = hidden.expand(batch, heads, queries, keys).reshape(batch * shared, rows, keys)
    q = q.to(torch.bfloat16).reshape(batch * shared, rows, dim)
    k, v = (x.to(torch.bfloat16).flatten(0, 1) for x in (k, v))
    scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=dim**-0.5 if scale is None else scale)
    return torch.bmm(torch.softmax(scores, dim=-1, dtype=torch.bfloat16), v).reshape(batch, heads, queries, v.shape[-1])


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, softcap: float
) -> Tensor:
    """Softmax attention whose scores stay below `softcap`, which torch's kernels do not know; softmax in float32.

    q [batch, heads, queries, dim]; k, v with as many heads or a divisor of them. A query that sees nothing gets the
    mean of all values.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x if group == 1 else x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, HIDDEN)
    return torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)
