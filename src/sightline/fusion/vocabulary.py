"""Codes of pictures as words of the decoder's own vocabulary (Chameleon, arXiv:2405.09818)."""

from typing import Literal

import torch

from ..core.config import config
from ..core.errors import ConfigError
from ..core.patches import Grid, Patches
from .bridge import Bridge, TokenFusion


@config
class VocabularyConfig:
    """The id of each code, in the order of the codebook."""

    ids: tuple[int, ...]
    kind: Literal["vocabulary"] = "vocabulary"

    def __post_init__(self) -> None:
        if not self.ids or min(self.ids) < 0:
            raise ConfigError(
                f"{len(self.ids)} ids of codes from {min(self.ids, default=0)} on, expected some from 0 on"
            )

    @property
    def note(self) -> str:
        return f"{len(self.ids)} codes are words"

    def build(self) -> "Vocabulary":
        """The fusion of these settings."""
        return Vocabulary(self)


class Vocabulary(TokenFusion):
    """It has no parameters: the decoder's table holds what a code means."""

    def __init__(self, cfg: VocabularyConfig) -> None:
        super().__init__()
        self.config = cfg

    def num_tokens(self, grid: Grid) -> int:
        """How many slots of the sequence an item with this grid takes: one for each code."""
        frames, rows, columns = grid
        return frames * rows * columns

    def forward(self, features: Patches) -> Bridge:
        """Codes [n, 1] to ids of words [n]."""
        table = torch.tensor(self.config.ids, device=features.values.device)
        return Bridge(ids=table[features.values[:, 0]])
