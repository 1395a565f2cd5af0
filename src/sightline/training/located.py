"""Places learned as numbers: a head reads them where an answer begins one."""

from ..data.batch import Batch
from ..grounding.heads import place_loss
from ..model import VLM
from .objectives import Objective, Term


class Located(Objective):
    """Distance and generalised IoU of the places of a batch's answers, read at the tokens that begin them."""

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"box-head": 0 if batch.places is None else len(batch.places.slots)}

    def forward(self, model: VLM, batch: Batch) -> dict[str, Term]:
        if batch.places is None:  # zero, with gradients of zero
            return {"box-head": (model.places(model(batch)[:1, :1]).sum() * 0, 0)}
        found = model.places(model(batch, rows=batch.places.slots))
        return {"box-head": (place_loss(found, batch.places).sum(), len(found))}
