"""What blocks leave out by chance while they learn, so that no branch relies on another.

Blocks know nothing of it: what a branch adds to the stream passes through here on its way.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ConfigError
from ..encoders.vit import ViT
from ..fusion.cross_attention import CrossBlock
from ..fusion.qformer import QFormerLayer, TextLayer
from ..fusion.resampler import ResamplerBlock
from ..fusion.visual_expert import ExpertBlock
from ..language.decoder import SelfBlock
from ..model import VLM
from .recipe import Stage

BLOCKS = (SelfBlock, CrossBlock, QFormerLayer, TextLayer, ResamplerBlock)
# what a block calls what it adds to its stream
BRANCHES = ("attention", "feedforward", "cross", "words", "cross_attention", "cross_feedforward")


def leave_out(model: VLM, objective: nn.Module, stage: Stage) -> None:
    """Have blocks leave out what a stage says; ConfigError where it has none that could."""
    if stage.dropout:
        parts = (model.decoder, model.fusion, objective)
        blocks = [b for part in parts for b in part.modules() if isinstance(b, BLOCKS) and _learns(b)]
        if not blocks or any(isinstance(block, ExpertBlock) for block in blocks):
            why = "one with a visual expert has none" if blocks else "none of them learns"
            raise ConfigError(f"stage {stage.name!r}: dropout is for blocks of decoder and fusion, and {why}")
        for block in blocks:
            for branch in branches(block):
                through(branch, partial(F.dropout, p=stage.dropout))
    if stage.drop_path:
        encoder = model.encoder
        if not isinstance(encoder, ViT) or encoder.config.window is not None or not _learns(encoder):
            raise ConfigError(f"stage {stage.name!r}: drop_path is for an encoder that learns and sees pictures whole")
        for place, block in enumerate(encoder.blocks):
            for branch in branches(block):
                through(branch, partial(drop_path, p=stage.drop_path * place / max(len(encoder.blocks) - 1, 1)))


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def branches(block: nn.Module) -> Iterator[nn.Module]:
    """What a block adds to its stream."""
    return (part for name in BRANCHES if (part := getattr(block, name, None)) is not None)


def through(branch: nn.Module, dropped: Callable[..., Tensor]) -> None:
    """Let what a branch makes pass through `dropped(x, training=...)` before it is added to the stream."""
    plain = branch.forward

    def forward(*given: Any, onto: Tensor | None = None, **more: Any) -> Tensor:
        out = dropped(plain(*given, **more), training=branch.training)
        return out if onto is None else onto + out

    branch.forward = forward


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """Rows [n, ...] of which each is left out whole with a chance of p, the others larger for it."""
    kept = F.dropout(x.new_ones(len(x), *(1 for _ in x.shape[1:])), p, training)
    return x * kept
