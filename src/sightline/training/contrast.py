"""Pictures and captions that belong together: CLIP's softmax over the batch, and BLIP-2's matching of single pairs."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ConfigError
from ..data.batch import Batch
from ..fusion.qformer import QFormer
from ..layers.cross_attention import CrossAttention
from ..model import VLM
from .chance import drawn, luck
from .distributed import Peers
from .objectives import Contrast, Objective, Term, features_of
from .settings import CLIPConfig

SHARPEST = 100.0  # the most that cosines are multiplied with, as in CLIP


class CLIP(Contrast):
    """Each picture is to choose its caption among all of the batch, and each caption its picture (arXiv:2103.00020)."""

    def __init__(self, features: int, vocabulary: int, pad_id: int, cfg: CLIPConfig) -> None:
        super().__init__(features, vocabulary, pad_id)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(cfg.temperature)))

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"clip": len(batch.extra["captions"])}

    def on_features(self, features: Tensor, batch: Batch) -> dict[str, Term]:
        return {"clip": clip_loss(self.scores(features, batch.extra["captions"].to(features.device)))}

    def scores(self, features: Tensor, captions: Tensor) -> "Scores":
        """How well these pictures and captions go with those of all peers."""
        images, texts = self.compared(features, captions)
        with torch.autocast(images.device.type, enabled=False):  # bf16 has too few steps between cosines near one
            both = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
            return compared(*both, self.log_scale.exp().clamp(max=SHARPEST), self.peers)


@dataclass(frozen=True)
class Scores:
    """How well n pairs go with N, of which they are a part, in float32.

    pictures: [n, N], of each picture with all captions. captions: [n, N], of each caption with all pictures. first:
    the place of the part's first pair among all.
    """

    pictures: Tensor
    captions: Tensor
    first: int = 0

    @property
    def own(self) -> Tensor:
        """Where each pair [n] is among all."""
        return torch.arange(self.first, self.first + len(self.pictures), device=self.pictures.device)


def compared(pictures: Tensor, captions: Tensor, scale: Tensor, peers: Peers) -> Scores:
    """Scores by the products of directions, of pictures [n, width] and captions [n, width] with those of all peers.

    A picture may have several directions [n, some, width], of which the one counts that fits a caption best.
    """
    if peers.size == 1:
        scores = best(pictures, captions) * scale
        return Scores(scores, scores.T)
    width = captions.shape[-1]
    every = peers.gathered(torch.cat((pictures.flatten(1), captions), dim=1))
    all_pictures, all_captions = every[:, :-width].unflatten(1, pictures.shape[1:]), every[:, -width:]
    found = best(pictures, all_captions) * scale, best(all_pictures, captions).T * scale
    return Scores(*found, first=peers.rank * len(captions))


def best(pictures: Tensor, captions: Tensor) -> Tensor:
    """Products [pictures, captions] of directions, the largest of a picture that has several."""
    products = pictures @ captions.T
    return products if pictures.dim() == 2 else products.amax(1)


def clip_loss(scores: Scores, label_smoothing: float = 0.0) -> Term:
    """The mean of both ways' cross-entropies, summed over a part's pairs, and how many these are.

    label_smoothing: the share of the target that all pairs have alike.
    """
    both = [
        F.cross_entropy(x, scores.own, reduction="sum", label_smoothing=label_smoothing)
        for x in (scores.pictures, scores.captions)
    ]
    return (both[0] + both[1]) / 2, len(scores.own)


class Matching(Objective):
    """Do a picture and a caption belong together, asked of one pair at a time (arXiv:2301.12597).

    Besides the true pairs each picture gets a wrong caption and each caption a wrong picture, the likelier the better
    the contrast, which is learned along, thinks they match. A Q-Former that reads text looks at the pair; else words of
    the caption look at the picture by a block of attention of this objective's own.
    """

    def __init__(self, model: VLM, vocabulary: int, pad_id: int) -> None:
        super().__init__()
        features, fusion = model.config.image.features, model.fusion
        self.contrast = CLIP(features, vocabulary, pad_id, CLIPConfig())
        reads = isinstance(fusion, QFormer) and fusion.words is not None
        self.look = None if reads else CrossAttention(features, 1, memory=features)
        self.head = nn.Linear(fusion.config.hidden if reads else features, 2)
        if reads and vocabulary > fusion.config.vocab_size:
            most = fusion.config.vocab_size
            raise ConfigError(f"captions of {vocabulary} words for a Q-Former that reads {most}, expected alike")

    def counts(self, batch: Batch) -> dict[str, int]:
        pairs = len(batch.extra["captions"])
        return {"itm": 3 * pairs, "itm-contrast": pairs}

    def among(self, peers: Peers) -> None:
        self.peers = self.contrast.peers = peers

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        features = features_of(model, batch)
        captions = batch.extra["captions"].to(features.device)
        scores = self.contrast.scores(features, captions)
        texts, pictures = mismatched(scores, features, captions, self.contrast.pad_id, self.peers, self.key, batch)
        logits = self.match(model, torch.cat((features, features, pictures)), torch.cat((texts[0], texts[1], texts[0])))
        truth = (torch.arange(len(logits), device=logits.device) < len(features)).long()
        total = F.cross_entropy(logits, truth, reduction="sum")
        return {"itm": (total, len(logits)), "itm-contrast": clip_loss(scores)}

    def match(self, model: VLM, features: Tensor, captions: Tensor) -> Tensor:
        """Scores [pairs, 2] of no and yes: the mean over what has looked at both."""
        real = captions != self.contrast.pad_id
        if self.look is None:
            return self.head(model.fusion.ask(features, captions.masked_fill(~real, -1))).float().mean(1)
        words = self.contrast.embedding(captions)
        seen = self.head(words + self.look(words, features)).float() * real[..., None]
        return seen.sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def mismatched(
    scores: Scores, features: Tensor, captions: Tensor, pad: int, peers: Peers, key: str, batch: Batch
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Captions [n, words], true and wrong ones for each picture, and for each caption a wrong picture's features.

    Wrong ones are drawn among all that peers have. key: what the chance of a step hangs on.
    """
    captions = F.pad(captions, (0, peers.most(captions.shape[1]) - captions.shape[1]), value=pad)
    every, first = peers.gathered(captions), batch.extra.get("first", 0)
    chance = torch.stack([luck(f"{key} {first + i}", 2) for i in range(len(captions))]).to(features.device)
    text, picture = hard_negatives(scores, (captions[:, None] == every).all(-1), chance)
    return (captions, every[text]), peers.gathered(features)[picture]


def hard_negatives(scores: Scores, same: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """A wrong caption for each picture and a wrong picture for each caption [n] among all, drawn by their scores.

    same: [n, N], pairs whose captions are equal, which are not wrong. Where all are, another of them has to do.
    chance: [n, 2], the luck of each draw in [0, 1).
    """
    own = scores.own[:, None]
    barred = same.scatter(1, own, True)
    floor = torch.zeros_like(scores.pictures).scatter(1, own, -1e9)
    ways = (scores.pictures.detach(), scores.captions.detach())
    found = [drawn(x.masked_fill(barred, -1e6) + floor, chance[:, way]) for way, x in enumerate(ways)]
    return found[0], found[1]
