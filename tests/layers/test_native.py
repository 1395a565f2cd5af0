"""The built kernels against torch, on sizes that do and do not fill whole vectors."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.layers import native
from sightline.layers.norms import RMSNorm
from sightline.layers.rotary import rotary_table, rotate

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler on this machine")

DTYPES = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 1.5e-2)}


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().float() - wanted.detach().float()).norm() / wanted.detach().float().norm())


@pytest.mark.parametrize("dtype, most", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(
    "batch, length, heads, kv_heads, dim", [(1, 1, 4, 2, 16), (2, 37, 4, 2, 32), (3, 70, 2, 1, 80), (1, 64, 2, 2, 256)]
)
def test_attention_of_tokens_to_themselves(
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    dim: int,
    turned: bool,
    causal: bool,
    dtype: torch.dtype,
    most: float,
) -> None:
    joined = torch.randn(batch, length, (heads + 2 * kv_heads) * dim).to(dtype)
    rotary = tuple(t[:, None] for t in rotary_table(torch.arange(length)[None], dim, 1e4, torch.float32))
    given = rotary if turned else None
    out, key, value = native.self_attention(joined, heads, kv_heads, dim, causal, given, cached=True)  # type: ignore[arg-type]
    assert key is not None and value is not None
    parts = joined.float().split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    q, k, v = (part.unflatten(-1, (-1, dim)).transpose(1, 2) for part in parts)
    if turned:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2).flatten(2)
    assert error(out, wanted) < most
    assert error(key, k) < most
    assert torch.equal(value.float(), v)
    again, *none = native.self_attention(joined, heads, kv_heads, dim, causal, given)  # type: ignore[arg-type]
    assert torch.equal(again, out) and none == [None, None]


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("outputs", [1, 6, 64])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)], ids=["fp32", "bf16"])
def test_products(rows: int, outputs: int, dtype: torch.dtype, most: float) -> None:
    linear = nn.Linear(96, outputs).to(dtype)
    x = torch.randn(rows, 96)
    wanted = x @ linear.weight.float().T + linear.bias.float()  # sums are kept in float32 whatever the weights are in
    assert error(native.Weight(linear)(x), wanted) < most


def test_int8_weights_are_half_a_percent_off() -> None:
    linear = nn.Linear(640, 320, bias=False)
    with torch.no_grad():
        linear.weight.normal_()  # the long tails of a normal are harder than the uniform start of a layer
    x = torch.randn(5, 640)
    assert error(native.Weight(linear, int8=True)(x), x @ linear.weight.T) < 0.007
    whole, scale = native.quantised(linear.weight)
    back = (whole.float().unflatten(1, (-1, native.GROUP)) * scale[..., None]).flatten(1)
    assert float((back - linear.weight).abs().max()) <= float(scale.max()) / 2 + 1e-6


@pytest.mark.parametrize("width", [16, 50, 192])
@pytest.mark.parametrize("dtype, most", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("offset", [False, True])
def test_norm(width: int, dtype: torch.dtype, most: float, offset: bool) -> None:
    norm = RMSNorm(width, offset=offset)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(2, 3, width).to(dtype)
    with torch.inference_mode():
        wanted = norm(x)
        norm.pack(kernels=True)
        assert error(norm(x), wanted) < most


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.OFF, "0")
    native.library.cache_clear()
    try:
        assert native.library() is None
    finally:
        native.library.cache_clear()


def test_a_compiler_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert list((tmp_path / "sightline").iterdir()) == []
    finally:
        native.library.cache_clear()
