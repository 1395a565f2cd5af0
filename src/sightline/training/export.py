"""From a run's folder to a model folder that anyone can load."""

from pathlib import Path

from ..layers.adapted import adapted
from ..zoo import own
from .adapters import save_adapters
from .recipe import Recipe
from .run import final_model, processor_config, tokenizer_of


def export(recipe: Recipe, run: Path, folder: Path) -> Path:
    """Write the run's model after its last finished stage into `folder`; CheckpointError while there is none.

    Adapters are merged; what they were alone is written beside it, into a folder whose name ends in `-adapters`.
    """
    model, stages = final_model(recipe, run)
    if adapted(model):
        save_adapters(
            model,
            folder.with_name(f"{folder.name}-adapters"),
            base=recipe.start if isinstance(recipe.start, str) else "",
        )
    learned = {stage.name: tuple(stage.learn) for stage in stages}
    own.save(model, tokenizer_of(recipe, run), processor_config(recipe, stages[-1]), folder, learned)
    return folder
