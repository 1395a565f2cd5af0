"""The three families of decoders, small, with weights none of which is a zero or a one."""

from collections.abc import Callable

import pytest
import torch

from sightline.language.decoder import Decoder, DecoderConfig

SIZES = {"vocab_size": 50, "width": 32, "depth": 2, "heads": 4, "mlp": 48}
GEMMA = {"activation": "gelu_tanh", "norm_offset": True, "scale_embedding": True, "tied": True}
FAMILIES = {
    "llama": DecoderConfig(**SIZES),
    "qwen2": DecoderConfig(**SIZES, kv_heads=2, qkv_bias=True, rope_theta=1e6),
    "gemma": DecoderConfig(**SIZES, kv_heads=1, head_dim=16, **GEMMA),
}


@pytest.fixture(scope="session")
def build() -> Callable[[DecoderConfig], Decoder]:
    """A decoder of these settings whose every parameter is drawn anew."""

    def make(cfg: DecoderConfig) -> Decoder:
        made, generator = Decoder(cfg).eval(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return made

    return make


@pytest.fixture(params=FAMILIES)
def decoder(request: pytest.FixtureRequest, build: Callable[[DecoderConfig], Decoder]) -> Decoder:
    """Each family in turn."""
    return build(FAMILIES[request.param])
