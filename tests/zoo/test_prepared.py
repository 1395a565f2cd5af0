"""A model as it is run writes what the model itself writes, in every precision, with the kernels and without."""

from typing import Any

import pytest
import torch

from sightline.core.config import from_dict
from sightline.core.errors import ConfigError
from sightline.core.layout import Layout, causal_layout
from sightline.core.patches import patchify
from sightline.encoders.vit import ViT, ViTConfig
from sightline.language.decoder import Decoder, DecoderConfig
from sightline.layers import native
from sightline.layers.attention import QKNorm
from sightline.layers.experts import ExpertsConfig
from sightline.layers.packed import PackedLinear
from sightline.layers.rotary import RopeScaling
from sightline.layers.scores import Scores
from sightline.zoo.prepared import prepared

SETTINGS = {
    "llama": {"kv_heads": 2},
    "qwen2": {"qkv_bias": True, "tied": True},
    "gemma": {"norm_offset": True, "activation": "gelu_tanh", "scale_embedding": True, "tied": True, "kv_heads": 1},
}
MOST = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.04}


def decoder(family: str) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "width": 64, "depth": 3, "heads": 4, "mlp": 96, "max_length": 64}
    model = Decoder(from_dict(DecoderConfig, sizes | SETTINGS[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


@pytest.fixture(params=["kernels", "torch alone"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Once with the built kernels even for tiny models, once as on a machine without a compiler."""
    wanted = request.param == "kernels"
    if wanted and native.library() is None:
        pytest.skip("no compiler on this machine")
    monkeypatch.setattr(native, "WORTH", 0 if wanted else 1 << 60)
    return wanted


def written(model: Decoder, ids: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Logits of a prompt's last token and of each next one read through the cache."""
    cache = model.new_cache()
    out = []
    with torch.inference_mode():
        last = torch.arange(8, 9 * len(ids), 9)
        out.append(model.logits(model(model.embed(ids[:, :9]), layout.span(0, 9), None, cache, last)))
        for t in range(9, ids.shape[1]):
            hidden = model(model.embed(ids[:, t : t + 1]), layout.span(t, t + 1), None, cache)
            out.append(model.logits(hidden[:, -1]))
    return torch.stack(out, 1)


@pytest.mark.parametrize("precision", MOST)
@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("batch", [1, 5])
def test_logits_are_those_of_the_model(family: str, batch: int, precision: str, kernels: bool) -> None:
    model, ids = decoder(family), torch.randint(0, 64, (batch, 16))
    layout = causal_layout(batch, 16)
    with torch.inference_mode():
        wanted = model.logits(model(model.embed(ids), layout))[:, 8:]
    twin = prepared(model, precision)  # type: ignore[arg-type]
    assert (twin.stepper is not None) == kernels
    found = written(twin, ids, layout)
    assert float((found - wanted).norm() / wanted.norm()) < MOST[precision]


def test_rows_padded_on_the_left(kernels: bool) -> None:
    """Rows of unlike length: what lies before a row's beginning is never looked at."""
    model = decoder("llama")
    ids = torch.randint(0, 64, (2, 16))
    document = torch.zeros(2, 16, dtype=torch.long)
    document[0, :5] = -1
    counted = torch.arange(16).expand(2, -1)
    position = torch.stack([(counted[0] - 5).clamp(min=0), counted[1]])
    zero = torch.zeros_like(document)
    layout = Layout(document, counted, position, zero, zero, zero)
    twin = prepared(model)
    found = written(twin, ids, layout)
    alone = written(twin, ids[1:], causal_layout(1, 16))
    assert torch.allclose(found[1:], alone, atol=1e-5)
    with torch.inference_mode():
        short = model.logits(model(model.embed(ids[:1, 5:]), causal_layout(1, 11)))
    assert torch.allclose(found[0, 1:], short[0, 4:], atol=1e-4)


def test_normalised_queries_and_keys_are_left_to_torch(kernels: bool) -> None:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab_size=64, width=64, depth=2, heads=4, mlp=96, qk_norm=True)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    ids, layout = torch.randint(0, 64, (3, 16)), causal_layout(3, 16)
    with torch.inference_mode():
        wanted = model.logits(model(model.embed(ids), layout))[:, 8:]
    twin = prepared(model)
    assert twin.stepper is None
    assert torch.allclose(written(twin, ids, layout), wanted, atol=1e-4)


UNKNOWN = {
    "softcap": {"scores": Scores(softcap=2.0)},
    "window": {"scores": Scores(window=5)},
    "alibi": {"scores": Scores(alibi=True), "positions": "none"},
    "scale": {"scores": Scores(scale=0.4)},
    "sandwich": {"norm_at": "both"},
    "after": {"norm_at": "after"},
    "layer norm": {"norm": "layer"},
    "plain": {"gated": False, "mlp_bias": True, "norm": "layer"},
    "inner norm": {"gated": False, "inner_norm": True},
    "partly turned": {"rotary_fraction": 0.5},
    "learned": {"positions": "learned"},
    "sinusoidal": {"positions": "sinusoidal", "position_offset": 2},
    "none": {"full_every": 2, "full_positions": False},
    "experts": {"experts": ExpertsConfig(4, 2, 32, shared=32)},
    "unit": {"qk_norm": QKNorm("unit", after_rotary=True)},
}
KNOWN = {
    "capped": {"logit_softcap": 2.0},
    "scaled inputs": {"scale_inputs": True},
    "biases": {"mlp_bias": True, "qkv_bias": True, "out_bias": True},
    "linear": {"rope_scaling": RopeScaling("linear", 3.0)},
    "dynamic": {"rope_scaling": RopeScaling("dynamic", 3.0, original=4)},
}


@pytest.mark.parametrize("name", [*UNKNOWN, *KNOWN])
@pytest.mark.parametrize("batch", [1, 3])
def test_what_the_kernels_do_not_know_is_left_to_torch(name: str, batch: int, kernels: bool) -> None:
    sizes = {"vocab_size": 64, "width": 64, "depth": 2, "heads": 4, "mlp": 96, "max_length": 64}
    model = Decoder(DecoderConfig(**sizes, **(UNKNOWN | KNOWN)[name])).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    ids, layout = torch.randint(0, 64, (batch, 16)), causal_layout(batch, 16)
    twin = prepared(model)
    assert (twin.stepper is not None) == (kernels and name in KNOWN)
    torch.testing.assert_close(written(twin, ids, layout), written(model, ids, layout), atol=1e-4, rtol=1e-4)


def test_the_model_itself_stays_as_it_was() -> None:
    model = decoder("llama")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    twin = prepared(model)
    after = model.state_dict()
    for name, (place, old) in before.items():
        assert after[name].data_ptr() == place and torch.equal(after[name], old)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(isinstance(module, PackedLinear) for module in twin.modules())


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"])
def test_encoders(activation: str) -> None:
    torch.manual_seed(0)
    cfg = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp=64, activation=activation)
    model = ViT(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    patches = patchify(torch.randn(2, 3, 32, 32), 8)
    with torch.inference_mode():
        assert torch.allclose(prepared(model)(patches).values, model(patches).values, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"norm": "rms", "qk_norm": "width", "qkv_bias": False, "class_token": True, "keep_prefix": True},
        {"norm": "rms", "qk_norm": "head", "qkv_bias": False, "residual": "parallel"},
        {"residual": "res-post-norm", "layer": (-1, -2), "position_grid": 3},
        {"rope_theta": 100.0, "class_token": True, "pre_norm": True},
    ],
)
def test_settings_of_encoders(settings: dict[str, Any], kernels: bool) -> None:
    cfg = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp=64, **settings)
    model = ViT(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    patches = patchify(torch.randn(2, 3, 32, 32), 8)
    with torch.inference_mode():
        found, wanted = prepared(model)(patches), model(patches)
    assert found.grids == wanted.grids
    assert torch.allclose(found.values, wanted.values, atol=2e-5)


def test_an_unknown_precision_is_told() -> None:
    with pytest.raises(ConfigError, match="unknown precision 'fp8', expected one of fp32, bf16, int8"):
        prepared(decoder("llama"), "fp8")  # type: ignore[arg-type]
