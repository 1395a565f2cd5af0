"""Encoders against the outputs of their original code, with weights drawn anew under their published names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sightline.core.patches import patchify
from sightline.encoders.vit import ViT
from sightline.zoo import backbones, encoder_names

GOLDEN = Path(__file__).parent / "encoders" / "encoders.safetensors"

BIGG = {"image_size": 48, "patch_size": 4, "width": 24, "layers": 2, "heads": 3, "mlp_ratio": 4.9231}
SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
INTERN = {**SIZES, "num_attention_heads": 3}
SMALL = {**INTERN, "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}
EVA2 = {**SIZES, "num_heads": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
ENCODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "vit_bigg": (backbones.vit_bigg_config, encoder_names.vit_bigg_keys, BIGG),
    "intern_vit_6b": (backbones.intern_vit_config, encoder_names.intern_vit_keys, INTERN),
    "intern_vit_300m": (backbones.intern_vit_config, encoder_names.intern_vit_keys, SMALL),
    "eva2_clip": (backbones.eva2_clip_config, encoder_names.eva2_clip_keys, EVA2),
}


def drawn(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of these names and shapes from one generator whose numbers no release of numpy changes."""
    numbers = np.random.RandomState(0)
    return {
        name: torch.from_numpy(numbers.standard_normal(tuple(named[name].shape))).float() * 0.3
        for name in sorted(named)
    }


@pytest.mark.parametrize(
    "name, side",
    [
        ("vit_bigg", 12),
        ("vit_bigg", 18),
        ("intern_vit_6b", 4),
        ("intern_vit_6b", 6),
        ("intern_vit_300m", 4),
        ("intern_vit_300m", 6),
        ("eva2_clip", 4),
    ],
)
@torch.no_grad()
def test_features_are_the_original_code_s(name: str, side: int) -> None:
    config, keys, sizes = ENCODERS[name]
    model = ViT(config(sizes)).eval()
    names = keys(model.config)
    model.load_state_dict(names.load(drawn(names.save(model.state_dict()))))
    picture = torch.from_numpy(np.random.RandomState(1).standard_normal((1, 3, side * 4, side * 4))).float()
    found = model(patchify(picture, 4)).dense()
    wanted = load_file(GOLDEN)[f"{name}.{side}"]
    torch.testing.assert_close(found, wanted[:, -(side**2) :], atol=2e-5, rtol=0)
