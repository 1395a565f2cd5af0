"""From a run's folder to a model folder that anyone can load."""

from pathlib import Path

from ..layers.adapted import adapted
from ..zoo import own
from .adapters import save_adapters
from .judging import files_of, with_head
from .recipe import Recipe
from .run import final_model, head_of, last_of, processor_config, tokenizer_of
from .settings import RewardConfig


def export(recipe: Recipe, run: Path, folder: Path) -> Path:
    """Write the run's model after its last finished stage into `folder`; CheckpointError while there is none.

    Adapters are merged; what they were alone is written beside it, into a folder whose name ends in `-adapters`. Where
    that stage learned a reward model, its head is among the files, and the folder can be named as a reward.
    """
    model, stages = final_model(recipe, run)
    beside: dict[str, bytes] = {}
    if "reward" in stages[-1].terms and (found := last_of(run, stages[-1])):
        cfg: RewardConfig = stages[-1].settings("reward")
        beside = files_of(with_head(head_of(found), cfg, model, found.path).head, cfg)
    if adapted(model):
        save_adapters(
            model,
            folder.with_name(f"{folder.name}-adapters"),
            base=recipe.start if isinstance(recipe.start, str) else "",
        )
    learned = {stage.name: tuple(stage.learn) for stage in stages}
    own.save(model, tokenizer_of(recipe, run), processor_config(recipe, stages[-1]), folder, learned, beside=beside)
    return folder
