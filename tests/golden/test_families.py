"""Whole families without a class in transformers against what their public code has once computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_weights import drawn
from safetensors.torch import load_file
from torch import Tensor

from sightline.model import VLM
from sightline.zoo import cogvlm, qwen_vl
from sightline.zoo.checkpoint import write
from sightline.zoo.published import Published, load_published

GOLDEN = Path(__file__).parent / "families"
QWEN: dict[str, Any] = {
    "model_type": "qwen", "vocab_size": 320, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "kv_channels": 64, "intermediate_size": 96, "seq_length": 24, "max_position_embeddings": 128,
}  # fmt: skip
QWEN["visual"] = {
    "image_size": 48, "patch_size": 4, "width": 24, "layers": 2, "heads": 3, "mlp_ratio": 4.9231, "output_dim": 256,
    "n_queries": 16, "image_start_id": 300,
}  # fmt: skip
COGVLM: dict[str, Any] = {
    "architectures": ["CogVLMForCausalLM"], "vocab_size": 120, "hidden_size": 48, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}  # fmt: skip
COGVLM["vision_config"] = {
    "dropout_prob": 0.0, "hidden_act": "gelu", "in_channels": 3, "num_hidden_layers": 2, "hidden_size": 32,
    "patch_size": 4, "num_heads": 4, "intermediate_size": 40, "layer_norm_eps": 1e-6, "num_positions": 17,
    "image_size": 16,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen_vl": (qwen_vl, QWEN),
    "cogvlm": (cogvlm, COGVLM),
    "cogvlm2": (cogvlm, {**COGVLM, "num_multi_query_heads": 2}),
}
CASES = {"qwen_vl": ("words", "picture", "several"), "cogvlm": ("words", "picture", "padded")}
CASES["cogvlm2"] = CASES["cogvlm"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    found = {}
    for name, (family, c) in FAMILIES.items():
        config = family.config(c)
        tensors = drawn(family.keys(config).save(VLM(config).state_dict()))
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)} if family is cogvlm else {}
        folder = tmp_path_factory.mktemp("golden") / name
        write(folder, tensors | extra, c)
        found[name] = load_published(folder)
    return found


def inputs(name: str, case: str, golden: dict[str, Tensor]) -> dict[str, Any]:
    """The published inputs of a case; its pictures are drawn."""
    ids = golden[f"{case}.ids"]
    count = int((ids == 300).sum()) if name == "qwen_vl" else len(ids) * (case != "words")
    side = FAMILIES[name][1]["vision_config" if "cogvlm" in name else "visual"]["image_size"]
    pixels = torch.from_numpy(np.random.RandomState(1).standard_normal((count, 3, side, side))).float()
    if name == "qwen_vl":
        return {"input_ids": ids} | ({"pixel_values": pixels} if count else {})
    types = {"token_type_ids": golden[f"{case}.types"], "attention_mask": golden[f"{case}.mask"]}
    return {"input_ids": ids, **types} | ({"images": [[x] for x in pixels]} if count else {})


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in FAMILIES for case in CASES[name]])
def test_logits_and_greedy_tokens_are_the_original_s(loaded: dict[str, Published], name: str, case: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    given = inputs(name, case, golden)
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    found = loaded[name].logits(**given)[..., :24]
    torch.testing.assert_close(found[real], golden[f"{case}.logits"][real], atol=5e-5, rtol=0.0)
    assert torch.equal(loaded[name].generate_ids(**given, max_new_tokens=10), golden[f"{case}.greedy"])
