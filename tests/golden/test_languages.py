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

QWEN = json.loads((Path(__file__).parent / "languages" / "qwen.json").read_text())


def weights(golden: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(golden["seed"])
    shapes = golden["shapes"]
    return {
        name: torch.randn(shapes[name], generator=generator) * 0.4 + float("ln_" in name) for name in sorted(shapes)
    }


@pytest.fixture(scope="module")
def qwen() -> Decoder:
    family = language(QWEN["config"])
    model = Decoder(family.config(QWEN["config"])).eval()
    model.load_state_dict(family.keys(model.config).load(weights(QWEN)))
    return model


@pytest.mark.parametrize("case", QWEN["cases"], ids=lambda case: f"{case['prompt']} of {len(case['ids'])}")
@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_qwen_beyond_its_length(qwen: Decoder, case: dict[str, Any], packed: bool) -> None:
    """The base is settled by what is read first, queries grow with every place."""
    model = prepared(qwen) if packed else qwen
    ids, prompt = torch.tensor(case["ids"])[None], case["prompt"]
    layout, cache = causal_layout(*ids.shape), model.new_cache()
    out = [model(model.embed(ids[:, :prompt]), layout.span(0, prompt), cache=cache)]
    for t in range(prompt, ids.shape[1]):
        out.append(model(model.embed(ids[:, t : t + 1]), layout.span(t, t + 1), cache=cache))
    found = model.logits(torch.cat(out, dim=1))[0, case["first"] :, :24]
    torch.testing.assert_close(found, torch.tensor(case["logits"]), atol=1e-4, rtol=0.0)
