"""How a Q-Former learns to represent pictures before any language model reads it: BLIP-2's first stage."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ConfigError
from ..data.batch import Batch
from ..fusion.qformer import QFormer, QFormerConfig
from ..fusion.qformer_text import QFormerText
from ..model import VLM
from .contrast import SHARPEST, Scores, clip_loss, compared, mismatched
from .objectives import Objective, Term, features_of
from .settings import RepresentationConfig


class Representation(Objective):
    """Three losses of the same pictures and captions (arXiv:2301.12597, section 3.2).

    - itc, contrast: queries and caption have not seen each other; the query that fits it best is compared with its
      [CLS], with all of the batch.
    - itm, matching: queries and words see each other; the mean over the queries says whether the two belong together,
      of true pairs and of those that the contrast takes for true most easily.
    - itg, generation: words are told from the queries and the words before them; the queries see none of them.

    All that only text needs is this objective's own: the next stage takes the Q-Former as it is. Captions are in words
    of the run's tokenizer, those longer than `max_length` cut; [CLS], [DEC] and [SEP] come after them.
    """

    def __init__(self, model: VLM, vocabulary: int, pad_id: int, cfg: RepresentationConfig) -> None:
        super().__init__()
        fusion = model.config.fusion
        if not isinstance(fusion, QFormerConfig) or fusion.vocab_size:
            found = fusion.kind if not isinstance(fusion, QFormerConfig) else "one that reads instructions"
            raise ConfigError(f"objective 'qformer' teaches a Q-Former of queries alone, this model has {found}")
        self.cfg, self.pad_id = cfg, pad_id
        self.cls, self.dec, self.sep = range(vocabulary, vocabulary + 3)
        self.text = QFormerText(fusion, vocabulary + 3, cfg.max_length)
        self.picture_projection = nn.Linear(fusion.hidden, cfg.projection)
        self.text_projection = nn.Linear(fusion.hidden, cfg.projection)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(cfg.temperature)))
        self.match = nn.Linear(fusion.hidden, 2)
        width, eps = fusion.hidden, fusion.eps
        self.say = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps))  # as in BERT
        self.bias = nn.Parameter(torch.zeros(vocabulary + 3))  # the words' own embeddings are the rest of the head

    def counts(self, batch: Batch) -> dict[str, int]:
        captions = batch.extra["captions"]
        pairs, words = len(captions), int(self.lengths(captions).sum())
        return {"itc": pairs, "itm": 3 * pairs, "itg": words + pairs}

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        features = features_of(model, batch)
        ids = self.written(batch.extra["captions"].to(features.device))
        said = ids.index_fill(1, ids.new_zeros(1), self.dec)  # begins otherwise, or [CLS] would have two tasks
        queries, words = self.text.told(model.fusion, features, said)  # which queries see no word: contrast's, too
        scores = self.scores(queries, self.text.alone(model.fusion, ids)[:, 0])
        return {
            "itc": clip_loss(scores, self.cfg.label_smoothing),
            "itm": self.matching(model.fusion, features, ids, scores, batch),
            "itg": self.generation(words[:, :-1], ids[:, 1:]),
        }

    def rehearse(self, qformer: QFormer, features: Tensor, words: int) -> None:
        """All that one picture [1, patches, width] with a caption of so many words goes through, and nothing else."""
        ids = torch.zeros(1, min(words + 2, self.cfg.max_length), dtype=torch.int64)
        queries, said = self.text.told(qformer, features, ids)
        self.picture_projection(queries), self.text_projection(self.text.alone(qformer, ids)[:, 0])
        self.match(self.text.together(qformer, torch.cat((features,) * 3), torch.cat((ids,) * 3)))
        logits = F.linear(self.say(said[:, :-1]), self.text.words.weight, self.bias)
        F.cross_entropy(logits.flatten(0, 1), ids[0, 1:])

    # ------------------------------------------------------------------------------------------------------ captions

    def lengths(self, captions: Tensor) -> Tensor:
        """How many words of each caption are read, beside the two tokens around them."""
        return (captions != self.pad_id).sum(1).clamp(max=self.cfg.max_length - 2)

    def written(self, captions: Tensor) -> Tensor:
        """Ids of captions [n, words], padded on the right, as [CLS], words, [SEP]; -1 after the end."""
        length = self.lengths(captions)[:, None]
        place = torch.arange(int(length.max()), device=captions.device)
        words = captions[:, : len(place)].masked_fill(place >= length, -1)
        return F.pad(F.pad(words, (1, 0), value=self.cls), (0, 1), value=-1).scatter(1, length + 1, self.sep)

    # --------------------------------------------------------------------------------------------------- three losses

    def scores(self, queries: Tensor, texts: Tensor) -> Scores:
        """Cosines by temperature in float32; a picture is as near a caption as the nearest of its queries.

        queries [pictures, queries, hidden] that have seen no text; texts [captions, hidden], each its [CLS].
        """
        pictures, texts = self.picture_projection(queries), self.text_projection(texts)
        with torch.autocast(texts.device.type, enabled=False):  # bf16 has too few steps between cosines near one
            both = F.normalize(pictures.float(), dim=-1), F.normalize(texts.float(), dim=-1)
            return compared(*both, self.log_scale.exp().clamp(max=SHARPEST), self.peers)

    def matching(self, qformer: QFormer, features: Tensor, ids: Tensor, scores: Scores, batch: Batch) -> Term:
        """Cross-entropy of true pairs, of pictures with wrong captions and of captions with wrong pictures."""
        texts, pictures = mismatched(scores, features, ids, -1, self.peers, self.key, batch)
        seen = torch.cat((features, features, pictures))
        logits = self.matches(qformer, seen, torch.cat((texts[0], texts[1], texts[0])))
        truth = (torch.arange(len(logits), device=ids.device) < len(ids)).long()
        return F.cross_entropy(logits, truth, reduction="sum"), len(truth)

    def matches(self, qformer: QFormer, features: Tensor, ids: Tensor) -> Tensor:
        """Scores [pairs, 2] of no and yes."""
        return self.match(self.text.together(qformer, features, ids)).float().mean(1)

    def generation(self, words: Tensor, following: Tensor) -> Term:
        """Cross-entropy of the ids [n, words] that follow words [n, words, hidden]; of none where there is -1."""
        there = following >= 0
        logits = F.linear(self.say(words[there]), self.text.words.weight, self.bias).float()
        smooth = self.cfg.label_smoothing
        return F.cross_entropy(logits, following[there], reduction="sum", label_smoothing=smooth), len(logits)
