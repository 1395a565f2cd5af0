"""The model that a policy must stay near: the weights its stage began from, which learn no more."""

import copy
from collections.abc import Collection

import torch

from ..data.batch import Batch
from ..model import VLM
from .answers import Reference, answers_of, log_probabilities


def frozen(model: VLM, learned: Collection[str]) -> Reference:
    """The model as it is now; parameters that are not `learned` are shared with it, the others copied.

    It is in no checkpoint: a run that goes on reads the weights that its stage began from anyway. Adapters that have
    just been put in change nothing yet, so their copy is the model without them.
    """
    shared = {id(p): p for name, p in model.named_parameters() if name not in learned}
    before = copy.deepcopy(model, shared).eval()  # type: ignore[arg-type]  # what is in deepcopy's memo is not copied

    @torch.no_grad()
    def reference(batch: Batch) -> torch.Tensor:
        return log_probabilities(before, batch, answers_of(batch))

    return reference
