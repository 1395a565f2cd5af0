"""From a run's folder to a model folder that anyone can load."""

from pathlib import Path

from ..zoo import own
from .recipe import Recipe
from .run import final_model, tokenizer_of


def export(recipe: Recipe, run: Path, folder: Path) -> Path:
    """Write the run's model after its last stage into `folder`; CheckpointError while no stage is finished."""
    settings = own.ProcessorConfig(recipe.pixels, recipe.template, recipe.codec, max_length=recipe.max_length)
    stages = {stage.name: tuple(stage.learn) for stage in recipe.stages}
    own.save(final_model(recipe, run), tokenizer_of(recipe, run), settings, folder, stages)
    return folder
