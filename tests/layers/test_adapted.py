"""Adapted maps: nothing at first, then W + s B A, one row length each for DoRA; and no fast path leaves them out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sightline.language.decoder import Decoder, DecoderConfig
from sightline.layers.adapted import AdaptedLinear, adapted, merge, merged_state
from sightline.layers.linear import together
from sightline.layers.packed import pack
from sightline.zoo.prepared import prepared

SIZES = {"vocab_size": 50, "width": 32, "depth": 2, "heads": 2, "mlp": 48}


def drawn(module: AdaptedLinear) -> AdaptedLinear:
    """The same with an update that is not nothing."""
    with torch.no_grad():
        module.lora_b.normal_(std=0.1)
        if module.magnitude is not None:
            module.magnitude.mul_(torch.rand(len(module.magnitude)) + 0.5)
    return module


def adapted_decoder(dora: bool = False) -> Decoder:
    decoder = Decoder(DecoderConfig(**SIZES))
    for name in (
        "blocks.0.attention.q",
        "blocks.0.attention.o",
        "blocks.1.feedforward.up",
        "blocks.1.feedforward.down",
    ):
        base = decoder.get_submodule(name)
        assert isinstance(base, nn.Linear)
        decoder.set_submodule(name, drawn(AdaptedLinear(base, 3, 6.0, dora)))
    return decoder


def hidden(decoder: Decoder) -> torch.Tensor:
    from sightline.core.layout import causal_layout

    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    out: torch.Tensor = decoder(decoder.embed(ids), causal_layout(2, 7))
    return out


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_begins_as_the_map_that_it_is_beside(dora: bool, bias: bool) -> None:
    base, x = nn.Linear(6, 5, bias=bias), torch.randn(3, 6)
    torch.testing.assert_close(AdaptedLinear(base, 2, 4.0, dora)(x), base(x), atol=1e-6, rtol=0)


def test_the_update_is_what_the_paper_says() -> None:
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    module = drawn(AdaptedLinear(base, rank=2, alpha=8.0))
    wanted = F.linear(x, base.weight + 8 / 2 * module.lora_b @ module.lora_a, base.bias)
    torch.testing.assert_close(module(x), wanted)


def test_each_row_has_the_length_of_its_magnitude_with_dora() -> None:
    module = drawn(AdaptedLinear(nn.Linear(6, 5), 2, 2.0, dora=True))
    assert module.magnitude is not None
    torch.testing.assert_close(module.whole().norm(dim=1), module.magnitude.detach())
    direction = module.weight + module.lora_b @ module.lora_a
    torch.testing.assert_close(F.cosine_similarity(module.whole(), direction, dim=1), torch.ones(5))


def test_dropout_is_for_training_and_for_the_update_only() -> None:
    base, x = nn.Linear(400, 5), torch.randn(2, 400)
    module = drawn(AdaptedLinear(base, 2, 2.0, dropout=0.5))
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    with torch.no_grad():
        module.lora_b.zero_()
    torch.testing.assert_close(module.train()(x), base(x))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_map_merged_is_the_map_adapted(dora: bool, bias: bool) -> None:
    model = nn.Sequential(drawn(AdaptedLinear(nn.Linear(6, 5, bias=bias), 2, 4.0, dora)))
    x = torch.randn(3, 6)
    before = model(x)
    merge(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_is_adapted(dora: bool) -> None:
    decoder = adapted_decoder(dora).eval()
    before = hidden(decoder).detach()
    plain = Decoder(decoder.config).eval()
    plain.load_state_dict(merged_state(decoder))
    torch.testing.assert_close(hidden(plain), before, atol=1e-6 * float(before.abs().max()), rtol=0)
    assert len(adapted(decoder)) == 4
    merge(decoder)
    assert not adapted(decoder)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("dora", [False, True])
@torch.inference_mode()
def test_packing_takes_adapters_along(dora: bool) -> None:
    decoder = adapted_decoder(dora).eval()
    before = hidden(decoder)
    torch.testing.assert_close(hidden(prepared(decoder)), before, atol=1e-5, rtol=0)
    assert len(adapted(decoder)) == 4, "the model itself stays as it was"
    pack(decoder)
    torch.testing.assert_close(hidden(decoder), before, atol=1e-5, rtol=0)


def test_maps_of_one_input_are_joined_only_where_they_are_plain() -> None:
    x, maps = torch.randn(3, 6), [nn.Linear(6, 5), nn.Linear(6, 4)]
    maps[1] = drawn(AdaptedLinear(maps[1], 2, 2.0))
    for found, each in zip(together(x, maps), maps, strict=True):
        torch.testing.assert_close(found, each(x))


def test_bf16_training_measures_rows_in_float32() -> None:
    """At the start every row has the length that its magnitude says, which bf16 products would miss by a percent."""
    base, x = nn.Linear(64, 8), torch.randn(3, 64)
    module = AdaptedLinear(base, 2, 2.0, dora=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module._sum(), base.weight)
        torch.testing.assert_close(module(x), base(x), atol=1e-2, rtol=1e-2)
