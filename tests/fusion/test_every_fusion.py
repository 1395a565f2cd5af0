"""What must hold of every fusion, whichever it is; a kind that this list lacks is told by its absence."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sightline.core.config import from_dict, to_dict
from sightline.core.layout import causal_layout
from sightline.core.patches import Grid, Patches, join
from sightline.data.batch import Batch
from sightline.data.images import Square
from sightline.encoders.vit import ViTConfig
from sightline.fusion.anyres import AnyResConfig
from sightline.fusion.cross_attention import CrossAttentionConfig
from sightline.fusion.glu import GLUConfig
from sightline.fusion.pooling import LatentPoolConfig, PositionPoolConfig, SizedPoolConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.fusion.qformer import QFormerConfig
from sightline.fusion.resampler import ResamplerConfig
from sightline.fusion.visual_expert import VisualExpertConfig
from sightline.fusion.vocabulary import VocabularyConfig
from sightline.language.decoder import DecoderConfig, SelfBlock
from sightline.language.seq2seq import Seq2SeqConfig
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM, FusionConfig, VLMConfig
from sightline.zoo import own
from sightline.zoo.describe import QUESTION, describe
from sightline.zoo.inputs import left_to_right
from sightline.zoo.prepared import prepared

SIZES: Any = {"inputs": 32, "width": 16}
QFORMER: Any = {**SIZES, "queries": 3, "hidden": 16, "depth": 3, "heads": 2, "mlp": 24}
FUSIONS: dict[str, FusionConfig] = {
    "linear": ProjectorConfig(**SIZES, layers=1),
    "folding": ProjectorConfig(**SIZES, shuffle=2, norm=True),
    "anyres": AnyResConfig(ProjectorConfig(**SIZES)),
    "glu": GLUConfig(**SIZES, hidden=24),
    "convolving glu": GLUConfig(**SIZES, hidden=24, stride=2),
    "perceiver": ResamplerConfig(**SIZES, latents=3, depth=2, heads=2, head_dim=8, frames=3),
    "perceiver with norms": ResamplerConfig(**SIZES, latents=3, depth=1, heads=2, head_dim=8, qk_norm=True),
    "position pool": PositionPoolConfig(**SIZES, heads=2, side=2),
    "latent pool": LatentPoolConfig(**SIZES, heads=2, queries=3),
    "sized pool": SizedPoolConfig(**SIZES, heads=2, queries={16: 3, 48: 5}),
    "qformer": QFormerConfig(**QFORMER),
    "instructed qformer": QFormerConfig(**QFORMER, vocab_size=20, max_length=8),
}
BLOCKS: dict[str, FusionConfig] = {  # those that live inside the decoder
    "cross-attention": CrossAttentionConfig(**SIZES, heads=2, mlp=24, interval=2),
    "cross-attention to latents": CrossAttentionConfig(
        **SIZES, heads=2, mlp=24, interval=2, resampler=ResamplerConfig(inputs=32, latents=3, depth=1, heads=2)
    ),
    "visual expert": VisualExpertConfig(GLUConfig(**SIZES, hidden=24)),
    "visual expert with biases": VisualExpertConfig(GLUConfig(**SIZES, hidden=24), qkv_bias=True),
    "visual expert of projected tokens": VisualExpertConfig(ProjectorConfig(**SIZES)),
}
GRIDS: tuple[Grid, ...] = ((1, 4, 4), (1, 2, 4), (3, 4, 4), (1, 4, 2), (1, 4, 4))
PICTURES: tuple[Grid, ...] = ((1, 4, 4), (1, 2, 4), (1, 4, 2))  # what an encoder of pictures reads
every = pytest.mark.parametrize("name", FUSIONS)
every_and_blocks = pytest.mark.parametrize("name", [*FUSIONS, *BLOCKS])


def large(module: torch.nn.Module) -> Any:
    """The same module with weights so large that everything it reads counts."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.eval()


def vlm(name: str) -> VLMConfig:
    image = ViTConfig(image_size=16, patch_size=4, width=32, depth=1, heads=2, mlp=32)
    return VLMConfig(image, (FUSIONS | BLOCKS)[name], DecoderConfig(vocab_size=30, width=16, depth=2, heads=2, mlp=24))


def inputs(name: str, grids: tuple[Grid, ...], width: int = 32) -> list[tuple[Patches, Tensor | None]]:
    """Each item on its own, with an instruction where the fusion reads one; the second is the shorter."""
    items = [Patches(torch.randn(t * h * w, width), ((t, h, w),)) for t, h, w in grids]
    asked: list[Tensor | None] = [None] * len(items)
    if vlm(name).instruction_length:
        asked = [torch.randint(20, (1, 5)) for _ in items]
        asked[1] = torch.tensor([[4, 7, -1, -1, -1]])
    return list(zip(items, asked, strict=True))


def together(items: list[tuple[Patches, Tensor | None]]) -> tuple[Any, ...]:
    texts = [text for _, text in items if text is not None]
    return (join([patches for patches, _ in items]), *([torch.cat(texts)] if texts else []))


def alone(item: tuple[Patches, Tensor | None]) -> tuple[Any, ...]:
    return tuple(part for part in item if part is not None)


def test_every_kind_is_in_this_list() -> None:
    coded = {VocabularyConfig}  # reads codes, not features: test_vocabulary.py
    assert {type(cfg) for cfg in (FUSIONS | BLOCKS).values()} | coded == set(get_args(FusionConfig))
    kinds = [kind(cfg) for cfg in get_args(FusionConfig)]
    assert len(set(kinds)) == len(kinds)


def kind(cls: type) -> str:
    return str(cls.__dataclass_fields__["kind"].default)  # type: ignore[attr-defined]


@every
@torch.no_grad()
def test_it_makes_as_many_tokens_as_it_counts(name: str) -> None:
    fusion = large(FUSIONS[name].build())
    for item in inputs(name, GRIDS):
        bridge = fusion(*alone(item))
        assert bridge.tokens.shape == (fusion.num_tokens(item[0].grids[0]), 16) and bridge.memory is None


@every
@pytest.mark.parametrize("grids", [((1, 4, 4),) * 3, GRIDS], ids=["one grid", "several grids"])
@torch.no_grad()
def test_items_together_are_items_one_by_one(name: str, grids: tuple[Grid, ...]) -> None:
    fusion = large(FUSIONS[name].build())
    items = inputs(name, grids)
    wanted = torch.cat([fusion(*alone(item)).tokens for item in items])
    torch.testing.assert_close(fusion(*together(items)).tokens, wanted, atol=1e-5, rtol=1e-5)


@every
def test_at_its_random_start_gradients_reach_the_pixels_and_every_parameter(name: str) -> None:
    model = VLM(vlm(name))
    items = inputs(name, PICTURES, width=48)
    for patches, _ in items:
        patches.values.requires_grad_()
    tokens = model.see(*together(items)).tokens
    assert tokens is not None and 1e-3 < tokens.std() < 3
    tokens.square().sum().backward()
    assert all(patches.values.grad is not None and patches.values.grad.abs().max() > 1e-7 for patches, _ in items)
    assert [key for key, p in model.fusion.named_parameters() if p.grad is None] == []


@every
def test_the_decoder_s_blocks_are_left_as_they_are(name: str) -> None:
    cfg = vlm(name)
    assert [type(block) for block in cfg.fusion.build().blocks(cfg.decoder)] == [SelfBlock] * 2


@every_and_blocks
def test_its_settings_survive_as_plain_values(name: str) -> None:
    cfg = vlm(name)
    assert from_dict(VLMConfig, to_dict(cfg)) == cfg


@every_and_blocks
def test_a_saved_model_is_the_same_model(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    model = VLM(vlm(name)).bfloat16().float()  # what is written is rounded
    own.save(model, Tokenizer.from_folder(tiny_folder), own.ProcessorConfig(Square(16)), tmp_path / "saved")
    again = own.load_model(tmp_path / "saved")
    assert again.config == model.config
    wanted, found = model.state_dict(), again.state_dict()
    assert set(found) == set(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)


@every
def test_an_encoder_of_text_reads_its_tokens(name: str) -> None:
    """Pictures of several sizes side by side, padded, as each alone; what is written beside them learns from each."""
    words = Seq2SeqConfig(vocab_size=30, width=16, encoder_depth=1, decoder_depth=1, heads=2, head_dim=8, mlp=24)
    model, items = large(VLM(replace(vlm(name), decoder=words))), inputs(name, PICTURES, width=48)

    def written(given: list[tuple[Patches, Tensor | None]]) -> Tensor:
        counts = torch.tensor([[model.num_tokens(patches.grids[0])] for patches, _ in given])
        place = torch.arange(int(counts.max()) + 2).expand(len(given), -1)
        patches, *asked = together(given)
        slots = (place < counts).flatten().nonzero()[:, 0]
        layout = left_to_right((place < counts + 2).long(), place < counts)
        read = Batch(place % 30, layout, slots, patches, instruction=asked[0] if asked else None)
        start, nothing = torch.zeros(len(given), 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        hidden: Tensor = model(Batch(start, causal_layout(len(given), 1), nothing, source=read))[:, 0]
        return hidden

    with torch.no_grad():
        alone = torch.cat([written([item]) for item in items])
    for patches, _ in items:
        patches.values.requires_grad_()
    found = written(items)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
    found.square().sum().backward()
    assert all(patches.values.grad is not None and bool(patches.values.grad.any()) for patches, _ in items)


@every
@torch.no_grad()
def test_prepared_for_inference_it_gives_the_same(name: str) -> None:
    model = large(VLM(vlm(name)))
    given = together(inputs(name, PICTURES, width=48))
    torch.testing.assert_close(prepared(model).see(*given).tokens, model.see(*given).tokens, atol=1e-4, rtol=1e-4)
    rough = prepared(model, "bf16").see(*given).tokens.float()
    assert torch.isfinite(rough).all()


@every
def test_in_mixed_precision_it_gives_nearly_the_same_and_learns(name: str) -> None:
    fusion = large(FUSIONS[name].build())
    given = together(inputs(name, PICTURES))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = fusion(*given).tokens
    wanted = fusion(*given).tokens
    assert (tokens - wanted).norm() < 0.1 * wanted.norm()
    tokens.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in fusion.parameters())


@every
def test_it_is_described(name: str) -> None:
    cfg = vlm(name)
    told = describe("tiny", cfg)
    station = next(station for station in told.pipeline if station.name == "fusion")
    assert station.note == cfg.fusion.note and station.shape == (told.visual_tokens, 16)
    assert told.parameters["fusion"] == sum(p.numel() for p in cfg.fusion.build().parameters())
    pixels = Patches(torch.randn(16, 48), ((1, 4, 4),))
    asked = [torch.zeros(1, cfg.instruction_length, dtype=torch.int64)] if cfg.instruction_length else []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        VLM(cfg).requires_grad_(False).see(pixels, *asked)
    assert told.flops["to see a picture"] == counter.get_total_flops()


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_inside_the_decoder_is_described(name: str) -> None:
    """Operations are counted as torch counts them, of both kinds of weights and of a memory that is read once."""
    cfg = vlm(name)
    told, model = describe("tiny", cfg), VLM(cfg).requires_grad_(False)
    station = next(station for station in told.pipeline if station.name == "fusion")
    assert station.note == cfg.fusion.note and station.shape[1] in (16, 32)
    count = told.visual_tokens
    assert count == model.num_tokens((1, 4, 4))
    layout = causal_layout(1, count + QUESTION)
    layout = replace(layout, medium=(layout.position < count).long(), item=torch.ones_like(layout.item))
    prompt = Batch(torch.zeros(1, count + QUESTION, dtype=torch.int64), layout, torch.arange(count))
    bridge, cache = model.see(Patches(torch.randn(16, 48), ((1, 4, 4),))), model.new_cache()
    step = Batch(torch.zeros(1, 1, dtype=torch.int64), layout.next(), torch.zeros(0, dtype=torch.int64))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as reading:
            model.logits(model(prompt, cache, bridge)[:, -1:])
        with FlopCounterMode(display=False) as writing:
            model.logits(model(step, cache))
    assert told.flops[f"to read {count + QUESTION} tokens"] == reading.get_total_flops()
    assert told.flops["to write a token"] == writing.get_total_flops()
