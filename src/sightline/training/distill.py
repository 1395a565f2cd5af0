"""Self-distillation without labels: a student sees crops and says what its own slow copy says of others (DINO)."""

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.patches import Patches, patchify, unpatchify
from ..data.batch import Batch
from ..encoders.vit import ViT
from ..model import VLM
from . import distributed
from .objectives import Objective, Term
from .settings import DINOConfig

GLOBAL, LOCAL = (0.4, 1.0), (0.05, 0.4)  # shares of the picture that crops take
JITTER = 0.2  # how much brighter, darker, or richer in contrast a crop becomes at most


class Prototypes(nn.Module):
    """Mean-pooled features to scores of prototypes, by a bottleneck of length one."""

    def __init__(self, features: int, cfg: DINOConfig) -> None:
        super().__init__()
        width = 4 * features
        self.layers = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, cfg.bottleneck))
        self.prototypes = nn.Parameter(torch.randn(cfg.prototypes, cfg.bottleneck))

    def forward(self, features: Patches) -> Tensor:
        narrow = self.layers(features.dense().mean(1))
        with torch.autocast(narrow.device.type, enabled=False):  # cosines near one, as in `siglip_loss`
            return F.normalize(narrow.float(), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


class DINO(Objective):
    """Cross-entropy between teacher and student over all pairs of different crops, the teacher's being global ones.

    The teacher is a moving average of the student, made at each step's beginning; its answers are centred, by a moving
    average too, and sharpened, without which all pictures would become alike. Teacher and centre are in the training
    state.
    """

    def __init__(self, encoder: ViT, cfg: DINOConfig) -> None:
        super().__init__()
        self.cfg, self.patch = cfg, encoder.config.patch_size
        self.head = Prototypes(encoder.config.features, cfg)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.center: Tensor
        self.register_buffer("center", torch.zeros(cfg.prototypes))

    @torch.no_grad()
    def prepare(self, model: VLM, micro: list[Batch], key: str) -> list[Batch]:
        self.follow(model.encoder)
        made, every = [], []
        for batch in micro:
            assert batch.patches is not None
            views = self.views(batch.patches)
            said = torch.stack([self.teacher_head(self.teacher(view)) for view in views[:2]])
            target = ((said - self.center) / self.cfg.teacher_temperature).softmax(-1)
            every.append(said.flatten(0, 1))
            made.append(replace(batch, extra=batch.extra | {"views": views, "target": target}))
        answers = torch.cat(every)
        count = distributed.summed(torch.tensor(len(answers)))
        self.center.lerp_(distributed.summed(answers.sum(0)) / count, 1 - self.cfg.center_momentum)
        return made

    def follow(self, encoder: nn.Module) -> None:
        """Move the teacher a little towards the student."""
        for slow, fast in ((self.teacher, encoder), (self.teacher_head, self.head)):
            for mine, new in zip(slow.parameters(), fast.parameters(), strict=True):
                mine.lerp_(new, 1 - self.cfg.momentum)

    def views(self, patches: Patches) -> list[Patches]:
        """Two global crops of every picture at its own size, then local ones at half of it."""
        pictures = unpatchify(patches, self.patch)
        half = max(self.patch, pictures.shape[-1] // 2 // self.patch * self.patch)
        crops = [crop(pictures, GLOBAL, pictures.shape[-1]) for _ in range(2)]
        crops += [crop(pictures, LOCAL, half) for _ in range(self.cfg.local_crops)]
        return [patchify(each, self.patch) for each in crops]

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"dino": batch.extra["target"].shape[1]}

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        target = batch.extra["target"]
        said = [self.head(model.encoder(view)) for view in batch.extra["views"]]
        return {"dino": dino_loss(torch.stack(said), target, self.cfg.student_temperature)}


def dino_loss(student: Tensor, target: Tensor, temperature: float) -> Term:
    """Mean over pairs of crops, summed over n pictures, and n.

    student: scores [crops, n, prototypes]; target: the teacher's probabilities [2, n, prototypes] of the first two.
    """
    scores = (student / temperature).log_softmax(-1)
    pairs = -(target[:, None] * scores).sum(-1)
    other = 1 - torch.eye(*pairs.shape[:2], device=pairs.device)
    return (pairs * other[..., None]).sum() / other.sum(), student.shape[1]


def crop(pictures: Tensor, share: tuple[float, float], side: int) -> Tensor:
    """A random window of each picture [n, 3, height, width] at a size of its own, turned over and lit by chance."""
    n = len(pictures)
    low, high = share
    part = (low + (high - low) * torch.rand(n, device=pictures.device)).sqrt()
    ratio = torch.exp(math.log(4 / 3) * (2 * torch.rand(n, device=pictures.device) - 1)).sqrt()
    wide, tall = (part * ratio).clamp(max=1), (part / ratio).clamp(max=1)
    theta = torch.zeros(n, 2, 3, device=pictures.device)
    theta[:, 0, 0] = wide * (2 * (torch.rand(n, device=pictures.device) < 0.5).float() - 1)
    theta[:, 1, 1] = tall
    theta[:, 0, 2] = (1 - wide) * (2 * torch.rand(n, device=pictures.device) - 1)
    theta[:, 1, 2] = (1 - tall) * (2 * torch.rand(n, device=pictures.device) - 1)
    with torch.autocast(pictures.device.type, enabled=False):
        grid = F.affine_grid(theta, [n, pictures.shape[1], side, side], align_corners=False)
        seen = F.grid_sample(pictures.float(), grid, padding_mode="border", align_corners=False)
    change = 1 + JITTER * (2 * torch.rand(2, n, 1, 1, 1, device=pictures.device) - 1)
    return seen * change[0] + change[1] - 1
