"""Settings of published encoders: their sizes at full scale, and configurations that describe none of them."""

from typing import Any

import pytest

from sightline.core.errors import ConfigError
from sightline.encoders.vit import ViT, ViTConfig
from sightline.zoo import backbones
from sightline.zoo.hollow import hollow


def millions(cfg: ViTConfig) -> float:
    """Parameters of the blocks."""
    with hollow():
        return sum(parameter.numel() for parameter in ViT(cfg).blocks.parameters()) / 1e6


@pytest.mark.parametrize(
    "cfg, published",
    [
        (backbones.vit_22b_config(), 21_743),  # arXiv:2302.05442, table 1
        (backbones.intern_vit_config({}), 5_903),  # arXiv:2312.14238, table 1
    ],
)
def test_blocks_have_the_published_number_of_parameters(cfg: ViTConfig, published: int) -> None:
    assert millions(cfg) == pytest.approx(published, rel=1e-3)


def test_qwen_vl_s_table_of_positions_is_that_of_half_the_side() -> None:
    sizes = {"image_size": 448, "patch_size": 14, "width": 1664, "layers": 48, "heads": 16, "mlp_ratio": 4.9231}
    cfg = backbones.vit_bigg_config(sizes)
    assert (cfg.grid, cfg.position_grid, cfg.mlp) == (32, 16, 8192)


@pytest.mark.parametrize(
    "config, told",
    [
        ({"norm_type": "batch_norm"}, "norm_type 'batch_norm', expected one of layer_norm, rms_norm"),
        ({"use_mean_pooling": False}, "use_mean_pooling or use_absolute_position_embeddings is false"),
        ({"image_size": [448, 224]}, r"a size of \[448, 224\], expected a square"),
    ],
)
def test_an_internvit_of_another_make_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        backbones.internvl_vision_config(config)
