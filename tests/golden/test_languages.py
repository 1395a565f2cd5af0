"""Language models without a class in transformers against what their original code has once computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.core.layout import causal_layout
from sightline.language.decoder import Decoder
from sightline.zoo.languages import language
from sightline.zoo.prepared import prepared

FOLDER = Path(__file__).parent / "languages"
QWEN, INTERNLM2 = (json.loads((FOLDER / f"{name}.json").read_text()) for name in ("qwen", "internlm2"))


def weights(golden: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(golden["seed"])
    shapes = golden["shapes"]
    return {
        name: torch.randn(shapes[name], generator=generator) * 0.4 + float("ln_" in name or "norm" in name)
        for name in sorted(shapes)
    }


def built(golden: dict[str, Any]) -> Decoder:
    family = language(golden["config"])
    model = Decoder(family.config(golden["config"])).eval()
    model.load_state_dict(family.keys(model.config).load(weights(golden)))
    return model


@pytest.fixture(scope="module")
def qwen() -> Decoder:
    return built(QWEN)


@pytest.fixture(scope="module")
def internlm2() -> Decoder:
    return built(INTERNLM2)


@pytest.mark.parametrize("case", QWEN["cases"], ids=lambda case: f"{case['prompt']} of {len(case['ids'])}")
@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_qwen_beyond_its_length(qwen: Decoder, case: dict[str, Any], packed: bool) -> None:
    """The base is settled by what is read first, queries grow with every place."""
    compare(prepared(qwen) if packed else qwen, case)


@pytest.mark.parametrize("case", INTERNLM2["cases"], ids=lambda case: f"{case['prompt']} of {len(case['ids'])}")
@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_internlm2_beyond_its_length(internlm2: Decoder, case: dict[str, Any], packed: bool) -> None:
    """The base grows with every token beyond it; what was read before keeps the base it was read with."""
    compare(prepared(internlm2) if packed else internlm2, case)


def compare(model: Decoder, case: dict[str, Any]) -> None:
    """The scores of the last places, a prompt read at once and each further token through the cache."""
    ids, prompt = torch.tensor(case["ids"])[None], case["prompt"]
    layout, cache = causal_layout(*ids.shape), model.new_cache()
    out = [model(model.embed(ids[:, :prompt]), layout.span(0, prompt), cache=cache)]
    for t in range(prompt, ids.shape[1]):
        out.append(model(model.embed(ids[:, t : t + 1]), layout.span(t, t + 1), cache=cache))
    found = model.logits(torch.cat(out, dim=1))[0, case["first"] :, :24]
    torch.testing.assert_close(found, torch.tensor(case["logits"]), atol=1e-4, rtol=0.0)
