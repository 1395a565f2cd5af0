"""What recipes of published models are written with.

Rates, sizes and steps are those of the paper or the scripts that each recipe names. A batch is what one device was
given, or a share of the whole that fits one; the whole is batch times accumulate. Their data sets are not here.
"""

from dataclasses import replace
from typing import Any

from ..data.images import CLIP_MEAN, CLIP_STD, Scaling, Square
from ..model import VLMConfig
from ..training.sources import FilesSource


def cosine(steps: int, warmup: int, floor: float = 0.0) -> dict[str, Any]:
    """A rate that rises over `warmup` steps and falls along half a cosine to a share of its peak."""
    return {"steps": steps, "warmup": warmup, "schedule": "cosine", "decay": 1 - warmup / steps, "floor": floor}


def files(format: str, text: int = 256) -> FilesSource:
    """A data set in a format, its samples with so many tokens of text; where it lies is to be given."""
    return FilesSource(kind="conversations", format=format, text=text)


CAPTIONS = files("shards", 24)  # asked for
PICTURES = replace(CAPTIONS, kind="image-text")  # the same pairs for what compares pictures with captions


def seeing(model: VLMConfig, side: int) -> VLMConfig:
    """A design at another size of pictures."""
    return replace(model, image=replace(model.image, image_size=side))


def square(side: int) -> Square:
    """A picture stretched to a square, its colours as CLIP has them."""
    return Square(side, Scaling(CLIP_MEAN, CLIP_STD))
