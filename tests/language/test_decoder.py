"""The decoder: what its settings change, who sees whom, and the same numbers with a cache as without."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.core.config import from_dict, to_dict
from sightline.core.errors import ConfigError
from sightline.core.layout import Layout, causal_layout
from sightline.core.memory import Memory
from sightline.language.cache import Cache
from sightline.language.context import Context
from sightline.language.decoder import Decoder, DecoderConfig, sinusoidal
from sightline.layers.attention import QKNorm
from sightline.layers.experts import Experts, ExpertsConfig
from sightline.layers.rotary import RopeScaling
from sightline.layers.scores import Scores

LENGTH = 12
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
ROUNDING = 1e-6  # experts are given other tokens together once one of them changes, whose sums round otherwise
PLAIN = DecoderConfig(vocab_size=50, width=32, depth=2, heads=4, mlp=48)


def ids(batch: int = 2) -> Tensor:
    return torch.randint(0, 50, (batch, LENGTH))


def prefix_layout(batch: int, seen_whole: int) -> Layout:
    """The first tokens see one another, the rest is written left to right."""
    plain = causal_layout(batch, LENGTH)
    return replace(plain, block=(plain.block - seen_whole + 1).clamp(min=0), causal=False)


def read(decoder: Decoder, tokens: Tensor, layout: Layout, stops: Sequence[int]) -> Tensor:
    """Hidden states of tokens that are read in pieces, each up to one of `stops`."""
    cache = Cache(len(decoder.blocks))
    pieces = [decoder(decoder.embed(tokens[:, a:b]), layout.span(a, b), cache=cache) for a, b in pairwise((0, *stops))]
    assert cache.length == stops[-1]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("stops", [range(1, LENGTH + 1), (5, *range(6, LENGTH + 1)), (4, 7, LENGTH)])
@torch.no_grad()
def test_in_pieces_with_a_cache_as_in_one(decoder: Decoder, stops: Sequence[int]) -> None:
    tokens, layout = ids(), causal_layout(2, LENGTH)
    torch.testing.assert_close(read(decoder, tokens, layout, stops), decoder(decoder.embed(tokens), layout), **CLOSE)


@pytest.mark.parametrize("stops", [(5, *range(6, LENGTH + 1)), (7, LENGTH)])
@torch.no_grad()
def test_a_prefix_read_whole_goes_on_token_by_token(decoder: Decoder, stops: Sequence[int]) -> None:
    tokens, layout = ids(), prefix_layout(2, 5)
    whole = decoder(decoder.embed(tokens), layout)
    torch.testing.assert_close(read(decoder, tokens, layout, stops), whole, **CLOSE)
    assert not torch.allclose(whole[:, 0], decoder(decoder.embed(tokens), causal_layout(2, LENGTH))[:, 0], atol=1e-3)


@torch.no_grad()
def test_the_layout_of_the_next_token_continues_a_cache(decoder: Decoder) -> None:
    """A generated token is placed by `Layout.next` as a writer would have placed it, behind padding or not."""
    tokens, layout = ids(), causal_layout(2, LENGTH)
    whole = decoder(decoder.embed(tokens), layout)
    padded = replace(
        causal_layout(2, LENGTH - 1),
        document=torch.tensor([[0] * 6 + [-1] * 5, [0] * 11]),
        causal=False,
    )
    cache = Cache(2)
    decoder(decoder.embed(tokens[:, :-1]), padded, cache=cache)
    assert cache.layout is not None
    out = decoder(decoder.embed(torch.stack([tokens[0, 6:7], tokens[1, 11:]])), cache.layout.next(), cache=cache)
    torch.testing.assert_close(out[:, 0], torch.stack([whole[0, 6], whole[1, 11]]), **CLOSE)


@torch.no_grad()
def test_the_kernel_s_own_causal_path_is_the_mask_s(decoder: Decoder) -> None:
    x, layout = decoder.embed(ids()), causal_layout(2, LENGTH)
    torch.testing.assert_close(decoder(x, layout), decoder(x, replace(layout, causal=False)), **CLOSE)


@torch.no_grad()
def test_a_token_changes_nothing_before_it_and_everything_after(decoder: Decoder) -> None:
    x = decoder.embed(ids())
    changed = x.clone()
    changed[:, 4] = 1.0
    difference = (decoder(x, causal_layout(2, LENGTH)) - decoder(changed, causal_layout(2, LENGTH))).abs().amax(-1)
    assert float(difference[:, :4].max()) <= ROUNDING
    assert float(difference[:, 4:].min()) > 1e-4
    within = (decoder(x, prefix_layout(2, 6)) - decoder(changed, prefix_layout(2, 6))).abs().amax(-1)
    assert float(within.min()) > 1e-4  # a prefix looks ahead


@torch.no_grad()
def test_documents_and_branches_of_one_row_do_not_see_one_another(decoder: Decoder) -> None:
    x, plain = decoder.embed(ids(1)), causal_layout(1, LENGTH)
    packed = replace(plain, document=torch.tensor([[0] * 5 + [1] * 7]), causal=False)
    branched = replace(plain, branch=torch.tensor([[0] * 4 + [1] * 3 + [2] * 5]), causal=False)
    for layout, hidden_from_8 in ((packed, range(5)), (branched, (4, 5, 6))):
        for place in range(8):
            changed = x.clone()
            changed[:, place] += torch.linspace(-1, 1, 32)  # a constant would be nothing to a layer norm
            moved = float((decoder(x, layout) - decoder(changed, layout))[0, 8].abs().max())
            assert (moved <= ROUNDING) == (place in hidden_from_8)


# ------------------------------------------------------------------------------------------------------------ settings


def test_a_tied_head_is_the_embedding(build: Callable[[DecoderConfig], Decoder]) -> None:
    tied, free = build(replace(PLAIN, tied=True)), build(PLAIN)
    hidden = torch.randn(2, 3, 32)
    assert "head.weight" not in tied.state_dict()
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.embedding.weight.T)
    assert free.head is not None
    torch.testing.assert_close(free.logits(hidden), hidden @ free.head.weight.T)


def test_logits_are_float32_whatever_the_weights(build: Callable[[DecoderConfig], Decoder]) -> None:
    decoder = build(PLAIN).bfloat16()
    hidden = decoder(decoder.embed(ids()), causal_layout(2, LENGTH))
    assert hidden.dtype == torch.bfloat16
    assert decoder.logits(hidden).dtype == torch.float32


@torch.no_grad()
def test_gemma_rounds_its_embedding_factor_to_the_weights_precision(build: Callable[[DecoderConfig], Decoder]) -> None:
    """sqrt(3072) is 55.4256; Gemma's published code multiplies bfloat16 embeddings by 55.5."""
    decoder = Decoder(DecoderConfig(50, 3072, 0, 4, 8, scale_embedding=True)).bfloat16()
    nn.init.ones_(decoder.embedding.weight)
    assert float(decoder.embed(torch.tensor([[3]]))[0, 0, 0]) == 55.5
    decoder.float()
    assert float(decoder.embed(torch.tensor([[3]]))[0, 0, 0]) == pytest.approx(math.sqrt(3072))


@torch.no_grad()
def test_a_stored_difference_from_one_is_the_same_norm(build: Callable[[DecoderConfig], Decoder]) -> None:
    plain, offset = build(PLAIN), build(replace(PLAIN, norm_offset=True))
    weights = plain.state_dict()
    offset.load_state_dict({k: v - 1 if "norm" in k else v for k, v in weights.items()})
    x = plain.embed(ids())
    torch.testing.assert_close(plain(x, causal_layout(2, LENGTH)), offset(x, causal_layout(2, LENGTH)), **CLOSE)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 50.0},
        {"activation": "gelu"},
        {"eps": 0.1},
        {"rotary_fraction": 0.5},
        {"rope_scaling": RopeScaling("linear", 3.0)},
        {"rope_scaling": RopeScaling("dynamic", 3.0, original=4)},
        {"rope_scaling": RopeScaling("ntk", original=4)},
        {"positions": "none"},
        {"positions": "sinusoidal"},
        {"scale_inputs": True},
        {"scores": Scores(window=3)},
        {"scores": Scores(window=3), "full_every": 2},
        {"scores": Scores(softcap=0.5)},
        {"full_every": 2, "full_positions": False},
    ],
)
@torch.no_grad()
def test_settings_without_weights_change_the_numbers(
    build: Callable[[DecoderConfig], Decoder], change: dict[str, object]
) -> None:
    plain, other = build(PLAIN), build(replace(PLAIN, **change))
    x, layout = plain.embed(ids()), causal_layout(2, LENGTH)
    assert float((plain(x, layout) - other(x, layout)).abs().max()) > 1e-3


def test_blocks_are_given_and_know_the_memory() -> None:
    """A fusion's own block is called like any other, with what its look needs."""
    seen: list[Context] = []

    class Adds(nn.Module):
        def forward(self, x: Tensor, context: Context, cache: object) -> Tensor:
            seen.append(context)
            assert context.memory is not None and cache is None
            assert context.memory.values is not None
            return x + context.memory.values

    decoder = Decoder(PLAIN, [Adds(), Adds()])
    x, values, first = torch.randn(2, LENGTH, 32), torch.randn(2, 1, 32), torch.zeros(2, 1, dtype=torch.int64)
    layout = causal_layout(2, LENGTH)
    layout = replace(layout, item=(layout.position > 2).long())
    out = decoder(x, layout, Memory(document=first, item=first + 1, values=values))
    torch.testing.assert_close(out, F.rms_norm(x + 2 * values, (32,), eps=PLAIN.eps))
    assert seen[0] is seen[1] and seen[0].layout.length == LENGTH
    assert seen[0].blind is not None and seen[0].blind[..., 0].tolist() == (layout.item == 0).tolist()


@pytest.mark.parametrize("tied", [False, True])
def test_ids_with_rows_of_their_own_are_ids_like_others(tied: bool) -> None:
    """Embedding and head in two parts: the same numbers as in one, and the new rows learn alone."""
    whole = Decoder(replace(PLAIN, tied=tied))
    parted = Decoder(replace(PLAIN, vocab_size=47, extra_vocab=3, tied=tied))
    weights = whole.state_dict()
    for name in ("embedding", "head")[: 1 if tied else 2]:
        weights[f"extra_{name}.weight"] = weights[f"{name}.weight"][47:]
        weights[f"{name}.weight"] = weights[f"{name}.weight"][:47]
    parted.load_state_dict(weights)
    tokens = torch.cat((ids(), torch.tensor([[46, 47, 49, 0]] * 2)), dim=1)
    layout = causal_layout(*tokens.shape)
    wanted, found = (d.logits(d(d.embed(tokens), layout)) for d in (whole, parted))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert parted.config.total_vocab == whole.config.total_vocab == 50
    parted.requires_grad_(False)
    parted.extra_embedding.requires_grad_()  # type: ignore[union-attr]
    parted.logits(parted(parted.embed(tokens), layout)).square().sum().backward()
    grad = parted.extra_embedding.weight.grad  # type: ignore[union-attr]
    assert grad is not None and (grad.abs().amax(1) > 0).tolist()[::2] == [True, True]


def test_sinusoidal_positions_are_the_formula_s() -> None:
    """Sines first, then cosines, of waves from 2 pi to 10,000 times 2 pi."""
    found = sinusoidal(torch.tensor([[0, 3]]), 6)[0, 1]
    rates = [1.0, 10_000.0**-0.5, 1e-4]
    wanted = [math.sin(3 * rate) for rate in rates] + [math.cos(3 * rate) for rate in rates]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


def test_learned_positions_begin_at_their_offset(build: Callable[[DecoderConfig], Decoder]) -> None:
    decoder = build(replace(PLAIN, positions="learned", position_offset=2, max_length=LENGTH))
    assert decoder.positions is not None and decoder.positions.weight.shape == (LENGTH + 2, 32)
    x = torch.zeros(1, LENGTH, 32)
    assert torch.equal(decoder.placed(x, causal_layout(1, LENGTH))[0], decoder.positions.weight[2:])


def test_logits_stay_below_their_cap(build: Callable[[DecoderConfig], Decoder]) -> None:
    plain, capped = build(PLAIN), build(replace(PLAIN, logit_softcap=2.0))
    hidden = 5 * torch.randn(2, 3, 32)
    torch.testing.assert_close(capped.logits(hidden), 2 * torch.tanh(plain.logits(hidden) / 2))


def test_blocks_with_experts_and_blocks_that_see_everything() -> None:
    cfg = replace(PLAIN, depth=4, experts=ExpertsConfig(3, 1, 8, every=2), scores=Scores(window=5), full_every=4)
    blocks = list(Decoder(cfg).blocks)
    assert [type(block.feedforward) is Experts for block in blocks] == [False, True, False, True]
    assert [block.attention.scores.window for block in blocks] == [5, 5, 5, None]


def test_blocks_without_positions_alone_have_a_temperature() -> None:
    unit = QKNorm("unit", after_rotary=True)
    scores = Scores(chunk=8, temperature=(4, 0.1))
    cfg = replace(PLAIN, depth=3, full_every=3, full_positions=False, scores=scores, qk_norm=unit)
    turned, _, still = (block.attention for block in Decoder(cfg).blocks)
    assert (turned.scores.chunk, turned.scores.temperature, still.scores.chunk) == (8, None, None)
    assert still.scores.temperature == (4, 0.1)
    assert turned.q_norm is not None and still.q_norm is None


@torch.no_grad()
def test_a_row_that_grows_past_its_length_keeps_what_was_read_first(build: Callable[[DecoderConfig], Decoder]) -> None:
    """Qwen's base: 6 tokens read first settle it, whatever follows; 10 read at once have another."""
    decoder = build(replace(PLAIN, rope_scaling=RopeScaling("ntk", original=6)))
    plain = build(PLAIN)
    tokens, layout = ids(), causal_layout(2, LENGTH)
    short = read(decoder, tokens, layout, (6, *range(7, LENGTH + 1)))
    torch.testing.assert_close(short, read(plain, tokens, layout, (LENGTH,)), **CLOSE)
    long = read(decoder, tokens, layout, (10, 11, LENGTH))
    assert float((long - short).abs().max()) > 1e-3
    cache = Cache(2)
    decoder(decoder.embed(tokens[:, :10]), layout.span(0, 10), cache=cache)
    again = cache.copy(2).keep(torch.tensor([0, 3]))
    out = decoder(decoder.embed(tokens[:, 10:11]), layout.span(10, 11), cache=again)
    torch.testing.assert_close(out[:, 0], long[:, 10], **CLOSE)


def test_a_random_start_leaves_norms_alone() -> None:
    decoder = Decoder(replace(PLAIN, qk_norm=QKNorm("layer", own=True), norm="layer", positions="learned"))
    attention = decoder.blocks[0].attention
    assert attention.q_norm is not None
    assert bool((attention.q_norm.weight == 1).all()) and bool((attention.q_norm.bias == 0).all())
    assert decoder.positions is not None and float(decoder.positions.weight.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"rotary_fraction": 0.4},
        {"rotary_fraction": 2.0},
        {"full_every": 0},
        {"logit_softcap": 0.0},
        {"inner_norm": True},
        {"gated": False, "experts": ExpertsConfig(2, 1, 8)},
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        replace(PLAIN, **change)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"mrope_section": (1, 1, 1)}, r"mrope_section \(1, 1, 1\) of \d+ rotary numbers, expected half as many pairs"),
        ({"positions": "none"}, r"mrope_section .* rotary numbers"),
        ({"scores": Scores(window=3)}, "scores or rope_scaling count tokens, which three axes do not"),
        ({"rope_scaling": RopeScaling("dynamic", 2.0, 16)}, "scores or rope_scaling count tokens"),
    ],
)
def test_three_axes_do_not_go_with_what_counts_tokens(change: dict[str, object], told: str) -> None:
    half = PLAIN.rotary_dim // 2
    with pytest.raises(ConfigError, match=told):
        replace(PLAIN, **{"mrope_section": (half - 2, 1, 1), **change})


def test_words_alone_are_at_one_place_on_every_axis() -> None:
    half = PLAIN.rotary_dim // 2
    model = Decoder(replace(PLAIN, mrope_section=(half - 2, 1, 1))).eval()
    plain = Decoder(PLAIN).eval()
    plain.load_state_dict(model.state_dict())
    layout = causal_layout(1, 6)
    x = torch.randn(1, 6, PLAIN.width)
    wide = replace(layout, position=layout.position[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(model(x, wide), plain(x, layout))
    assert torch.equal(model(x, layout), plain(x, layout))
    with pytest.raises(ValueError, match="positions on three axes for a decoder without mrope_section"):
        plain(x, wide)


def test_settings_survive_yaml_s_plain_values() -> None:
    cfg = replace(
        PLAIN,
        scores=Scores(window=3, temperature=(4, 0.1)),
        qk_norm=QKNorm("layer"),
        experts=ExpertsConfig(3, 1, 8),
        rope_scaling=RopeScaling("ntk"),
    )
    assert from_dict(DecoderConfig, to_dict(cfg)) == cfg
    assert from_dict(DecoderConfig, {**to_dict(PLAIN), "qk_norm": True}).qk_norm is True
