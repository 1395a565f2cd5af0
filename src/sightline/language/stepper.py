"""One token at a time without torch in between: all blocks of a plain decoder in one call to `layers.native`."""

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..layers import native
from ..layers.attention import Attention
from ..layers.feedforward import GatedFeedForward
from .cache import Cache

if TYPE_CHECKING:
    from .decoder import Decoder


class Stepper:
    """The blocks, final norm and head of a decoder for steps of one token in each of a few rows.

    It shares the decoder's weights, or quantises them to int8; keys and values are the cache's own, in its precision.
    """

    def __init__(self, decoder: "Decoder", int8: bool = False) -> None:
        self.config = decoder.config
        self.blocks, self.norms = [], []
        for block in decoder.blocks:
            a, f = block.attention, block.feedforward
            self.blocks.append([native.Weight(m, int8) for m in (a.q, a.k, a.v, a.o, f.gate, f.up, f.down)])
            self.norms.append([norm.factors() for norm in (block.norm1, block.norm2)])
        self.norm = decoder.norm.factors()
        assert decoder.head is not None
        self.head = native.Weight(decoder.head, int8)

    @staticmethod
    def fits(decoder: "Decoder") -> bool:
        """Whether a decoder is one that the kernels know, on a machine that could build them."""
        c = decoder.config
        known = c.activation in native.ACTIVATIONS and c.head_size % native.LANES == 0 and decoder.head is not None
        turned = c.positions == "rotary" and c.rotary_dim == c.head_size
        return known and turned and all(map(_plain, decoder.blocks)) and native.worth_it(decoder)

    def takes(self, x: Tensor, cache: Cache | None) -> bool:
        """Whether a step is one token in each of a few rows that follow something."""
        return x.shape[1] == 1 and len(x) <= native.MOST_ROWS and cache is not None and cache.layers[0].length > 0

    def step(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache) -> Tensor:
        """Vectors [batch, 1, width] to normed hidden states in float32, the cache longer by one.

        rotary: [batch, 1, 1, dim]; mask: [batch, 1, 1, keys] or None.
        """
        c, batch, length = self.config, len(x), cache.layers[0].length
        heads, narrow = c.heads * c.head_size, (c.kv_heads or c.heads) * c.head_size
        x = x.float().clone()
        cos, sin = (t.float().expand(batch, 1, 1, -1).contiguous() for t in rotary)
        seen = None if mask is None else mask.expand(batch, 1, 1, -1).to(torch.uint8).contiguous()
        wide = max(c.mlp, c.width, narrow)
        scratch = [x.new_empty(batch, size) for size in (max(c.width, heads), heads, wide, wide)]
        scores = x.new_empty(native.library().threads(), length + 1)
        layers = (native.Layer * len(self.blocks))()
        for n, (weights, norms) in enumerate(zip(self.blocks, self.norms, strict=True)):
            key, value = cache.layers[n].room(1)
            layers[n] = native.Layer(*[w.matrix for w in weights], *map(native.address, (*norms, key, value)))
        numbers = (len(self.blocks), batch, c.width, c.heads, c.kv_heads or c.heads, c.head_size, c.mlp)
        tensors = (cos, sin, seen, self.norm, x, *scratch, scores)
        step = native.Step(
            *numbers,
            *(native.ACTIVATIONS[c.activation], length, key.shape[2], native.KINDS[key.dtype]),
            c.eps,
            *map(native.address, tensors),
        )
        native.library().step(ctypes.byref(step), layers)
        for layer in cache.layers:
            layer.length += 1
        return x


def _plain(block: nn.Module) -> bool:
    """Whether a block is self-attention and a gated feed-forward of sizes and settings that the kernels know."""
    if not getattr(block, "plain", False):
        return False
    a, f = block.attention, block.feedforward
    if type(a) is not Attention or type(f) is not GatedFeedForward or a.qkv is not None:
        return False
    return all(map(native.Weight.fits, (a.q, a.k, a.v, a.o, f.gate, f.up, f.down)))
