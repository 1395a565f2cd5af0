"""Attention held against torch's own kernel and against a loop over heads, with and without a cache."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.layers.attention import Attention, explicit_attention
from sightline.layers.rotary import rotary_table

SETTINGS = [(4, 4, "causal"), (4, 2, "causal"), (4, 1, "mask"), (4, 2, "mask"), (4, 4, "all"), (6, 2, "all")]


class Store:
    """A layer's cache in its plainest form."""

    def __init__(self) -> None:
        self.key, self.value = torch.zeros(0), torch.zeros(0)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.key = torch.cat((self.key, key), dim=2) if len(self.key) else key
        self.value = torch.cat((self.value, value), dim=2) if len(self.value) else value
        return self.key, self.value


def seen(kind: str, batch: int, length: int) -> Tensor | None:
    """A mask [batch, 1, length, length] that differs from row to row; every query sees itself."""
    if kind != "mask":
        return None
    return (torch.rand(batch, 1, length, length) < 0.5) | torch.eye(length, dtype=torch.bool)


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Softmax attention head by head; query head h looks at key head h // (heads / key heads)."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // group].transpose(1, 2) / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], -math.inf)
        out[:, h] = scores.softmax(-1) @ v[:, h // group]
    return out


@pytest.mark.parametrize(("heads", "kv_heads", "kind"), SETTINGS)
def test_explicit_attention_is_torch_s_forward_and_backward(heads: int, kv_heads: int, kind: str) -> None:
    """Within the rounding of bfloat16, in which it computes; torch's side is given the same rounded numbers."""
    shapes = [(2, heads, 9, 16), (2, kv_heads, 9, 16), (2, kv_heads, 9, 16)]
    ours = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    theirs = [x.detach().float().requires_grad_() for x in ours]
    mask, causal = seen(kind, 2, 9), kind == "causal"
    got = explicit_attention(*ours, mask, causal)
    wanted = F.scaled_dot_product_attention(*theirs, attn_mask=mask, is_causal=causal, enable_gqa=heads != kv_heads)
    torch.testing.assert_close(got.float(), wanted, atol=2e-2, rtol=2e-2)
    toward = torch.randn(wanted.shape).bfloat16()
    got.backward(toward)
    wanted.backward(toward.float())
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.float(), b.grad, atol=6e-2, rtol=3e-2)


def test_a_query_that_sees_nothing_makes_no_gradient_infinite() -> None:
    """Padding sees nothing; its rows must stay numbers, or they would spoil every weight they touch."""
    q, k, v = (torch.randn(1, 2, 4, 8).bfloat16().requires_grad_() for _ in range(3))
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 2] = False
    out = explicit_attention(q, k, v, mask, False)
    torch.testing.assert_close(out[:, :, 2].float(), v.float().mean(2), atol=1e-2, rtol=1e-2)
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v) if x.grad is not None)


@pytest.mark.parametrize(("heads", "kv_heads", "kind"), SETTINGS)
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_is_its_four_maps_around_attention(heads: int, kv_heads: int, kind: str, training: bool) -> None:
    layer = Attention(24, heads, kv_heads, head_dim=8)
    x, mask, causal = torch.randn(2, 7, 24), seen(kind, 2, 7), kind == "causal"
    with torch.set_grad_enabled(training):
        got = layer(x, mask, causal)
    q, k, v = (m(x).unflatten(-1, (-1, 8)).transpose(1, 2) for m in (layer.q, layer.k, layer.v))
    wanted = layer.o(by_hand(q, k, v, mask, causal).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("across", [False, True])
@torch.no_grad()
def test_queries_and_keys_are_normalised_head_by_head_or_across_all(across: bool) -> None:
    layer, x = Attention(24, 6, 3, head_dim=8, qk_norm=True, across_heads=across), torch.randn(2, 7, 24)
    for norm in (layer.q_norm, layer.k_norm):
        assert norm is not None
        norm.weight.normal_()
    q, k, v = (m(x).unflatten(-1, (-1, 8)) for m in (layer.q, layer.k, layer.v))
    over = (-2, -1) if across else (-1,)
    q, k = (y / (y.square().mean(over, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    assert layer.q_norm is not None and layer.k_norm is not None
    q = q * layer.q_norm.weight.unflatten(0, (-1, 8))
    k = k * layer.k_norm.weight.unflatten(0, (-1, 8))
    out = by_hand(*(y.transpose(1, 2) for y in (q, k, v)), None, False)
    torch.testing.assert_close(layer(x), layer.o(out.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [12, 1040])  # the long one is left to torch's kernel
@pytest.mark.parametrize("training", [False, True])
def test_in_bfloat16_it_is_itself_rounded(length: int, training: bool) -> None:
    """Whichever kernel is the fastest for this precision and length."""
    layer = Attention(32, 4, 2)
    x, mask = torch.randn(1, length, 32), seen("mask", 1, length)
    with torch.set_grad_enabled(training):
        exact = layer(x, mask)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = layer(x, mask)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(rounded.float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("pieces", [(1,) * 8, (5, 1, 1, 1), (3, 5)])
@torch.no_grad()
def test_in_pieces_with_a_cache_as_in_one(kv_heads: int, pieces: tuple[int, ...]) -> None:
    layer, store = Attention(32, 4, kv_heads), Store()
    x, mask = torch.randn(2, 8, 32), torch.ones(8, 8, dtype=torch.bool).tril()
    cos, sin = (table[None, None] for table in rotary_table(torch.arange(8), 8, 10_000.0, torch.float32))
    whole = layer(x, causal=True, rotary=(cos, sin))
    out, start = [], 0
    for stop in torch.tensor(pieces).cumsum(0).tolist():
        turn = cos[:, :, start:stop], sin[:, :, start:stop]
        out.append(layer(x[:, start:stop], mask[start:stop, :stop], rotary=turn, cache=store))
        start = stop
    torch.testing.assert_close(torch.cat(out, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert store.key.shape == (2, kv_heads, 8, 8)


def test_biases_are_where_they_are_asked_for() -> None:
    names = {name for name, _ in Attention(8, 2, qkv_bias=True, out_bias=False).named_parameters()}
    assert names == {"q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias", "o.weight"}
