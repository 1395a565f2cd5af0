"""Boxes as continuous numbers: a linear reading of the patch that holds an object's centre."""

import torch
from torch import Tensor, nn

from ..core.geometry import generalized_iou
from ..data.batch import Batch
from .objectives import OnFeatures, Term, exactly
from .settings import BoxesConfig


class Boxes(OnFeatures):
    """Distance of the four numbers and overlap of the boxes, weighed as in DETR (arXiv:2005.12872)."""

    def __init__(self, features: int, cfg: BoxesConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.head = nn.Linear(features, 4)

    def counts(self, batch: Batch) -> dict[str, int]:
        some = int((batch.extra["dense"]["object"] == 1).sum())
        return {"box-l1": some, "box-giou": some}

    def on_features(self, features: Tensor, batch: Batch) -> dict[str, Term]:
        truth = {name: batch.extra["dense"][name].to(features.device).flatten(1, 2) for name in ("object", "box")}
        there = truth["object"] == 1
        found, wanted = corners(exactly(self.head, features[there]).sigmoid()), truth["box"][there]
        count = len(wanted)
        away, overlap = (found - wanted).abs().sum(), generalized_iou(found, wanted)
        return {"box-l1": (self.cfg.l1 * away, count), "box-giou": (self.cfg.giou * (1 - overlap).sum(), count)}


def corners(boxes: Tensor) -> Tensor:
    """Middle, width and height [..., 4] to left, top, right, bottom."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((middle - half, middle + half), dim=-1)
