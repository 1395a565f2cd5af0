"""Attention held against torch's own kernel and against a loop over heads, with and without a cache."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.core.errors import ConfigError
from sightline.core.layout import Layout, causal_layout, visible
from sightline.layers import native
from sightline.layers.attention import Attention, QKNorm, attend, explicit_attention
from sightline.layers.packed import pack
from sightline.layers.rotary import rotary_table, rotate
from sightline.layers.scores import Places, Scores, alibi_slopes

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


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_explicit_attention_of_no_rows_is_none(kv_heads: int) -> None:
    q = torch.randn(0, 4, 3, 8, dtype=torch.bfloat16)
    k = v = torch.randn(0, kv_heads, 5, 8, dtype=torch.bfloat16)
    assert explicit_attention(q, k, v, None, False).shape == (0, 4, 3, 8)


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


# -------------------------------------------------------------------------------------------------------------- scores

PLACES = causal_layout(2, 9)
KINDS = {
    "scale": Scores(scale=0.7),
    "softcap": Scores(softcap=0.8),
    "window": Scores(window=3),
    "chunk": Scores(chunk=4),
    "alibi": Scores(alibi=True),
    "logn": Scores(logn=4),
    "temperature": Scores(temperature=(3, 0.5)),
    "all": Scores(scale=0.9, softcap=2.0, window=5, alibi=True, temperature=(4, 0.1)),
}


def scored(q: Tensor, k: Tensor, v: Tensor, scores: Scores, mask: Tensor) -> Tensor:
    """Attention query by query, as the words of `Scores` say; mask [batch, queries, keys]."""
    batch, heads, queries, dim = q.shape
    out = torch.empty_like(q)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                query = q[b, h, i]
                if scores.logn is not None:
                    query = query * max(1.0, math.log(i + 1, scores.logn))
                if scores.temperature is not None:
                    query = query * (1 + scores.temperature[1] * math.log(1 + (i + 1) // scores.temperature[0]))
                row = torch.full((k.shape[2],), -math.inf)
                for j in range(k.shape[2]):
                    near = scores.window is None or i - j < scores.window
                    near &= scores.chunk is None or i // scores.chunk == j // scores.chunk
                    if mask[b, i, j] and near:
                        product = query @ k[b, h, j] * (dim**-0.5 if scores.scale is None else scores.scale)
                        if scores.softcap is not None:
                            product = scores.softcap * torch.tanh(product / scores.softcap)
                        slope = 2 ** (-8 / heads * (h + 1)) if scores.alibi else 0.0
                        row[j] = product - slope * (i - j)
                out[b, h, i] = row.softmax(0) @ v[b, h]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_scores_are_what_their_words_say(kind: str, masked: bool, packed: bool) -> None:
    """Packed with the built kernels, which know none of this and must step aside."""
    scores = KINDS[kind]
    layer = Attention(64, 4, head_dim=16, scores=scores)
    for parameter in layer.parameters():
        parameter.mul_(4)
    x, mask = torch.randn(2, 9, 64), torch.ones(2, 9, 9, dtype=torch.bool).tril()
    if masked:
        mask = torch.rand(2, 9, 9) < 0.6
        mask |= torch.eye(9, dtype=torch.bool)
    q, k, v = (m(x).unflatten(-1, (-1, 16)).transpose(1, 2) for m in (layer.q, layer.k, layer.v))
    wanted = layer.o(scored(q, k, v, scores, mask).transpose(1, 2).flatten(2))
    if packed:
        pack(layer, kernels=native.library() is not None)
        assert not layer.kernels
    found = layer(x, mask[:, None] if masked else None, not masked, places=Places(PLACES, PLACES))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_scores_in_pieces_with_a_cache_as_in_one(kind: str, kv_heads: int) -> None:
    layer, store, x = Attention(32, 4, kv_heads, scores=KINDS[kind]), Store(), torch.randn(2, 9, 32)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    whole = layer(x, causal=True, places=Places(PLACES, PLACES))
    out = []
    for start, stop in ((0, 4), *((n, n + 1) for n in range(4, 9))):
        places = Places(PLACES.span(start, stop), PLACES.span(0, stop))
        seen = mask[start:stop, :stop] if stop - start > 1 else None  # one query sees all that is there
        out.append(layer(x[:, start:stop], seen, cache=store, places=places))
    torch.testing.assert_close(torch.cat(out, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_blocks_of_the_same_scores_share_their_mask() -> None:
    places, scores = Places(PLACES, PLACES), Scores(window=3)
    first, causal = scores.limited(None, True, places, 4)
    again, _ = Scores(window=3).limited(None, True, places, 4)
    assert first is again and not causal
    assert Scores(window=9).limited(None, True, places, 4) == (None, True)  # the kernel's causal path stays


@pytest.mark.parametrize("scores", [Scores(window=2), Scores(chunk=2)])
def test_a_block_is_seen_whole_by_its_own_tokens(scores: Scores) -> None:
    layout = replace(PLACES, block=torch.tensor([0, 1, 1, 1, 1, 2, 3, 4, 5]).expand(2, 9), causal=False)
    mask, _ = scores.limited(visible(layout, layout)[:, None], False, Places(layout, layout), 4)
    assert mask is not None
    assert bool(mask[:, :, 1:5, 1:5].all())
    assert not bool(mask[:, :, 5, 1:4].any()) and not bool(mask[:, :, 1, 5:].any())


@pytest.mark.parametrize(
    "heads, slopes",
    [
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_slopes(heads: int, slopes: list[float]) -> None:
    assert alibi_slopes(heads, torch.device("cpu")).tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("kind", ["alibi", "softcap", "scale"])
def test_scores_in_bfloat16(kind: str) -> None:
    layer, x = Attention(32, 4, scores=KINDS[kind]), torch.randn(2, 9, 32)
    with torch.no_grad():
        exact = layer(x, causal=True, places=Places(PLACES, PLACES))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = layer(x, causal=True, places=Places(PLACES, PLACES))
    torch.testing.assert_close(rounded.float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("norm", [QKNorm(), QKNorm("layer", 1e-5), QKNorm("layer", 1e-5, own=True), QKNorm("unit")])
@torch.no_grad()
def test_norms_of_queries_and_keys(norm: QKNorm, after: bool) -> None:
    layer = Attention(32, 4, 2, qk_norm=QKNorm(norm.kind, norm.eps, norm.own, after))
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    x, rotary = (
        torch.randn(2, 9, 32),
        tuple(t[None, None] for t in rotary_table(torch.arange(9), 8, 1e4, torch.float32)),
    )
    q, k, v = (m(x).unflatten(-1, (-1, 8)).transpose(1, 2) for m in (layer.q, layer.k, layer.v))

    def normed(x: Tensor, by: torch.nn.Module) -> Tensor:
        if norm.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        state = by.state_dict()
        weight, bias = state.get("weight", torch.ones(8)), state.get("bias", torch.zeros(8))
        return x * (weight[:, None] if norm.own else weight) + (bias[:, None] if norm.own else bias)

    assert layer.q_norm is not None and layer.k_norm is not None
    if after:
        q, k = normed(rotate(q, *rotary), layer.q_norm), normed(rotate(k, *rotary), layer.k_norm)
    else:
        q, k = rotate(normed(q, layer.q_norm), *rotary), rotate(normed(k, layer.k_norm), *rotary)
    wanted = layer.o(by_hand(q, k, v, None, True).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, causal=True, rotary=rotary), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_norm_across_heads_is_before_they_are_cut() -> None:
    layer = Attention(32, 4, 2, qk_norm=QKNorm("layer", 1e-5, across=True))
    assert isinstance(layer.q_norm, torch.nn.LayerNorm) and isinstance(layer.k_norm, torch.nn.LayerNorm)
    assert layer.q_norm.bias is None and (len(layer.q_norm.weight), len(layer.k_norm.weight)) == (32, 16)
    for parameter in layer.parameters():
        parameter.normal_()
    x = torch.randn(2, 9, 32)
    q, k = (torch.nn.functional.layer_norm(m(x), (n,)) for m, n in ((layer.q, 32), (layer.k, 16)))
    q, k, v = q * layer.q_norm.weight, k * layer.k_norm.weight, layer.v(x)
    cut = [part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in (q, k, v)]
    wanted = layer.o(by_hand(*cut, None, True).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, causal=True), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scores(window=0),
        lambda: Scores(softcap=-1.0),
        lambda: Scores(chunk=0),
        lambda: Scores(logn=1),
        lambda: Scores(temperature=(0, 0.1)),
        lambda: QKNorm("rms", own=True),
        lambda: QKNorm("rms", across=True),
        lambda: QKNorm("layer", own=True, across=True),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_in_runs_is_attention_that_sees_its_own_run_alone(dtype: torch.dtype, softcap: float | None) -> None:
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, -1], [0, 1, 1, 1, 1, 1, 2, 2, 2]])
    runs = Layout(document, *[torch.zeros_like(document)] * 5).runs()
    assert runs == ((0, 0, 3), (0, 3, 7), (0, 7, 8), (0, 8, 9), (1, 0, 1), (1, 1, 6), (1, 6, 9))
    mask = ((document[:, :, None] == document[:, None]) & torch.ones(9, 9, dtype=torch.bool).tril())[:, None]
    x = [torch.randn(2, heads, 9, 16).to(dtype).requires_grad_() for heads in (6, 2, 2)]
    found = attend(*x, mask, False, softcap=softcap, runs=runs)
    wanted = attend(*x, mask, False, softcap=softcap)
    bound = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, wanted, **bound)
    toward = torch.randn(wanted.shape).to(dtype)
    for a, b in zip(torch.autograd.grad(found, x, toward), torch.autograd.grad(wanted, x, toward), strict=True):
        torch.testing.assert_close(a, b, **({"atol": 6e-2, "rtol": 3e-2} if bound else {}))
