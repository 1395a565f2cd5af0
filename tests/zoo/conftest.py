"""Tiny published folders, written through our own key maps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sightline.zoo.checkpoint import write
from sightline.zoo.families import FAMILIES
from sightline.zoo.published import Published, load_published

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **TEXT, "eos_token_id": 2},
    "clip": {"model_type": "clip_vision_model", **VISION},
    "llava": {
        "model_type": "llava",
        "image_token_index": 49,
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "text_config": {"model_type": "llama", **TEXT},
    },
    "paligemma": {
        "model_type": "paligemma",
        "image_token_index": 49,
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "text_config": {"model_type": "gemma", **TEXT},
    },
}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Published]:
    """published(family): a loaded folder of that family with random weights; four tokens are one picture."""
    loaded: dict[str, Published] = {}

    def get(name: str) -> Published:
        if name not in loaded:
            folder, config = tmp_path_factory.mktemp("published") / name, CONFIGS[name]
            family = FAMILIES[config["model_type"]]
            model, generator = family.build(config, folder), torch.Generator().manual_seed(3)
            tensors = {k: torch.randn(v.shape, generator=generator) * 0.3 for k, v in model.state_dict().items()}
            write(folder, family.keys(model.config).save(tensors), config)  # type: ignore[arg-type]
            loaded[name] = load_published(folder)
        return loaded[name]

    return get
