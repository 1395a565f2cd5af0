"""Whether what a stage has learned can be saved: room on the disk, values that are numbers, and whose they are."""

import hashlib
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import nn

from ..core.errors import SightlineError
from . import checkpoints, sharding

ROOM = 1.1  # of the bytes of a checkpoint: its headers, and what else is written


class Unsaved(SightlineError):
    """Checkpoints could not be written, several times in a row, or there is no room for them from the start."""

    exit_code = 75


class NonFinite(SightlineError):
    """The loss or its gradients were not numbers, several times in a row, or weights are none."""

    exit_code = 65


def design(model: nn.Module, objective: nn.Module) -> str:
    """What tells the weights of one model and objective from those of others: a digest of all names and shapes."""
    everything = (*model.state_dict().items(), *objective.state_dict().items())
    shapes = "\n".join(f"{name} {list(value.shape)}" for name, value in everything)
    return hashlib.sha256(shapes.encode()).hexdigest()[:16]


def bytes_of(modules: Iterable[nn.Module], learned: Collection[nn.Parameter]) -> int:
    """About how large a checkpoint is: all weights, and two moments in float32 of those that learn."""
    weights = sum(x.numel() * x.element_size() for module in modules for x in module.state_dict().values())
    return weights + 8 * sum(parameter.numel() for parameter in learned)


def check_room(folder: Path, size: int) -> None:
    """Unsaved where a disk cannot hold the next checkpoint of a folder beside its last one."""
    wanted = int(ROOM * size * (1 if checkpoints.listed(folder) else 2))
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if (free := shutil.disk_usage(above).free) < wanted:
        raise Unsaved(f"{folder}: its checkpoints need {wanted:,} bytes at least, {free:,} are free")


def not_numbers(modules: Iterable[nn.Module]) -> str:
    """The first parameter of which this process has values that are not numbers, if any."""
    named = (pair for module in modules for pair in module.named_parameters())
    return next((name for name, value in named if not bool(torch.isfinite(sharding.local(value)).all())), "")
