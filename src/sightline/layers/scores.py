"""What attention makes of products of queries and keys beyond their softmax: scale, cap, distance."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.config import config
from ..core.errors import ConfigError
from ..core.layout import Layout


@config
class Scores:
    """How much a query makes of a key beyond their product, and which keys are too far away to be seen.

    scale: what products are multiplied with; None: 1 / sqrt(head_dim).
    softcap: products stay below it, by a tanh (Gemma 2, arXiv:2408.00118).
    window: only keys less than so many positions before the query are seen (Mistral, arXiv:2310.06825).
    chunk: positions are cut into stretches of so many, only keys of the query's own are seen (Llama 4). Neither hides
    tokens of one block from one another.
    alibi: scores fall with the distance, in each head at its own rate (arXiv:2108.12409).
    logn: queries after so many tokens are multiplied with the logarithm of their number to this base (Qwen).
    temperature: (tokens, factor), queries times 1 + factor * log(1 + n // tokens) at the n-th token (Llama 4).
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    chunk: int | None = None
    alibi: bool = False
    logn: int | None = None
    temperature: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        if any(x is not None and x <= 0 for x in (self.softcap, self.window, self.chunk)):
            raise ConfigError("softcap, window and chunk of attention are larger than 0")
        if (self.logn is not None and self.logn < 2) or (self.temperature is not None and self.temperature[0] < 1):
            raise ConfigError("attention grows after 2 tokens (logn) or 1 (temperature) at the earliest")

    @property
    def by_place(self) -> bool:
        """Whether positions have a say, beyond rotary ones."""
        return self.alibi or any(x is not None for x in (self.window, self.chunk, self.logn, self.temperature))

    def stretched(self, q: Tensor, places: "Places") -> Tensor:
        """Queries [batch, heads, length, dim] as they grow with their place."""
        number = places.query.position[:, None, :, None].float() + 1
        if self.logn is not None:
            q = q * (number.log() / math.log(self.logn)).clamp(min=1).to(q.dtype)
        if self.temperature is not None:
            tokens, factor = self.temperature
            q = q * (1 + factor * torch.log1p(number // tokens)).to(q.dtype)
        return q

    def limited(self, mask: Tensor | None, causal: bool, places: "Places", heads: int) -> tuple[Tensor | None, bool]:
        """A mask and whether it is the causal one, after what distance hides; with alibi, what is added to scores."""
        keys = places.key.length
        window, chunk = self.window is not None and keys > self.window, self.chunk is not None and keys > self.chunk
        if not (window or chunk or self.alibi):  # no two keys are as far apart
            return mask, causal
        if self not in places.made:
            places.made[self] = self._made(mask, causal, places, heads, window, chunk)
        return places.made[self], False

    def _made(
        self, mask: Tensor | None, causal: bool, places: "Places", heads: int, window: bool, chunk: bool
    ) -> Tensor | None:
        query, key = places.query.position[:, None, :, None], places.key.position[:, None, None, :]
        if causal:
            mask = torch.ones(query.shape[2], key.shape[3], dtype=torch.bool, device=query.device).tril()
        together = places.query.block[:, None, :, None] == places.key.block[:, None, None, :]
        if window:
            near = (query - key < self.window) | together
            mask = near if mask is None else mask & near
        if chunk:
            near = (query // self.chunk == key // self.chunk) | together
            mask = near if mask is None else mask & near
        if not self.alibi:
            return mask
        bias = (key - query) * alibi_slopes(heads, query.device)[:, None, None]
        return bias if mask is None else bias.masked_fill(~mask, HIDDEN)


HIDDEN = -1e30  # added to a score, it leaves nothing of it; unlike infinity it leaves numbers where all is hidden


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """How fast scores fall in each head [heads], from steep to gentle: 2^(-8/n), 2^(-16/n), ... for n heads.

    Where n is no power of two, every other one of the next power comes first, then those between.
    """
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 2 ** (-8 / power * torch.arange(1, power + 1, device=device))
    return slopes if power == heads else torch.cat((slopes[1::2], slopes[::2]))[:heads]


@dataclass(frozen=True)
class Places:
    """The layouts of queries and keys of one step.

    made: the masks that blocks share, by their scores.
    """

    query: Layout
    key: Layout
    made: dict[Scores, Tensor | None] = field(default_factory=dict)
