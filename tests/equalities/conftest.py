"""Tiny vision-language models with random weights and the processor that writes for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from sightline.core.sequence import Conversation, Image, ask
from sightline.data.batch import Batch, Example, collate
from sightline.data.images import Square
from sightline.data.processor import Processor
from sightline.data.template import End, Segment, Writer
from sightline.encoders.vit import ViTConfig
from sightline.fusion.anyres import AnyResConfig
from sightline.fusion.cross_attention import CrossAttentionConfig
from sightline.fusion.glu import GLUConfig
from sightline.fusion.pooling import LatentPoolConfig, PositionPoolConfig, SizedPoolConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.fusion.qformer import QFormerConfig
from sightline.fusion.resampler import ResamplerConfig
from sightline.fusion.visual_expert import VisualExpertConfig
from sightline.language.decoder import DecoderConfig
from sightline.language.tokenizer import Tokenizer, train_tokenizer
from sightline.model import VLM, FusionConfig, VLMConfig
from sightline.zoo.own import ProcessorConfig

CONTROLS = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>")
SETTINGS = ProcessorConfig(Square(32), codec=None, max_length=256)
SIZES: Any = {"inputs": 24, "width": 32}
CROSS: Any = {**SIZES, "heads": 4, "mlp": 48}
QFORMER: Any = {**SIZES, "queries": 3, "hidden": 16, "depth": 2, "heads": 2, "mlp": 24}
FUSIONS: dict[str, FusionConfig] = {
    "linear": ProjectorConfig(**SIZES, layers=1),
    "mlp": ProjectorConfig(**SIZES),
    "anyres": AnyResConfig(ProjectorConfig(**SIZES)),
    "glu": GLUConfig(**SIZES, hidden=24),
    "qformer": QFormerConfig(**QFORMER),
    "asked qformer": QFormerConfig(**QFORMER, vocab_size=300, max_length=40),
    "perceiver": ResamplerConfig(**SIZES, latents=3, depth=2, heads=2, head_dim=8),
    "position pool": PositionPoolConfig(**SIZES, heads=2, side=2),
    "latent pool": LatentPoolConfig(**SIZES, heads=2, queries=3),
    "sized pool": SizedPoolConfig(**SIZES, heads=2, queries={16: 5}),
    "causal": ProjectorConfig(inputs=24, width=32, shuffle=2),
    "prefix": ProjectorConfig(inputs=24, width=32, shuffle=2),
    "flamingo": CrossAttentionConfig(
        **CROSS, interval=2, resampler=ResamplerConfig(inputs=24, latents=5, depth=1, heads=2, head_dim=8)
    ),
    "idefics": CrossAttentionConfig(
        **CROSS, start=0, interval=1, latest=False, norm="rms", qk_norm=True, gate="vector", gated_mlp=True
    ),
    "expert": VisualExpertConfig(GLUConfig(inputs=24, width=32, hidden=40)),
}


def in_place(conversation: Conversation) -> list[Segment]:
    """A form of conversation that moves nothing."""
    out = Writer()
    out.control("<bos>")
    for message in conversation:
        out.control(f"<{message.role}>")
        out.parts(message, learned=message.role == "assistant")
        if message.role == "assistant":
            out.segments.append(End("<eos>"))
    return out.segments


@dataclass(frozen=True)
class Tiny:
    """A model, its tokenizer, and shorthands for what every equality does."""

    model: VLM
    tokenizer: Tokenizer

    @property
    def pad(self) -> int:
        return self.tokenizer.control("<pad>")

    @property
    def settings(self) -> ProcessorConfig:
        return SETTINGS

    @property
    def processor(self) -> Processor:
        return SETTINGS.build(self.tokenizer, self.model)

    def pictures(self, count: int, seed: int = 0) -> tuple[Image, ...]:
        """Noise, another for every seed."""
        noise = [np.random.default_rng(seed + i).integers(0, 255, (32, 32, 3), dtype=np.uint8) for i in range(count)]
        return tuple(Image(PIL.Image.fromarray(each)) for each in noise)

    def in_place(self, conversation: Conversation) -> Example:
        """A conversation whose pictures stay where they stand among its words."""
        processor = self.processor
        processor.template = in_place
        return processor(conversation)

    def question(self, images: int, words: str = "how many?", answer: str | None = "two", seed: int = 0) -> Example:
        """One question about some pictures, with its answer or without."""
        return self.processor(ask(words, *self.pictures(images, seed), answer=answer))

    def batch(self, *examples: Example, side: str = "right") -> Batch:
        return collate(examples, 8, self.pad, side)  # type: ignore[arg-type]

    def hidden(self, *examples: Example) -> list[Tensor]:
        """Hidden states [length, width] of each example, read alone."""
        return [self.model(self.batch(example))[0] for example in examples]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["how many? two where"] * 30, 300, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")


@pytest.fixture(scope="session")
def build(tokenizer: Tokenizer) -> Callable[[str], Tiny]:
    """A model that looks that way; a picture is 16 patches, and 4 tokens if it is projected.

    Its weights are exact in bfloat16.
    """

    def make(name: str) -> Tiny:
        config = VLMConfig(
            image=ViTConfig(image_size=32, patch_size=8, width=24, depth=2, heads=2, mlp=32, stem=(8,)),
            fusion=FUSIONS[name],
            decoder=DecoderConfig(
                vocab_size=tokenizer.vocab_size, width=32, depth=2, heads=4, kv_heads=2, mlp=48, max_length=256
            ),
            look="prefix" if name == "prefix" else "causal",
        )
        model, generator = VLM(config).eval(), torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.4).bfloat16())
        return Tiny(model, tokenizer)

    return make


@pytest.fixture(scope="session")
def fusions() -> dict[str, FusionConfig]:
    """All of them, by the names of the models that have them."""
    return FUSIONS


@pytest.fixture(params=FUSIONS)
def tiny(request: pytest.FixtureRequest, build: Callable[[str], Tiny]) -> Tiny:
    """A model of each way to look in turn."""
    return build(request.param)
