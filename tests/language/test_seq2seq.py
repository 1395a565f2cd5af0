"""The encoder and decoder: who sees whom, distances, and the same numbers with a cache as without."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sightline.core.errors import ConfigError
from sightline.core.layout import causal_layout
from sightline.core.memory import Memory
from sightline.language.seq2seq import DistanceBias, Seq2Seq, Seq2SeqConfig
from sightline.zoo.prepared import prepared

CONFIG = Seq2SeqConfig(
    vocab_size=50, width=32, encoder_depth=2, decoder_depth=3, heads=4, head_dim=8, mlp=48, buckets=8, farthest=20
)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(params=["flan", "first"])
def model(request: pytest.FixtureRequest) -> Seq2Seq:
    first = {"tied": True, "gated": False, "activation": "relu"} if request.param == "first" else {}
    made, generator = Seq2Seq(replace(CONFIG, **first)).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def words(length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 50, (batch, length))


def seen(model: Seq2Seq, ids: Tensor) -> Memory:
    return model.encode(model.embed(ids), causal_layout(*ids.shape))


@torch.no_grad()
def test_word_by_word_with_a_cache_as_in_one(model: Seq2Seq) -> None:
    memory, ids = seen(model, words(9)), words(12)
    layout, cache = causal_layout(2, 12), model.new_cache()
    whole = model(model.embed(ids), layout, memory)
    pieces = [(0, 4), *((n, n + 1) for n in range(4, 12))]
    out = [model(model.embed(ids[:, a:b]), layout.span(a, b), None if a else memory, cache) for a, b in pieces]
    torch.testing.assert_close(torch.cat(out, dim=1), whole, **CLOSE)


@torch.no_grad()
def test_keys_of_the_memory_are_made_once(model: Seq2Seq) -> None:
    memory, ids, cache, calls = seen(model, words(9)), words(3), model.new_cache(), []
    for block in model.blocks:
        block.cross.k.register_forward_hook(lambda *_: calls.append(1))
    for n in range(3):
        model(model.embed(ids[:, n : n + 1]), causal_layout(2, 3).span(n, n + 1), None if n else memory, cache)
    assert len(calls) == 3
    assert [layer.length for layer in cache.layers] == [3, 9] * 3


@torch.no_grad()
def test_rows_that_are_kept_go_on_as_themselves(model: Seq2Seq) -> None:
    memory, ids, layout = seen(model, words(9)), words(6), causal_layout(2, 6)
    cache = model.new_cache()
    model(model.embed(ids[:, :5]), layout.span(0, 5), memory, cache)
    whole = model(model.embed(ids), layout, memory)[:, 5]
    swapped = torch.tensor([1, 0])
    out = model(model.embed(ids[swapped, 5:]), layout.span(5, 6), cache=cache.keep(swapped))
    torch.testing.assert_close(out[:, 0], whole[swapped], **CLOSE)
    again = model(model.embed(ids[:, 4:5]), layout.span(4, 5), cache=cache.cut(4))
    torch.testing.assert_close(again, model(model.embed(ids[:, :5]), layout.span(0, 5), memory)[:, 4:], **CLOSE)


@torch.no_grad()
def test_the_encoder_sees_itself_whole_and_the_decoder_what_is_written(model: Seq2Seq) -> None:
    ids, written, layout = words(9), words(7), causal_layout(2, 9)
    x, y = model.embed(ids), model.embed(written)
    changed = x.clone()
    changed[:, 6] += 1.0
    assert float((model.encode(x, layout).values - model.encode(changed, layout).values).abs().amax(-1).min()) > 1e-4
    memory, other = model.encode(x, layout), y.clone()
    other[:, 3] += 1.0
    moved = (model(y, causal_layout(2, 7), memory) - model(other, causal_layout(2, 7), memory)).abs().amax(-1)
    assert float(moved[:, :3].max()) == 0.0 and float(moved[:, 3:].min()) > 1e-4


@torch.no_grad()
def test_padding_changes_nothing(model: Seq2Seq) -> None:
    ids, written = words(9), words(5)
    document = torch.tensor([[0] * 6 + [-1] * 3, [0] * 9])
    memory = model.encode(model.embed(ids), replace(causal_layout(2, 9), document=document, causal=False))
    together = model(model.embed(written), causal_layout(2, 5), memory)
    alone = model(model.embed(written[:1]), causal_layout(1, 5), seen(model, ids[:1, :6]))
    torch.testing.assert_close(together[:1], alone, **CLOSE)


def test_distances_are_told_apart_when_near() -> None:
    """Of 8 buckets 4 are for keys ahead; 2 of each side are exact, 2 grow up to the farthest."""
    bias = DistanceBias(CONFIG, ahead=True)
    found = bias.buckets(torch.tensor([-100, -20, -7, -6, -2, -1, 0, 1, 2, 6, 7, 100]))
    assert 6 < 2 * math.sqrt(20 / 2) < 7
    assert found.tolist() == [3, 3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7]
    back = DistanceBias(CONFIG, ahead=False).buckets(torch.tensor([5, 0, -1, -3, -4, -100]))
    assert back.tolist() == [0, 0, 1, 3, 4, 7]


def test_the_first_t5_scales_what_its_table_reads(model: Seq2Seq) -> None:
    hidden = torch.randn(2, 3, 32)
    if model.head is None:
        torch.testing.assert_close(model.logits(hidden), hidden @ model.embedding.weight.T / 32**0.5)
    else:
        torch.testing.assert_close(model.logits(hidden), hidden @ model.head.weight.T)


@torch.inference_mode()
def test_prepared_for_inference_it_writes_the_same(model: Seq2Seq) -> None:
    ids, written, layout = words(9), words(5), causal_layout(2, 5)
    twin = prepared(model)
    found = twin.logits(twin(twin.embed(written), layout, seen(twin, ids)))
    torch.testing.assert_close(found, model.logits(model(model.embed(written), layout, seen(model, ids))), **CLOSE)
    half = prepared(model, "bf16")
    rounded = half.logits(half(half.embed(written), layout, seen(half, ids)))
    assert float((rounded - found).norm() / found.norm()) < 0.05


@torch.no_grad()
def test_tokens_that_are_asked_for_are_those_of_the_whole(model: Seq2Seq) -> None:
    memory, ids, rows = seen(model, words(9)), words(6), torch.tensor([2, 5, 7])
    whole = model(model.embed(ids), causal_layout(2, 6), memory)
    found = model(model.embed(ids), causal_layout(2, 6), memory, rows=rows)
    torch.testing.assert_close(found, whole.flatten(0, 1)[rows], **CLOSE)


def test_nothing_is_written_about_nothing(model: Seq2Seq) -> None:
    with pytest.raises(ValueError, match="it has read nothing"):
        model(model.embed(words(3)), causal_layout(2, 3), cache=model.new_cache())


@pytest.mark.parametrize("wrong", [{"heads": 0}, {"buckets": 6}, {"farthest": 3}, {"start_id": 50}])
def test_sizes_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        replace(CONFIG, **wrong)
