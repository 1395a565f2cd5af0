"""Shikra and Ferret, whole, and Ferret's sampler alone, against what their public code has once computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_weights import drawn
from safetensors.torch import load_file
from torch import Tensor

from sightline.core.patches import Patches
from sightline.grounding.sampler import Regions, RegionSampler, SamplerConfig
from sightline.model import VLM
from sightline.zoo.checkpoint import write
from sightline.zoo.families import FAMILIES
from sightline.zoo.keymap import KeyMap, Reshape, rule
from sightline.zoo.published import Published, load_published

GOLDEN = Path(__file__).parent / "families"
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 7, "model_type": "clip_vision_model"}
TEXT = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"max_position_embeddings": 256, "rms_norm_eps": 1e-6, "mm_vision_tower": "tower", "mm_vision_select_layer": -2}
SAMPLER = {"region_geo_sampler": True, "sampler_pooler_mode": "max", "im_region_fea_token": 119}
MODELS: dict[str, dict[str, Any]] = {
    "shikra": {"model_type": "shikra", **TEXT},
    "ferret": {"model_type": "ferret", **TEXT, **SAMPLER},
}
SIZE = (601, 467)  # of the pictures whose pixels Ferret's regions are
CASES = [("shikra", case) for case in ("words", "picture", "several")]
CASES += [("ferret", case) for case in ("words", "picture", "regions")]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    found = {}
    for name, c in MODELS.items():
        folder, family = tmp_path_factory.mktemp("golden") / name, FAMILIES[name]
        write(folder / "tower", {"unused": torch.zeros(1)}, VISION)
        model = family.build(c, folder)
        assert isinstance(model, VLM)
        write(folder, drawn(family.keys(model.config).save(model.state_dict())), c)
        found[name] = load_published(folder)
    return found


def inputs(case: str, golden: dict[str, Tensor]) -> dict[str, Any]:
    """The published inputs of a case; its pictures are drawn, regions are lists of pixels."""
    ids = golden[f"{case}.ids"]
    given: dict[str, Any] = {"input_ids": ids}
    if case != "words":
        given["images"] = torch.from_numpy(np.random.RandomState(1).standard_normal((len(ids), 3, 28, 28))).float()
    if case == "regions":
        given["region_masks"] = [[mask(golden[f"regions.{row}.{k}"]) for k in range(2)] for row in range(2)]
    return given


def mask(pixels: Tensor) -> Tensor:
    out = torch.zeros(SIZE)
    out[pixels[:, 0].long(), pixels[:, 1].long()] = 1
    return out


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_and_greedy_tokens_are_the_original_s(loaded: dict[str, Published], name: str, case: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    given = inputs(case, golden)
    found = loaded[name].logits(**given)[..., :24]
    torch.testing.assert_close(found, golden[f"{case}.logits"], atol=5e-5, rtol=0.0)
    assert torch.equal(loaded[name].generate_ids(**given, max_new_tokens=10), golden[f"{case}.greedy"])


def test_a_region_elsewhere_is_another_answer(loaded: dict[str, Published]) -> None:
    given = inputs("regions", load_file(GOLDEN / "ferret.safetensors"))
    before = loaded["ferret"].logits(**given)
    given["region_masks"][1][0] = given["region_masks"][1][0].flip(0, 1)
    after = loaded["ferret"].logits(**given)
    assert torch.equal(before[0], after[0])
    assert float((before[1] - after[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("pooling", ["mean", "max"])
@torch.no_grad()
def test_the_sampler_is_the_original_s(pooling: Any) -> None:
    golden = load_file(GOLDEN / "ferret.safetensors")
    sampler = RegionSampler(SamplerConfig(6, 8, 40, (12, 5), (7, 4), pooling)).eval()
    alone = Reshape(lambda x: [x[:, :, 0]], lambda xs: xs[0][:, :, None])
    names = KeyMap(
        (
            rule("diff_projector_list.{i}.{p}", "differ.{i}.{p}"),
            rule("agg_projector_list.{i}.net.0.weight", "gather.{i}.weight", reshape=alone),
            rule("agg_projector_list.{i}.net.0.bias", "gather.{i}.bias"),
            rule("agg_projector_list.{i}.norm.{p}", "norms.{i}.{p}"),
            rule("flatten_projector.{p}", "flatten.{p}"),
            rule("dim_projector.{p}", "project.{p}"),
        )
    )
    sampler.load_state_dict(names.load(drawn(names.save(sampler.state_dict()))))
    features = torch.from_numpy(np.random.RandomState(2).standard_normal((2 * 36, 6))).float()
    points = golden[f"sampler.{pooling}.points"] / torch.tensor([211, 173])
    regions = Regions(torch.arange(3), torch.tensor([0, 1, 1]), points)
    tokens = sampler(Patches(features, ((1, 6, 6),) * 2), regions)
    torch.testing.assert_close(tokens, golden[f"sampler.{pooling}"], atol=1e-5, rtol=0.0)
