"""Every published design, shrunk: whatever its decoder looks at, in a shared row it reads what it reads alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from sightline.core.sequence import Conversation, Image, Message, Text
from sightline.data.batch import collate, pack
from sightline.data.images import Square
from sightline.data.native_resolution import NativeResolution
from sightline.encoders.vit import ViTConfig
from sightline.fusion.cross_attention import CrossAttentionConfig
from sightline.fusion.glu import GLUConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.fusion.visual_expert import VisualExpertConfig
from sightline.language.seq2seq import Seq2SeqConfig
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM, FusionConfig, VLMConfig
from sightline.training.objectives import NextToken
from sightline.zoo.families import ROWS
from sightline.zoo.own import ProcessorConfig

IMAGE = ViTConfig(image_size=16, patch_size=8, width=24, depth=1, heads=2, mlp=32)
ANY_SIZE = replace(IMAGE, temporal_patch_size=2, positions="none", rope_theta=10_000.0)
MLP = ProjectorConfig(inputs=24, width=32)


def small(cfg: VLMConfig) -> VLMConfig:
    """A design with its decoder's ways kept and its sizes small, so that windows and scalings are met."""
    image = IMAGE if cfg.axes is None else ANY_SIZE
    parts: dict[str, Any] = {"fusion": joined(cfg.fusion), "decoder": read(cfg.decoder)}
    return VLMConfig(image, **parts, look=cfg.look, tokens_per_second=cfg.tokens_per_second)


def joined(cfg: Any) -> FusionConfig:
    """What has a part in the decoder with its ways kept; of the others the tokens that they make are alike."""
    if isinstance(cfg, VisualExpertConfig):
        return replace(cfg, adapter=GLUConfig(inputs=24, width=32, hidden=40))
    if not isinstance(cfg, CrossAttentionConfig):
        return MLP
    sizes: dict[str, Any] = {"inputs": 24, "width": 32, "heads": 4, "head_dim": None, "kv_heads": None, "mlp": 48}
    return replace(cfg, **sizes, interval=1, start=0, resampler=cfg.resampler and MLP)


def read(cfg: Any) -> Any:
    """A language model with its ways kept."""
    if isinstance(cfg, Seq2SeqConfig):
        return replace(cfg, vocab_size=300, width=32, encoder_depth=2, decoder_depth=2, heads=4, head_dim=8, mlp=48)
    scores = replace(
        cfg.scores,
        window=cfg.scores.window and 7,
        chunk=cfg.scores.chunk and 6,
        logn=cfg.scores.logn and 5,
        temperature=cfg.scores.temperature and (4, cfg.scores.temperature[1]),
    )
    return replace(
        cfg,
        vocab_size=300,
        width=32,
        depth=max(2, cfg.full_every or 2),
        heads=4,
        kv_heads=2 if cfg.kv_heads and cfg.kv_heads < cfg.heads else None,
        head_dim=8,
        mlp=48,
        scores=scores,
        experts=cfg.experts and replace(cfg.experts, count=4, chosen=min(2, cfg.experts.chosen), mlp=16),
        rope_scaling=cfg.rope_scaling and replace(cfg.rope_scaling, original=12),
        mrope_section=cfg.mrope_section and (2, 1, 1),
        max_length=256,
        extra_vocab=min(cfg.extra_vocab, 4),
        unwritten=(),
    )


def stretches(cfg: VLMConfig) -> bool:
    """Whether it depends on a row's length, so that training refuses to pack it (Qwen-VL, InternLM2)."""
    scaling = getattr(cfg.decoder, "rope_scaling", None)
    return scaling is not None and scaling.by_length


DESIGNS: dict[VLMConfig, str] = {}  # with the first model of each
for row in ROWS.values():
    if not stretches(row.model):
        DESIGNS.setdefault(small(row.model), row.name)


def talk(words: int, *images: Image) -> Conversation:
    """A question about some pictures, with an answer of so many words."""
    question = Message("user", (*images, Text("how many? two where")))
    return (question, Message("assistant", (Text("two where " * words),)))


@pytest.mark.parametrize("design", DESIGNS, ids=DESIGNS.values())
def test_packed_is_separate(design: VLMConfig, tokenizer: Tokenizer) -> None:
    """Scores and the loss."""
    model, generator = VLM(design).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    pixels = Square(16) if design.axes is None else NativeResolution(8, 2, (64, 900), (64, 600))
    processor = ProcessorConfig(pixels, codec=None, max_length=256).build(tokenizer, model)
    noise = [np.random.default_rng(i).integers(0, 255, (16, 24, 3), dtype=np.uint8) for i in range(4)]
    one, two, three, four = (Image(PIL.Image.fromarray(each)) for each in noise)
    examples = [processor(each) for each in (talk(9, one), talk(5), talk(2, two, three), talk(1, four), talk(12))]
    alone = [collate([example], processor.patch, 0) for example in examples]
    together = pack(examples, processor.patch, 0, sum(e.length + e.read.length for e in examples))
    assert together.layout.batch == 1
    with torch.no_grad():
        hidden = model(together)[0]
        order = sorted(range(len(examples)), key=lambda i: -examples[i].read.length)
        for document, i in enumerate(order):
            mine = hidden[together.layout.document[0] == document]
            torch.testing.assert_close(model.logits(mine), model.logits(model(alone[i])[0]), atol=1e-4, rtol=1e-4)
        terms = [next(iter(NextToken()(model, batch).values())) for batch in alone]
        ((total, count),) = NextToken()(model, together).values()
    assert count == sum(count for _, count in terms)
    torch.testing.assert_close(total, torch.stack([total for total, _ in terms]).sum(), atol=1e-3, rtol=1e-5)
