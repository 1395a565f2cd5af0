"""The cache as a value that its caller owns: grown, kept, copied and cut without touching what others hold."""

import pytest
import torch
from torch import Tensor

from sightline.core.layout import causal_layout
from sightline.language.cache import Cache, LayerCache
from sightline.language.decoder import Decoder

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def prefilled(decoder: Decoder, tokens: Tensor, capacity: int = 0) -> Cache:
    cache = Cache(len(decoder.blocks), capacity)
    decoder(decoder.embed(tokens), causal_layout(*tokens.shape), cache=cache)
    return cache


def go_on(decoder: Decoder, cache: Cache, tokens: Tensor) -> Tensor:
    """Hidden states of further tokens, read one by one."""
    out = []
    for token in tokens.unbind(1):
        assert cache.layout is not None
        out.append(decoder(decoder.embed(token[:, None]), cache.layout.next(), cache=cache))
    return torch.cat(out, dim=1)


def whole(decoder: Decoder, *parts: Tensor) -> Tensor:
    """Hidden states of the last part when everything is read at once."""
    tokens = torch.cat(parts, dim=1)
    return decoder(decoder.embed(tokens), causal_layout(*tokens.shape))[:, -parts[-1].shape[1] :]


@pytest.mark.parametrize("capacity", [0, 5, 64])
@pytest.mark.parametrize("first", [1, 7])
def test_what_was_appended_is_returned_in_order(capacity: int, first: int) -> None:
    layer = LayerCache(capacity)
    keys, values = torch.randn(2, 3, 40, 4), torch.randn(2, 3, 40, 4)
    for start in (0, *range(first, 40)):
        stop = start + (first if start == 0 else 1)
        key, value = layer.append(keys[:, :, start:stop], values[:, :, start:stop])
        assert torch.equal(key, keys[:, :, :stop]) and torch.equal(value, values[:, :, :stop])
    assert layer.length == 40


def test_growing_copies_rarely_and_a_capacity_never() -> None:
    moves = {}
    for capacity in (0, 300):
        layer, places = LayerCache(capacity), set()
        held = []  # storages that are let go could be handed out again at the same place
        for _ in range(300):
            key, _ = layer.append(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
            places.add(key.data_ptr())
            held.append(key)
        moves[capacity] = len(places)
    assert moves[300] == 1
    assert moves[0] <= 10  # doubling: 1, 2, 4, ... 512


@torch.no_grad()
def test_kept_rows_go_on_in_their_new_order(decoder: Decoder) -> None:
    tokens, more = torch.randint(0, 50, (3, 6)), torch.randint(0, 50, (4, 3))
    rows = torch.tensor([2, 0, 0, 1])
    cache = prefilled(decoder, tokens)
    found = go_on(decoder, cache.keep(rows), more)
    torch.testing.assert_close(found, whole(decoder, tokens[rows], more), **CLOSE)
    assert cache.length == 6  # the original is as it was
    torch.testing.assert_close(go_on(decoder, cache, more[:3]), whole(decoder, tokens, more[:3]), **CLOSE)


@torch.no_grad()
def test_copies_of_one_prefill_do_not_touch_one_another(decoder: Decoder) -> None:
    tokens, more = torch.randint(0, 50, (2, 6)), torch.randint(0, 50, (6, 3))
    cache = prefilled(decoder, tokens, capacity=32)  # with room: appending would write in place
    copied = cache.copy(3)
    assert copied.layout is not None and copied.layout.batch == 6
    repeated = tokens.repeat_interleave(3, dim=0)
    torch.testing.assert_close(go_on(decoder, copied, more), whole(decoder, repeated, more), **CLOSE)
    torch.testing.assert_close(go_on(decoder, cache, more[:2]), whole(decoder, tokens, more[:2]), **CLOSE)


@torch.no_grad()
def test_cut_back_and_gone_on_differently(decoder: Decoder) -> None:
    tokens, other = torch.randint(0, 50, (2, 8)), torch.randint(0, 50, (2, 4))
    cache = prefilled(decoder, tokens)
    short = cache.cut(5)
    assert (short.length, cache.length) == (5, 8)
    torch.testing.assert_close(go_on(decoder, short, other), whole(decoder, tokens[:, :5], other), **CLOSE)


def test_an_empty_cache_has_no_rows_to_copy() -> None:
    with pytest.raises(ValueError, match="an empty cache has no rows to copy"):
        Cache(2).copy(3)


def test_an_empty_cache_may_be_kept_and_cut() -> None:
    empty = Cache(2, capacity=9)
    for cache in (empty.keep(torch.tensor([0])), empty.cut(0)):
        assert cache.length == 0
        assert [layer.capacity for layer in cache.layers] == [9, 9]
