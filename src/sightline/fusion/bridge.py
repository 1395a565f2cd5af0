"""What every fusion is to a model: features of pictures in, tokens for the sequence or memory to look at out.

A fusion is called with the features of all items, one that reads text (`QFormer`) with that as well, and makes a
`Bridge` of them. `num_tokens(grid)` is how many slots of the sequence an item with this grid takes, `blocks(decoder)`
the decoder's blocks with the fusion's own among them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.patches import Grid, Patches
from ..language.decoder import DecoderConfig, plain_blocks


@dataclass(frozen=True)
class Bridge:
    """What a fusion hands to the decoder.

    tokens: [n, width], written into the sequence's slots in order.
    memory: the vectors of each item that cross-attention blocks look at; an item then has one slot, which says where
    in the sequence it stands. latest: whether a token looks at the latest item only, as in `core.memory`; adjacent:
    whether items whose slots are side by side are looked at together. ids: [n], words of the decoder's vocabulary that
    stand for the items, instead of tokens. features: those of the pictures, where regions of them may be asked for.
    """

    tokens: Tensor | None = None
    ids: Tensor | None = None
    memory: Patches | None = None
    latest: bool = True
    adjacent: bool = False
    features: Patches | None = None


class TokenFusion(nn.Module):
    """Base of fusions that fill slots and leave the decoder as it is."""

    def blocks(self, decoder: DecoderConfig) -> list[nn.Module]:
        """The decoder's own blocks and no others."""
        return plain_blocks(decoder)


def by_grid(features: Patches, compute: Callable[[Tensor, Grid, list[int]], Tensor]) -> Tensor:
    """Tokens [sum of n, width] of all items in order; items of one grid are computed together.

    compute: features [items, t*h*w, inputs], their grid and which items they are, to tokens [items, n, width].
    """
    count = len(features.grids)
    if features.uniform:
        return compute(features.dense(), features.grids[0], list(range(count))).flatten(0, 1)
    parts = features.items()
    done: dict[int, Tensor] = {}
    for grid in dict.fromkeys(features.grids):
        where = [i for i in range(count) if features.grids[i] == grid]
        out = compute(torch.stack([parts[i] for i in where]), grid, where)
        done |= dict(zip(where, out, strict=True))
    return torch.cat([done[i] for i in range(count)])


def learned(*shape: int) -> nn.Parameter:
    """Learned vectors that stand for no input, such as queries, at their random start: normal of 0.02."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=0.02))
