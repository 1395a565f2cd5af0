"""What a step minimises. Every term returns (sum, count), so that it is divided once, by the global count."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..core.config import nearest
from ..core.errors import ConfigError
from ..data.batch import IGNORE, Batch
from ..model import VLM
from .answers import begins
from .distributed import Peers

AT_ONCE = 1 << 24  # logits in memory at a time; those of more positions are computed again for their gradients
Term = tuple[Tensor, int]  # sum over what is learned, and how many that is


class Objective(nn.Module, ABC):
    """Terms of the loss; weights of its own are trained along and kept in the training state only.

    updates: how many times each step's batches are learned from. notes: what else a step has to tell. peers: the
    processes that have parts of the same micro-batches, over which contrast goes. key: of the step in hand.
    """

    updates: int = 1
    key: str = ""
    peers: Peers = Peers()
    notes: Mapping[str, float] = MappingProxyType({})

    def prepare(self, model: VLM, micro: list[Batch], key: str) -> list[Batch]:
        """What is to be done once a step, before anything is learned from its micro-batches; they, or others instead.

        key: says the run's seed, the stage and the step, so that whatever is drawn is drawn again after a resume.
        """
        self.key = key
        return micro

    def among(self, peers: Peers) -> None:
        """Have it compare what all these processes have."""
        self.peers = peers

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """How much each term learns from a batch: known before any is computed, so that several are divided once."""

    @abstractmethod
    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        """Named terms for one batch."""


class NextToken(Objective):
    """Cross-entropy on learned positions only; the head is applied to nothing else.

    Ids in [first, first + count) are places on a line: their target is a Gaussian of `sigma` bins over the
    neighbours, so that a near miss costs less than a far one. With `by_answer` every answer counts the same, whatever
    its length: else a list of boxes outweighs dozens of a yes or no. sources: weights by name of where rows are from;
    each source has a term of its own then.
    """

    def __init__(
        self,
        first: int = 0,
        count: int = 0,
        sigma: float = 1.5,
        chunk: int | None = None,
        by_answer: bool = False,
        sources: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.sources = sources
        self.first, self.count, self.sigma, self.chunk, self.by_answer = first, count, sigma, chunk, by_answer
        self.name = "answers" if by_answer else "next-token"

    def counts(self, batch: Batch) -> dict[str, int]:
        assert batch.labels is not None
        learned = batch.labels != IGNORE
        rows = (begins(learned) if self.by_answer else learned).sum(1)
        if not self.sources:
            return {self.name: int(rows.sum())}
        return {self._term(name): int(rows[self._from(name, batch)].sum()) for name in self.sources}

    def _term(self, source: str) -> str:
        return f"{self.name} {source}"

    def _from(self, source: str, batch: Batch) -> Tensor:
        """Which rows of a batch are from a source."""
        assert batch.labels is not None
        return torch.tensor([name == source for name in batch.extra["sources"]], device=batch.labels.device)

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        assert batch.labels is not None
        mask = batch.labels != IGNORE
        learned = mask.flatten().nonzero()[:, 0]
        chosen, labels = model(batch, rows=learned), batch.labels.flatten()[learned]
        answer = begins(mask).flatten()[learned].long().cumsum(0) - 1
        weight = torch.ones(len(labels), device=labels.device)
        if self.by_answer:
            weight = 1 / torch.bincount(answer)[answer]
        counts = self.counts(batch)
        if not self.sources:
            return {self.name: (self._total(model, chosen, labels, weight), counts[self.name])}
        row, found = learned // batch.labels.shape[1], {}
        for name, worth in self.sources.items():
            own = self._from(name, batch)[row]
            total = worth * self._total(model, chosen[own], labels[own], weight[own])
            found[self._term(name)] = total, counts[self._term(name)]
        return found

    def _total(self, model: VLM, chosen: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        """The loss of what follows hidden states [n, width], chunk by chunk."""

        def scored(hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
            return self.loss(model.logits(hidden), labels, weight)

        chunk = self.chunk or max(1, AT_ONCE // model.config.decoder.vocab_size)
        if len(labels) <= chunk:
            return scored(chosen, labels, weight)
        parts = zip(chosen.split(chunk), labels.split(chunk), weight.split(chunk), strict=True)
        again = partial(checkpoint, scored, use_reentrant=False, preserve_rng_state=False)
        return torch.stack([again(*part) for part in parts]).sum()

    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Weighted sum over positions [n] of logits [n, vocabulary] in float32."""
        weight = torch.ones(len(labels), device=labels.device) if weight is None else weight
        place = (labels >= self.first) & (labels < self.first + self.count)
        plain = (F.cross_entropy(logits[~place], labels[~place], reduction="none") * weight[~place]).sum()
        if not bool(place.any()):
            return plain
        scores = logits[place].log_softmax(-1)[:, self.first : self.first + self.count]
        target = smoothed(labels[place] - self.first, self.count, self.sigma)
        return plain - ((target * scores).sum(-1) * weight[place]).sum()


def smoothed(bins: Tensor, count: int, sigma: float) -> Tensor:
    """Targets [n, count] that fall off around each bin [n] as a Gaussian and sum to one."""
    away = torch.arange(count, device=bins.device) - bins[:, None].float()
    return torch.softmax(-((away / sigma) ** 2) / 2, dim=-1)


class OnFeatures(Objective):
    """Terms that look at the encoder's features alone; several of them share one pass through it."""

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        return self.on_features(features_of(model, batch), batch)

    @abstractmethod
    def on_features(self, features: Tensor, batch: Batch) -> dict[str, Term]:
        """The same from features [items, patches, width]."""


class Contrast(OnFeatures):
    """Pictures against captions: mean-pooled features, and means of token vectors, each mapped to be compared."""

    def __init__(self, features: int, vocabulary: int, pad_id: int) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.embedding = nn.Embedding(vocabulary, features)
        self.text = nn.Linear(features, features)
        self.image = nn.Linear(features, features)

    def compared(self, features: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """A vector [n, width] of each picture and of each caption."""
        real = (captions != self.pad_id)[..., None].float()
        texts = self.text((self.embedding(captions) * real).sum(1) / real.sum(1).clamp(min=1))
        return self.image(features.mean(1)), texts


class SigLIP(Contrast):
    """Every picture against every caption of the batch, each pair a yes or no (arXiv:2303.15343).

    Scale and bias start at 10 and -10.
    """

    def __init__(self, features: int, vocabulary: int, pad_id: int) -> None:
        super().__init__(features, vocabulary, pad_id)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"siglip": len(batch.extra["captions"])}

    def on_features(self, features: Tensor, batch: Batch) -> dict[str, Term]:
        images, texts = self.compared(features, batch.extra["captions"].to(features.device))
        every, first = self.peers.gathered(texts), self.peers.rank * len(images)
        return {"siglip": siglip_loss(images, every, self.log_scale, self.bias, first)}


def siglip_loss(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor, first: int = 0) -> Term:
    """Pairwise sigmoid loss of n pictures and all texts, summed over all pairs, and n.

    first: which of the texts is that of the first picture.
    """
    with torch.autocast(images.device.type, enabled=False):  # bf16 has too few steps between cosines near one
        scores = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
        own = torch.arange(first, first + len(scores), device=scores.device)
        sign = torch.full_like(scores, -1.0).scatter(1, own[:, None], 1.0)
        return -F.logsigmoid(sign * (scores * log_scale.exp() + bias)).sum(), len(scores)


def features_of(model: VLM, batch: Batch) -> Tensor:
    """Encoder features [items, patches, width] of a batch of pictures."""
    assert batch.patches is not None
    features: Tensor = model.encoder(batch.patches).dense()
    return features


def exactly(head: nn.Linear, x: Tensor) -> Tensor:
    """A linear map in float32, whatever the stage computes in: for numbers that are compared, not chosen among."""
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = head(x.float())
        return out


BINS = 128
DENSE_WEIGHTS = {
    "object": 2.0,
    "color": 1.0,
    "shape": 1.0,
    "size": 1.0,
    "texture": 0.5,
    "cover_color": 0.5,
    "cover_shape": 0.5,
    "box": 1.0,
}


class Dense(OnFeatures):
    """A linear reading of every patch: is an object's centre here, and its attributes and box.

    classes: how many values each attribute of the truth has. A truth of -1 is not learned, except for `cover_*`,
    where it means background. Boxes are four smoothed choices among 128 bins.
    """

    def __init__(self, features: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        sizes = {"object": 2, **classes, **{f"cover_{k}": classes[k] + 1 for k in ("color", "shape")}}
        self.heads = nn.ModuleDict({name: nn.Linear(features, count) for name, count in sizes.items()})
        self.heads["box"] = nn.Linear(features, 4 * BINS)

    def counts(self, batch: Batch) -> dict[str, int]:
        there = batch.extra["dense"]["object"] == 1
        some = int(there.sum())
        return {name: there.numel() if _everywhere(name) else some * (4 if name == "box" else 1) for name in self.heads}

    def on_features(self, features: Tensor, batch: Batch) -> dict[str, Term]:
        truth = {name: value.to(features.device).flatten(1, 2) for name, value in batch.extra["dense"].items()}
        there = truth["object"] == 1
        features = features.float()
        terms: dict[str, Term] = {}
        for name, head in self.heads.items():
            if name == "box":
                continue
            everywhere = _everywhere(name)
            labels = truth[name] + int(name.startswith("cover_"))
            where = torch.ones_like(there) if everywhere else there
            seen, labels = features[where], labels[where]
            terms[name] = self._term(name, F.cross_entropy(head(seen), labels, reduction="sum"), len(labels))
        scores = self.heads["box"](features[there]).float().unflatten(-1, (4, BINS)).log_softmax(-1)
        bins = (truth["box"][there] * BINS - 0.5).flatten()
        target = smoothed(bins, BINS, 1.5).view_as(scores)
        terms["box"] = self._term("box", -(target * scores).sum(), 4 * len(scores))
        return terms

    def _term(self, name: str, total: Tensor, count: int) -> Term:
        """Weighted sum and count; a batch without objects teaches nothing instead of dividing by zero."""
        return total * DENSE_WEIGHTS[name], count


def _everywhere(name: str) -> bool:
    """Whether an attribute is read from every patch; the others are read where an object's centre is."""
    return name == "object" or name.startswith("cover_")


class Total(Objective):
    """A weighted sum of terms; those that read the encoder share one pass through it."""

    def __init__(self, terms: Mapping[str, Objective], weights: Mapping[str, float]) -> None:
        super().__init__()
        for name in weights:
            if name not in terms:
                raise ConfigError(f"unknown objective {name!r}{nearest(name, terms)}")
        self.weights = dict(weights)
        self.terms = nn.ModuleDict({name.replace("-", "_"): terms[name] for name in weights})
        self.updates = max((term.updates for term in self.terms.values()), default=1)

    def prepare(self, model: VLM, micro: list[Batch], key: str) -> list[Batch]:
        for term in self.terms.values():
            micro = term.prepare(model, micro, key)
        self.notes = {name: value for term in self.terms.values() for name, value in term.notes.items()}
        return micro

    def among(self, peers: Peers) -> None:
        for term in self.terms.values():
            term.among(peers)

    def counts(self, batch: Batch) -> dict[str, int]:
        found: dict[str, int] = {}
        for term in self.terms.values():
            counts = term.counts(batch)
            if both := found.keys() & counts:
                raise ConfigError(f"two objectives of one stage have a term {min(both)!r}; learn them one by one")
            found |= counts
        return found

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        found: dict[str, Term] = {}
        features = None
        for name, weight in self.weights.items():
            term = self.terms[name.replace("-", "_")]
            if isinstance(term, OnFeatures):
                features = features_of(model, batch) if features is None else features
                parts = term.on_features(features, batch)
            else:
                parts = term(model, batch)
            found |= {key: (total * weight, count) for key, (total, count) in parts.items()}
        return found
