"""Losses of pairs of answers against what trl makes of the same log-probabilities."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.training.preferring import dpo_loss, kto_loss, orpo_loss
from sightline.training.settings import DPOConfig, KTOConfig

TRL = json.loads((Path(__file__).parent / "preferences" / "trl.json").read_text())
CASES = [(name, case) for name in ("dpo", "ipo", "smoothed") for case in TRL[name]]


def both(name: str = "") -> Tensor:
    """Chosen and rejected in turn."""
    return torch.stack((torch.tensor(TRL[f"{name}chosen"]), torch.tensor(TRL[f"{name}rejected"])), dim=1).flatten()


def lengths() -> Tensor:
    return torch.stack((torch.tensor(TRL["lengths_chosen"]), torch.tensor(TRL["lengths_rejected"])), dim=1).flatten()


@pytest.mark.parametrize("name, case", CASES)
def test_dpo(name: str, case: dict[str, Any]) -> None:
    gain = both() - both("reference_")
    cfg = DPOConfig(
        beta=case["beta"], label_smoothing=case.get("label_smoothing", 0.0), loss="ipo" if name == "ipo" else "sigmoid"
    )
    found = dpo_loss(gain / lengths() if name == "ipo" else gain, cfg)
    torch.testing.assert_close(found, torch.tensor(case["losses"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", TRL["kto"])
def test_kto(case: dict[str, Any]) -> None:
    gain = both() - both("reference_")
    others = torch.tensor(case["others"]) - torch.tensor(case["reference_others"])
    judged = torch.tensor([1, -1] * 6 + [0] * 6)
    cfg = KTOConfig(beta=case["beta"], desirable=case["desirable"], undesirable=case["undesirable"])
    found = kto_loss(torch.cat((gain, others)), judged, cfg)
    wanted = torch.tensor(case["losses"]).view(2, 6).T.flatten()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", TRL["orpo"])
def test_orpo(case: dict[str, Any]) -> None:
    found = case["beta"] * orpo_loss(both() / lengths())
    torch.testing.assert_close(found, torch.tensor(case["losses"]), rtol=1e-5, atol=1e-6)
