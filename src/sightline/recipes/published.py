"""What recipes of published models are written with.

Rates, sizes and steps are those of the paper or the scripts that each recipe names. A batch is what one device was
given, or a share of the whole that fits one; the whole is batch times accumulate. Their data sets are not here, nor are
the parts that they begin from, which are named as they were published.
"""

from dataclasses import replace
from typing import Any, cast

from ..data.tiles import Pipeline
from ..model import VLMConfig
from ..training.recipe import Recipe, Source, Stage
from ..training.sources import FilesSource
from ..zoo.families import habits_of
from ..zoo.family import Row


def published(row: Row, sources: dict[str, Source], stages: tuple[Stage, ...], side: int = 0, **more: Any) -> Recipe:
    """A recipe of a published model, whose pictures, conversations and places are as its own processor has them.

    side: another size of pictures than the model's last. more: further settings of the recipe.
    """
    habits, model = habits_of(row), seeing(row.model, side) if side else row.model
    pixels = cast(Pipeline, habits.pixels({}, model.image.image_size))
    said = {"name": row.name, "model": model, "pixels": pixels, "template": row.name, "codec": habits.codec, **more}
    return Recipe(sources=sources, stages=stages, **said)


def cosine(steps: int, warmup: int, floor: float = 0.0) -> dict[str, Any]:
    """A rate that rises over `warmup` steps and falls along half a cosine to a share of its peak."""
    return {"steps": steps, "warmup": warmup, "schedule": "cosine", "decay": 1 - warmup / steps, "floor": floor}


def linear(steps: int, warmup: int) -> dict[str, Any]:
    """A rate that rises over `warmup` steps and falls along a line to nothing."""
    return {"steps": steps, "warmup": warmup, "decay": 1 - warmup / steps, "floor": 0.0}


def constant(steps: int, warmup: int) -> dict[str, Any]:
    """A rate that rises over `warmup` steps and stays."""
    return {"steps": steps, "warmup": warmup, "decay": 0.0}


def files(format: str, text: int = 256, **more: Any) -> FilesSource:
    """A data set in a format, its samples with so many tokens of text; where it lies is to be given."""
    return FilesSource(kind="conversations", format=format, text=text, **more)


CAPTIONS = files("shards", 24)  # asked for
PICTURES = replace(CAPTIONS, kind="image-text")  # the same pairs for what compares pictures with captions


def seeing(model: VLMConfig, side: int) -> VLMConfig:
    """A design at another size of pictures."""
    return replace(model, image=replace(model.image, image_size=side))
