"""From a run's folder to a model folder that anyone can load."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..core.config import from_dict
from ..core.errors import ConfigError
from ..language.tokenizer import Tokenizer
from ..layers.adapted import adapted
from ..zoo import own
from ..zoo.checkpoint import read_json
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


def average(folders: Sequence[Path], target: Path) -> Path:
    """Write the mean of the weights of some model folders into another (model soups, arXiv:2203.05482).

    All but the weights is the last one's; ConfigError where another has another design.
    """
    cards = [own.read_card(folder) for folder in folders]
    for folder, card in zip(folders, cards, strict=True):
        if card.model != cards[-1].model:
            raise ConfigError(f"{folder}: not the design of {folders[-1]}, whose mean is asked for")
    mean, states = own.load_model(folders[-1]), [own.load_model(folder).state_dict() for folder in folders]
    with torch.no_grad():
        for name, value in mean.state_dict().items():
            value.copy_(torch.stack([state[name].double() for state in states]).mean(0))
    processor = from_dict(own.ProcessorConfig, read_json(folders[-1] / "processor.json"), "processor.json")
    own.save(mean, Tokenizer.from_folder(folders[-1]), processor, target, cards[-1].stages)
    return target
