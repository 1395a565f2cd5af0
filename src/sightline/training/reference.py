"""The model that a policy must stay near: the weights its stage began from, which learn no more."""

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..model import VLM
from .answers import answers_of, log_probabilities


class Scorer(nn.Module):
    """A model and what is asked of it in one pass."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return log_probabilities(self.model, batch, answers_of(batch))


class Frozen:
    """Log-probabilities of the learned tokens of a batch by a model that does not learn; in no state of its holder."""

    def __init__(self, model: VLM) -> None:
        self.scorer = Scorer(model)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        found: Tensor = self.scorer(batch)
        return found


def frozen(model: VLM, learned: Collection[str]) -> Frozen:
    """The model as it is now; parameters that are not `learned` are shared with it, the others copied.

    It is in no checkpoint: a run that goes on reads the weights that its stage began from anyway. Adapters that have
    just been put in change nothing yet, so their copy is the model without them. In shards (`training.sharding`) it is
    in shards as well, and shares nothing.
    """
    shared = {id(p): p for name, p in model.named_parameters() if name not in learned}
    before = copy.deepcopy(model, shared).eval()  # type: ignore[arg-type]  # what is in deepcopy's memo is not copied
    return Frozen(before)
