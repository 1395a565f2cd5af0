"""Gated cross-attention: OpenFlamingo's own numbers, closed gates, who sees nothing, where blocks stand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sightline.core.errors import ConfigError
from sightline.core.layout import Layout, causal_layout
from sightline.core.memory import Memory, arrange
from sightline.core.patches import Patches
from sightline.fusion.cross_attention import CrossAttentionConfig, CrossBlock
from sightline.fusion.projector import ProjectorConfig
from sightline.fusion.resampler import ResamplerConfig
from sightline.language.cache import Cache
from sightline.language.decoder import Decoder, DecoderConfig, SelfBlock

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES: dict[str, Any] = {"inputs": 12, "width": 16, "heads": 2, "mlp": 24}
IDEFICS = CrossAttentionConfig(
    **SIZES, start=0, interval=2, norm="rms", gated_mlp=True, activation="silu", qk_norm=True
)
DECODER = DecoderConfig(vocab_size=30, width=16, depth=6, heads=2, mlp=24)


@pytest.fixture(scope="module")
def golden(root: Path) -> dict[str, Tensor]:
    return load_file(root / "tests/golden/blocks/open_flamingo_block.safetensors")


def flamingo(golden: dict[str, Tensor]) -> CrossBlock:
    """A block of the published weights, by the published names."""
    block = CrossBlock(CrossAttentionConfig(inputs=12, width=16, heads=3, mlp=64, head_dim=6))
    w = {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}
    key, value = w.pop("attn.to_kv.weight").chunk(2)
    names = {
        "attn.norm": "cross_norm1", "attn.to_q": "cross_attention.q", "attn.to_out": "cross_attention.o",
        "attn_gate": "cross_gate1", "ff_gate": "cross_gate2", "ff.0": "cross_norm2",
        "ff.1": "cross_feedforward.up", "ff.3": "cross_feedforward.down",
    }  # fmt: skip
    ours = {"cross_attention.k.weight": key, "cross_attention.v.weight": value}
    for name, tensor in w.items():
        old = next(old for old in names if name == old or name.startswith(f"{old}."))
        ours[names[old] + name.removeprefix(old)] = tensor
    block.load_state_dict(ours)
    return block.eval()


def look(decoder: Decoder, layout: Layout, memory: Memory, cache: Cache | None = None) -> Any:
    """What a block is told, as the decoder tells it."""
    if cache is not None:
        cache.read(layout)
        memory = cache.remember(memory, layout)  # type: ignore[assignment]
    return decoder.context(layout, layout, memory, torch.float32)


@pytest.mark.parametrize("mode", ["latest", "earlier"])
@torch.no_grad()
def test_openflamingo_s_own_block(golden: dict[str, Tensor], mode: str) -> None:
    block, decoder = flamingo(golden), Decoder(DECODER)
    begun = golden["where" if mode == "latest" else "late"].long().cumsum(1)
    layout = replace(causal_layout(2, 9), item=begun)
    owners = torch.tensor([[row, 0, number] for row in range(2) for number in (1, 2, 3)])
    memory = arrange(golden["media"].flatten(0, 2), [4] * 6, owners, 2, latest=mode == "latest")
    cache = Cache(1)
    found = block(golden["x"], look(decoder, layout, memory, cache), cache.layers[0])
    torch.testing.assert_close(found, golden[mode], **CLOSE)
    if mode == "latest":
        assert cache.layout is not None
        step = cache.layout.next()
        context = look(decoder, step, None, cache)  # type: ignore[arg-type]
        torch.testing.assert_close(block(golden["step"], context, cache.layers[0]), golden["cached"], **CLOSE)


def model(cfg: CrossAttentionConfig, gates: float | None = 0.7) -> tuple[Decoder, Decoder]:
    """A decoder with cross-attention, its weights drawn anew, and the bare decoder of the same weights."""
    deep, bare = Decoder(DECODER, cfg.build().blocks(DECODER)).eval(), Decoder(DECODER).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in deep.named_parameters():
            closed = "gate1" in name or "gate2" in name
            if closed and gates is not None:
                parameter.fill_(gates)
            elif not closed:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    own = [block for block in deep.blocks if isinstance(block, SelfBlock)]
    for a, b in zip(bare.blocks, own, strict=True):
        a.load_state_dict(b.state_dict())
    for part in ("embedding", "norm", "head"):
        getattr(bare, part).load_state_dict(getattr(deep, part).state_dict())
    return deep, bare


def given(batch: int = 2, length: int = 7) -> tuple[Tensor, Layout, Memory]:
    """Vectors of two rows whose pictures begin at tokens 2 and 4, the second row's second never."""
    item = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1]])
    owners = torch.tensor([[0, 0, 1], [0, 0, 2], [1, 0, 1]])
    memory = arrange(torch.randn(9, 12), [3, 3, 3], owners, batch, latest=True)
    return torch.randn(batch, length, 16), replace(causal_layout(batch, length), item=item), memory


@pytest.mark.parametrize("cfg", [CrossAttentionConfig(**SIZES, interval=2), IDEFICS])
@torch.no_grad()
def test_closed_gates_are_the_bare_decoder(cfg: CrossAttentionConfig) -> None:
    deep, bare = model(cfg, gates=None)
    x, layout, memory = given()
    assert torch.equal(deep(x, layout, memory), bare(x, layout))
    opened, _ = model(cfg)
    assert float((opened(x, layout, memory) - bare(x, layout)).abs().max()) > 1e-2


@torch.no_grad()
def test_a_token_that_sees_no_picture_gets_zeros_from_it() -> None:
    deep, _ = model(IDEFICS)
    x, layout, memory = given()
    pictured, none = deep(x, layout, memory), deep(x, layout)
    assert torch.equal(pictured[:, :2], none[:, :2])
    assert float((pictured[:, 2:] - none[:, 2:]).abs().amax(-1).min()) > 1e-3


LLAMA = replace(IDEFICS, heads=4, kv_heads=2, adjacent=True, blind_mlp=False)


@torch.no_grad()
def test_a_token_that_sees_nothing_may_pass_the_blocks_by() -> None:
    """As if the blocks were not there: those before a picture, and all where there is none."""
    deep, bare = model(LLAMA)
    x, layout, memory = given()
    pictured, plain = deep(x, layout, memory), bare(x, layout)
    assert torch.equal(deep(x, layout), plain)
    torch.testing.assert_close(pictured[:, :2], plain[:, :2], atol=1e-6, rtol=0.0)
    assert float((pictured[:, 2:] - plain[:, 2:]).abs().amax(-1).min()) > 1e-3
    rows = torch.tensor([1, 5, 6, 13])
    torch.testing.assert_close(deep(x, layout, memory, rows=rows), pictured.flatten(0, 1)[rows])


def test_a_bridge_says_whether_pictures_side_by_side_are_one() -> None:
    features = Patches(torch.randn(4, 12), ((1, 2, 2),))
    assert LLAMA.build()(features).adjacent and not IDEFICS.build()(features).adjacent


def test_nobody_learns_from_pictures_that_are_not_seen() -> None:
    deep, _ = model(IDEFICS)
    x, layout, memory = given()
    values = memory.values.detach().requires_grad_()  # type: ignore[union-attr]
    deep(x, replace(layout, item=layout.item.clamp(max=1)), replace(memory, values=values)).square().sum().backward()
    assert values.grad is not None and torch.isfinite(values.grad).all()
    assert values.grad[0, 3:].abs().max() == 0 and values.grad[0, :3].abs().min() > 0


def test_without_a_picture_no_weight_of_seeing_is_touched() -> None:
    deep, _ = model(IDEFICS)
    x, layout, _ = given()
    deep(x, layout).sum().backward()
    touched = {name for name, parameter in deep.named_parameters() if parameter.grad is not None}
    assert not any("cross_attention" in name or "cross_gate1" in name for name in touched)
    assert any("cross_feedforward" in name for name in touched)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_rows_that_are_asked_for_only(gate: str) -> None:
    """Also where the last of the blocks is one of cross-attention."""
    cfg = replace(IDEFICS, gate=gate)
    blocks = [*cfg.build().blocks(replace(DECODER, depth=1)), CrossBlock(cfg)]
    decoder = Decoder(DECODER, blocks).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.3)
    x, layout, memory = given()
    rows = torch.tensor([1, 5, 6, 13])
    torch.testing.assert_close(decoder(x, layout, memory, rows=rows), decoder(x, layout, memory).flatten(0, 1)[rows])


@pytest.mark.parametrize(
    ("start", "interval", "places"), [(None, 2, [1, 3, 5]), (None, 4, [3]), (0, 4, [0, 4]), (0, 1, list(range(6)))]
)
def test_where_blocks_stand(start: int | None, interval: int, places: list[int]) -> None:
    """Before the decoder's blocks 3, 7, 11 (Flamingo) or 0, 4, 8 (IDEFICS)."""
    blocks = CrossAttentionConfig(**SIZES, start=start, interval=interval).build().blocks(DECODER)
    found, own = [], 0
    for block in blocks:
        found += [own] if isinstance(block, CrossBlock) else []
        own += isinstance(block, SelfBlock)
    assert (found, own) == (places, 6)


def test_a_picture_takes_one_token_whatever_its_size() -> None:
    fusion = CrossAttentionConfig(**SIZES).build()
    features = Patches(torch.randn(10, 12), ((1, 2, 2), (1, 2, 3)))
    bridge = fusion(features)
    assert bridge.tokens is None and bridge.memory is features
    assert [fusion.num_tokens(grid) for grid in features.grids] == [1, 1]


def test_what_is_looked_at_may_be_resampled() -> None:
    features = Patches(torch.randn(10, 12), ((1, 2, 2), (1, 2, 3)))
    perceiver = ResamplerConfig(inputs=12, latents=5, depth=1, heads=2, head_dim=6)
    fusion = CrossAttentionConfig(**SIZES, resampler=perceiver).build()
    memory = fusion(features).memory
    assert memory.grids == ((1, 1, 5),) * 2 and torch.equal(memory.values, fusion.resampler(features).tokens)
    wide = CrossAttentionConfig(**SIZES, resampler=ProjectorConfig(inputs=12, width=20)).build()
    assert wide.blocks(DECODER)[3].cross_attention.k.in_features == 20  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"interval": 0}, "at least 1"),
        ({"heads": 3}, "3 heads alike"),
        ({"start": -1}, "at least 0"),
        ({"heads": 4, "kv_heads": 3}, "cannot share 3 heads of keys"),
        ({"adjacent": True, "latest": False}, "looked at together in any case"),
        ({"resampler": ProjectorConfig(inputs=3, width=16)}, "reads features of width 3, expected 12"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        CrossAttentionConfig(**{**SIZES, **settings})


def test_decoders_that_it_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="from block 7 on in a decoder of 6"):
        CrossAttentionConfig(**SIZES, interval=8).build().blocks(DECODER)
    with pytest.raises(ConfigError, match="width 16 in a decoder of 32"):
        CrossAttentionConfig(**SIZES).build().blocks(replace(DECODER, width=32))
