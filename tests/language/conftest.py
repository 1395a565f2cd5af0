"""The three families of decoders, small, with weights none of which is a zero or a one."""

from collections.abc import Callable

import pytest
import torch

from sightline.language.decoder import Decoder, DecoderConfig
from sightline.layers.attention import QKNorm
from sightline.layers.experts import ExpertsConfig
from sightline.layers.rotary import RopeScaling
from sightline.layers.scores import Scores

SIZES = {"vocab_size": 50, "width": 32, "depth": 2, "heads": 4, "mlp": 48}
GEMMA = {"activation": "gelu_tanh", "norm_offset": True, "scale_embedding": True, "tied": True}
LAYER_NORMS = {"norm": "layer", "gated": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True}
FAMILIES = {
    "llama": DecoderConfig(**SIZES),
    "qwen2": DecoderConfig(**SIZES, kv_heads=2, qkv_bias=True, rope_theta=1e6),
    "gemma": DecoderConfig(**SIZES, kv_heads=1, head_dim=16, **GEMMA),
    "gemma2": DecoderConfig(
        **SIZES,
        **GEMMA,
        kv_heads=2,
        scores=Scores(softcap=2.0, window=7, scale=0.3),
        full_every=2,
        norm_at="both",
        logit_softcap=3.0,
    ),
    "opt": DecoderConfig(**SIZES, **LAYER_NORMS, positions="learned", position_offset=2, activation="relu"),
    "magneto": DecoderConfig(
        **SIZES, **LAYER_NORMS, positions="sinusoidal", position_offset=2, inner_norm=True, scale_inputs=True
    ),
    "persimmon": DecoderConfig(**SIZES, **LAYER_NORMS, rotary_fraction=0.5, qk_norm=QKNorm("layer")),
    "chameleon": DecoderConfig(**SIZES, kv_heads=2, qk_norm=QKNorm("layer", own=True), norm_at="after"),
    "mpt": DecoderConfig(
        **SIZES, norm="layer", norm_bias=False, gated=False, positions="none", scores=Scores(alibi=True)
    ),
    "mixtral": DecoderConfig(**SIZES, experts=ExpertsConfig(4, 2, 24), rope_scaling=RopeScaling("linear", 2.0)),
    "llama4": DecoderConfig(
        **SIZES,
        experts=ExpertsConfig(4, 1, 24, shared=24, routing="sigmoid", every=2),
        scores=Scores(chunk=10, temperature=(4, 0.3)),
        full_every=2,
        full_positions=False,
        qk_norm=QKNorm("unit", after_rotary=True),
    ),
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
