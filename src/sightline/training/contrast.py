"""Pictures and captions that belong together: CLIP's softmax over the batch, and BLIP-2's matching of single pairs."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ConfigError
from ..data.batch import Batch
from ..fusion.qformer import QFormer
from ..layers.cross_attention import CrossAttention
from ..model import VLM
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
        scores = self.scores(features, batch.extra["captions"].to(features.device))
        return {"clip": clip_loss(scores)}

    def scores(self, features: Tensor, captions: Tensor) -> Tensor:
        """How well every picture and every caption go together, [n, n] in float32."""
        images, texts = self.compared(features, captions)
        with torch.autocast(images.device.type, enabled=False):  # bf16 has too few steps between cosines near one
            cosines = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
            return cosines * self.log_scale.exp().clamp(max=SHARPEST)


def clip_loss(scores: Tensor, label_smoothing: float = 0.0) -> Term:
    """The mean of both ways' cross-entropies, summed over n pairs with scores [pictures, captions], and n.

    label_smoothing: the share of the target that all pairs have alike.
    """
    own = torch.arange(len(scores), device=scores.device)
    both = [F.cross_entropy(x, own, reduction="sum", label_smoothing=label_smoothing) for x in (scores, scores.T)]
    return (both[0] + both[1]) / 2, len(scores)


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

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        features = features_of(model, batch)
        captions = batch.extra["captions"].to(features.device)
        scores = self.contrast.scores(features, captions)
        own = torch.arange(len(scores), device=scores.device)
        wrong = hard_negatives(scores.detach(), (captions[:, None] == captions[None]).all(-1))
        pictures = torch.cat((own, own, wrong[1]))
        texts = torch.cat((own, wrong[0], own))
        logits = self.match(model, features[pictures], captions[texts])
        truth = (torch.arange(len(texts), device=own.device) < len(own)).long()
        total = F.cross_entropy(logits, truth, reduction="sum")
        return {"itm": (total, len(texts)), "itm-contrast": clip_loss(scores)}

    def match(self, model: VLM, features: Tensor, captions: Tensor) -> Tensor:
        """Scores [pairs, 2] of no and yes: the mean over what has looked at both."""
        real = captions != self.contrast.pad_id
        if self.look is None:
            return self.head(model.fusion.ask(features, captions.masked_fill(~real, -1))).float().mean(1)
        words = self.contrast.embedding(captions)
        seen = self.head(words + self.look(words, features)).float() * real[..., None]
        return seen.sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def hard_negatives(scores: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """A wrong caption for each picture and a wrong picture for each caption [n], drawn by scores [pictures, captions].

    same: [n, n], pairs whose captions are equal, which are not wrong. Where all are, another of them has to do.
    """
    barred = same | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    floor = torch.eye(len(scores), device=scores.device) * -1e9
    likely = scores.masked_fill(barred, -1e6) + floor
    return tuple(torch.multinomial(x.softmax(-1), 1)[:, 0] for x in (likely, likely.T))  # type: ignore[return-value]
