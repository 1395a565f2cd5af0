"""The visual expert: CogVLM's own numbers, words without pictures, whose weights learn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sightline.core.errors import ConfigError
from sightline.core.layout import Layout, Medium, causal_layout, framed
from sightline.core.patches import Patches
from sightline.fusion.glu import GLUConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.fusion.visual_expert import ExpertBlock, VisualExpertConfig
from sightline.language.cache import Cache
from sightline.language.decoder import Decoder, DecoderConfig, SelfBlock

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
COGVLM = DecoderConfig(vocab_size=30, width=24, depth=1, heads=3, mlp=20, eps=1e-5)
DECODER = DecoderConfig(vocab_size=30, width=16, depth=3, heads=4, kv_heads=2, mlp=24, qkv_bias=True)


@pytest.fixture(scope="module")
def golden(root: Path) -> dict[str, Tensor]:
    return load_file(root / "tests/golden/blocks/cogvlm_block.safetensors")


@pytest.fixture(scope="module")
def block(golden: dict[str, Tensor]) -> ExpertBlock:
    """A block of the published weights, by the published names."""
    made, ours = ExpertBlock(COGVLM), {}
    for key, value in golden.items():
        if not key.startswith("weights.") or key.endswith("inv_freq"):
            continue
        key = key.removeprefix("weights.")
        root = "vision." if "vision" in key else "attention." if "self_attn" in key else ""
        if "query_key_value" in key:
            ours |= {f"{root}{x}.weight": part for x, part in zip("qkv", value.chunk(3), strict=True)}
        elif "expert_dense" in key:
            ours[f"{root}o.weight"] = value
        elif key.startswith("mlp."):
            ours[f"{root}feedforward.{key.split('.')[2].removesuffix('_proj')}.weight"] = value
        else:
            ours["norm1.weight" if key.startswith("input") else "norm2.weight"] = value
    made.load_state_dict(ours)
    return made.eval()


def cogvlm_layout(kinds: Tensor) -> Layout:
    """A layout of rows of one picture each, whose tokens have kind 1, its frame included."""
    slots = kinds.flatten().nonzero()[:, 0]
    still, last = framed(slots, kinds.sum(1).tolist())
    moves = torch.ones_like(kinds).flatten().index_fill(0, still, 0).view_as(kinds)
    medium = kinds.flatten().index_fill(0, last, Medium.TEXT).view_as(kinds)
    return replace(causal_layout(*kinds.shape), position=moves.cumsum(1) - 1, medium=medium)


@torch.no_grad()
def test_cogvlm_s_own_block(golden: dict[str, Tensor], block: ExpertBlock) -> None:
    layout, decoder, cache = cogvlm_layout(golden["kinds"]), Decoder(COGVLM), Cache(1)
    assert torch.equal(layout.position, golden["positions"])  # boi, all patches and eoi have three positions
    assert torch.equal(layout.medium.bool(), golden["vision"])  # eoi is read by the language's weights
    context = decoder.context(layout, cache.read(layout), None, torch.float32)
    found = block(golden["x"], context, cache.layers[0])
    torch.testing.assert_close(found, golden["out"], **CLOSE)
    rows = torch.tensor([0, 3, 8, 14, 21])
    torch.testing.assert_close(
        block(golden["x"], replace(context, rows=rows)), golden["out"].flatten(0, 1)[rows], **CLOSE
    )
    step = layout.next()
    context = decoder.context(step, cache.read(step), None, torch.float32)
    torch.testing.assert_close(block(golden["step"], context, cache.layers[0]), golden["after"], **CLOSE)


@torch.no_grad()
def test_cogvlm_s_own_block_on_words(golden: dict[str, Tensor], block: ExpertBlock) -> None:
    layout = causal_layout(2, 11)
    context = Decoder(COGVLM).context(layout, layout, None, torch.float32)
    torch.testing.assert_close(block(golden["x"], context), golden["words"], **CLOSE)


def model(cfg: DecoderConfig = DECODER) -> Decoder:
    made = Decoder(cfg, VisualExpertConfig(ProjectorConfig(inputs=12, width=16)).build().blocks(cfg)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def mixed(length: int = 8) -> tuple[Tensor, Layout]:
    layout = causal_layout(2, length)
    medium = torch.zeros(2, length, dtype=torch.int64)
    medium[0, 1:4] = medium[1, 2:7] = Medium.IMAGE
    return torch.randn(2, length, 16), replace(layout, medium=medium)


@torch.no_grad()
def test_words_alone_are_read_by_the_bare_decoder() -> None:
    deep, bare = model(), Decoder(DECODER).eval()
    bare.load_state_dict({key: value for key, value in deep.state_dict().items() if ".vision." not in key})
    x, layout = mixed()
    assert torch.equal(deep(x, causal_layout(2, 8)), bare(x, causal_layout(2, 8)))
    assert float((deep(x, layout) - bare(x, layout)).abs().max()) > 1e-2


@pytest.mark.parametrize(("medium", "learn"), [(Medium.TEXT, ""), (Medium.IMAGE, "vision")])
def test_weights_that_no_token_takes_learn_nothing(medium: Medium, learn: str) -> None:
    deep = model()
    x, layout = mixed()
    deep(x, replace(layout, medium=torch.full_like(layout.medium, medium))).sum().backward()
    maps = {name: p.grad for name, p in deep.blocks.named_parameters() if "norm" not in name}
    assert all((grad is not None) == ((".vision." in name) == bool(learn)) for name, grad in maps.items())


def test_gradients_are_those_of_one_token_at_a_time() -> None:
    """Both sets of weights at once, in order: against a block that is computed once for each kind and chosen from."""
    block = model().blocks[0]
    assert isinstance(block, ExpertBlock)
    x, layout = mixed()
    x.requires_grad_()
    context = Decoder(DECODER).context(layout, layout, None, torch.float32)
    found = block(x, context)
    picture = layout.medium[..., None].bool()
    a, e = block.attention, block.vision

    def either(h: Tensor, name: str) -> Tensor:
        return torch.where(picture, getattr(e, name)(h), getattr(a, name)(h))

    from sightline.layers.rotary import rotate

    h = block.norm1(x)
    q, k, v = (either(h, name).unflatten(-1, (-1, 4)).transpose(1, 2) for name in "qkv")
    q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)  # type: ignore[misc]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    y = x + either(out.transpose(1, 2).flatten(2), "o")
    wanted = y + torch.where(picture, e.feedforward(block.norm2(y)), block.feedforward(block.norm2(y)))
    torch.testing.assert_close(found, wanted, **CLOSE)
    weight = torch.randn_like(found)
    names, parameters = zip(*block.named_parameters(), strict=True)
    one = torch.autograd.grad((found * weight).sum(), [x, *parameters], retain_graph=True)
    two = torch.autograd.grad((wanted * weight).sum(), [x, *parameters])
    for name, g, w in zip(("x", *names), one, two, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_its_tokens_are_the_adapter_s() -> None:
    fusion = VisualExpertConfig(GLUConfig(inputs=12, width=16, hidden=20)).build()
    features = Patches(torch.randn(10, 12), ((1, 2, 2), (1, 2, 3)))
    assert torch.equal(fusion(features).tokens, fusion.adapter(features).tokens)
    assert fusion.num_tokens((1, 2, 3)) == 8


def test_settings_that_its_blocks_do_not_follow_are_refused() -> None:
    with pytest.raises(ConfigError, match="qk_norm = True in a decoder with a visual expert"):
        ExpertBlock(replace(DECODER, qk_norm=True))


def test_kernels_for_plain_blocks_leave_it_alone() -> None:
    from sightline.language.stepper import _plain

    wide: Any = {"vocab_size": 30, "width": 32, "depth": 1, "heads": 2, "mlp": 32}
    assert not _plain(ExpertBlock(DecoderConfig(**wide)))
    assert _plain(SelfBlock(DecoderConfig(**wide)))
