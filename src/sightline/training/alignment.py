"""A projector aligned with words directly: what a patch shows is the sum of the vectors of what it is called.

Learned through a language model's answers alone this takes many times as long.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..data.batch import Batch
from ..language.tokenizer import Tokenizer
from ..model import VLM
from .objectives import Objective, Term

BACKGROUND = 0.15  # weight of a patch without an object's centre, whose target is nothing
ROLES = (37, 74, 111, 148)  # how far the vector of left, top, right, bottom is rolled, which keeps the four apart


class Words(Objective):
    """Squared distance of every projected patch from the sum of its words' and its places' embeddings.

    words: ids of each value of each attribute of the dense truth. places: the id of the first of `bins` place tokens.
    """

    def __init__(self, words: Mapping[str, Sequence[Sequence[int]]], places: int, bins: int) -> None:
        super().__init__()
        self.words, self.places, self.bins = words, places, bins

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"words": batch.extra["dense"]["object"].numel()}

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        assert batch.patches is not None
        tokens = model.fusion(model.encoder(batch.patches)).tokens
        assert tokens is not None
        truth = {name: value.to(tokens.device) for name, value in batch.extra["dense"].items()}
        there = (truth["object"] == 1).flatten()
        with torch.no_grad():
            wanted = torch.zeros_like(tokens, dtype=torch.float32)
            wanted[there] = self.sums(model, {name: value.flatten(0, 2)[there] for name, value in truth.items()})
        weight = torch.where(there, 1.0, BACKGROUND)
        return {"words": (((tokens.float() - wanted).square().mean(-1) * weight).sum(), len(there))}

    def sums(self, model: VLM, truth: Mapping[str, Tensor]) -> Tensor:
        """Targets [objects, width] for attributes [objects] and boxes [objects, 4] in shares of the picture."""
        bins = (truth["box"] * self.bins).long().clamp(0, self.bins - 1)
        total = torch.zeros(len(bins), model.decoder.config.width, device=bins.device)
        for name, values in self.words.items():
            table = torch.stack([self.vector(model, ids) for ids in values])
            total = total + table[truth[name]]
        for role, shift in enumerate(ROLES):
            total = total + model.decoder.embed(self.places + bins[:, role]).float().roll(shift, -1)
        return total

    @staticmethod
    def vector(model: VLM, ids: Sequence[int]) -> Tensor:
        """What stands for a word: its tokens' vectors together, as long as one of them."""
        device = model.decoder.embedding.weight.device
        return model.decoder.embed(torch.tensor(ids, device=device)).float().sum(0) / math.sqrt(len(ids))


def words_of(tokenizer: Tokenizer, values: Mapping[str, Sequence[str]]) -> dict[str, list[list[int]]]:
    """The ids of every value as it stands inside a sentence."""
    return {name: [tokenizer.encode(f" {value}") for value in found] for name, found in values.items()}


def smooth_places(embedding: Tensor, first: int, bins: int, waves: int = 12) -> None:
    """Let the embeddings of neighbouring places be alike: waves of 20 to 256 bins, turned into the model's width.

    In place, on rows first to first + bins of embedding [vocabulary, width]. A box is then read by a linear map instead
    of by hundreds of unrelated tokens.
    """
    width = embedding.shape[1]
    length = 20 * (256 / 20) ** torch.linspace(0, 1, waves)
    phase = 2 * math.pi * torch.arange(bins)[:, None] / length
    wave = torch.cat((phase.sin(), phase.cos()), dim=1) / math.sqrt(waves)
    turn, _ = torch.linalg.qr(torch.randn(width, 2 * waves))
    with torch.no_grad():
        embedding[first : first + bins] = wave @ turn.T
