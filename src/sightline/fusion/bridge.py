"""What every fusion is to a model: features of pictures in, tokens for the sequence or memory to look at out."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ..core.patches import Grid, Patches
from ..language.decoder import DecoderConfig


@dataclass(frozen=True)
class Bridge:
    """What a fusion hands to the decoder.

    tokens: [n, width], written into the sequence's slots in order.
    memory: the vectors of each item that cross-attention blocks look at; an item then has one slot, which says where
    in the sequence it stands. latest: whether a token looks at the latest item only, as in `core.memory`.
    """

    tokens: Tensor | None = None
    memory: Patches | None = None
    latest: bool = True


class Fusion(Protocol):
    """What a model asks of its fusion."""

    def num_tokens(self, grid: Grid) -> int:
        """How many slots of the sequence an item with this grid takes."""
        ...

    def blocks(self, decoder: DecoderConfig) -> list[nn.Module]:
        """The decoder's blocks, with the fusion's own among them."""
        ...

    def __call__(self, features: Patches) -> Bridge:
        """Features [n, inputs] of all items to what the decoder is given of them."""
        ...
