"""A mixture of experts (arXiv:1701.06538): of several feed-forwards, each token passes the few that a router names."""

from typing import Literal

import torch
from torch import Tensor, nn

from ..core.config import config
from ..core.errors import ConfigError
from .feedforward import GatedFeedForward


@config
class ExpertsConfig:
    """Sizes and settings of a mixture of experts.

    chosen: experts that a token passes. mlp: hidden size of each. shared: hidden size of one that all tokens pass
    (arXiv:2401.06066). routing: "softmax" weighs outputs, over the chosen ones (Mixtral, arXiv:2401.04088; Aria,
    arXiv:2410.05993); "sigmoid" weighs each expert's input by itself (Llama 4). every: each so many-th block has
    experts, the others have a feed-forward of the decoder's own size.
    """

    count: int
    chosen: int
    mlp: int
    shared: int = 0
    routing: Literal["softmax", "sigmoid"] = "softmax"
    every: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.count:
            raise ConfigError(f"{self.chosen} experts for a token, expected 1 to {self.count}")
        if min(self.mlp, self.every) < 1 or self.shared < 0:
            raise ConfigError("hidden sizes of experts and `every` are at least 1, `shared` is at least 0")


class Experts(nn.Module):
    """Gated feed-forwards and their router; tokens are sorted by expert, so that each is one product of its tokens."""

    def __init__(self, width: int, cfg: ExpertsConfig, act: str) -> None:
        super().__init__()
        self.config = cfg
        self.router = nn.Linear(width, cfg.count, bias=False)
        self.experts = nn.ModuleList(GatedFeedForward(width, cfg.mlp, act) for _ in range(cfg.count))
        self.shared = GatedFeedForward(width, cfg.shared, act) if cfg.shared else None

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x [..., width] to the same shape, added to `onto` where it is given."""
        flat, cfg = x.flatten(0, -2), self.config
        if not len(flat):
            return x if onto is None else onto
        best, which = self.router(flat).float().topk(cfg.chosen, dim=-1)
        weight = (best.softmax(-1) if cfg.routing == "softmax" else best.sigmoid()).to(x.dtype).flatten()
        order = which.flatten().argsort(stable=True)
        token, weight = order // cfg.chosen, weight[order, None]
        given = flat[token] * weight if cfg.routing == "sigmoid" else flat[token]
        parts = given.split(self._counts(which))
        made = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)])
        made = made * weight if cfg.routing == "softmax" else made
        out = torch.zeros_like(flat).index_add(0, token, made.to(flat.dtype))
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x) if onto is None else onto + out.view_as(x)

    def _counts(self, which: Tensor) -> list[int]:
        """How many tokens each expert is given."""
        if which.is_meta:  # nothing is known of them, and however they are spread, as much is computed
            return [(which.numel() + i) // self.config.count for i in range(self.config.count)]
        return torch.bincount(which.flatten(), minlength=self.config.count).tolist()
