"""Fusions without a reference in transformers, against values that their public code gave (tests/golden/fusion)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sightline.core.patches import Grid, Patches
from sightline.fusion.bridge import TokenFusion
from sightline.fusion.glu import GLUConfig
from sightline.fusion.pooling import PositionPoolConfig, sine_table
from sightline.fusion.projector import ProjectorConfig
from sightline.fusion.resampler import ResamplerConfig
from sightline.zoo.cogvlm import adapter_keys
from sightline.zoo.internvl import original_projector_keys
from sightline.zoo.keymap import KeyMap
from sightline.zoo.perceivers import flamingo_keys, otter_keys
from sightline.zoo.qwen_vl import pool_keys


@dataclass(frozen=True)
class Case:
    """A module of ours, its map of names, and which inputs of its golden file have which grid and which outputs."""

    file: str
    build: Callable[[], TokenFusion]
    keys: KeyMap
    runs: tuple[tuple[str, Grid, str], ...]


def perceiver(depth: int, frames: int) -> ResamplerConfig:
    return ResamplerConfig(inputs=16, latents=5, depth=depth, heads=2, head_dim=6, frames=frames)


def internvl(order: str) -> Case:
    cfg = ProjectorConfig(inputs=3, width=8, shuffle=2, norm=True, transposed=order == "v1")
    keys = original_projector_keys().under("mlp1.", "")
    return Case("internvl", cfg.build, keys, (("features", (1, 4, 6), f"tokens_{order}"),))


POOL = PositionPoolConfig(inputs=12, width=16, heads=4, side=4)
CASES = {
    "open_flamingo": Case(
        "open_flamingo", perceiver(2, 4).build, flamingo_keys(perceiver(2, 4)), (("video", (3, 2, 3), "tokens"),)
    ),
    "otter": Case("otter", perceiver(1, 3).build, otter_keys(perceiver(1, 3)), (("video", (2, 2, 3), "tokens"),)),
    "qwen_vl": Case(
        "qwen_vl",
        POOL.build,
        pool_keys(),
        tuple((f"features_{side}", (1, side, side), f"tokens_{side}") for side in (3, 4, 6)),
    ),
    "cogvlm": Case(
        "cogvlm", GLUConfig(inputs=12, width=16, hidden=24).build, adapter_keys(), (("features", (1, 2, 3), "tokens"),)
    ),
    "internvl_v1": internvl("v1"),
    "internvl_v2": internvl("v2"),
}


def read(root: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Published weights, then inputs and outputs."""
    found = load_file(root / "tests" / "golden" / "fusion" / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): value for key, value in found.items() if key.startswith("weights.")}
    return weights, found


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_tokens_are_the_original_s(root: Path, name: str) -> None:
    case = CASES[name]
    weights, values = read(root, case.file)
    fusion = case.build().eval()
    fusion.load_state_dict(case.keys.load(weights))
    for given, grid, wanted in case.runs:
        x = values[given]
        tokens = fusion(Patches(x.flatten(0, 1), (grid,) * len(x))).tokens
        torch.testing.assert_close(tokens, values[wanted].flatten(0, 1), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("name", CASES)
def test_names_read_both_ways(root: Path, name: str) -> None:
    case = CASES[name]
    weights, _ = read(root, case.file)
    again = case.keys.save(case.keys.load(weights))
    assert set(again) == set(weights)
    assert all(torch.equal(again[key], weights[key]) for key in weights)


@torch.no_grad()
def test_a_perceiver_without_frames_is_open_flamingo_s(root: Path) -> None:
    weights, values = read(root, "open_flamingo")
    del weights["frame_embs"]
    cfg = perceiver(2, 0)
    fusion = cfg.build()
    fusion.load_state_dict(flamingo_keys(cfg).load(weights))
    tokens = fusion(Patches(values["image"].flatten(0, 1), ((1, 2, 3),) * 2)).tokens
    torch.testing.assert_close(tokens, values["image_tokens"].flatten(0, 1), atol=1e-5, rtol=0.0)


def test_the_table_of_places_is_the_published_one(root: Path) -> None:
    weights, _ = read(root, "qwen_vl")
    torch.testing.assert_close(sine_table(4, 16), weights["attn_pool.pos_embed"], atol=1e-6, rtol=0.0)
