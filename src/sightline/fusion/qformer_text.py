"""The side of a Q-Former that reads text while it learns, and is left behind then (arXiv:2301.12597, section 3.2).

Words pass through the Q-Former's own self-attention, with embeddings and feed-forwards of theirs; who sees whom is what
three ways of reading differ by. The Q-Former itself has no part of this: it is the same with and without.
"""

import torch
from torch import Tensor, nn

from .qformer import QFormer, QFormerConfig, TextLayer


class QFormerText(nn.Module):
    """Embeddings of `vocabulary` words at `length` places, and for each layer the feed-forward of words.

    Ids [items, words] are of this vocabulary, -1 after the end of a shorter text.
    """

    def __init__(self, cfg: QFormerConfig, vocabulary: int, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, cfg.hidden)
        self.positions = nn.Embedding(length, cfg.hidden)
        self.layers = nn.ModuleList(TextLayer(cfg) for _ in range(cfg.depth))
        for table in (self.words, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def alone(self, qformer: QFormer, ids: Tensor) -> Tensor:
        """Words [items, words, hidden] that see one another and nothing else."""
        return qformer.through(self.embedded(ids), None, (ids >= 0)[:, None, None], self.layers)

    def together(self, qformer: QFormer, features: Tensor, ids: Tensor) -> Tensor:
        """Queries [items, queries, hidden] that see all words, and words them."""
        count = qformer.config.queries
        real = nn.functional.pad(ids >= 0, (count, 0), value=True)[:, None, None]
        return qformer.through(self.beside(qformer, ids), features, real, self.layers)[:, :count]

    def told(self, qformer: QFormer, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, which see no word, and words, each of which sees the queries and the words up to itself."""
        count = qformer.config.queries
        begun = torch.arange(count + ids.shape[1], device=ids.device).clamp(min=count - 1)  # all queries at once
        mask = begun[:, None] >= begun  # what is after a text's end comes after all that is asked of it
        x = qformer.through(self.beside(qformer, ids), features, mask, self.layers)
        return x[:, :count], x[:, count:]

    def beside(self, qformer: QFormer, ids: Tensor) -> Tensor:
        """Queries and then words as they enter the first layer."""
        return torch.cat((qformer.queries.expand(len(ids), -1, -1), self.embedded(ids)), dim=1)

    def embedded(self, ids: Tensor) -> Tensor:
        """Words [items, words, hidden] at their places."""
        found: Tensor = self.words(ids.clamp(min=0)) + self.positions.weight[: ids.shape[1]]
        return found
