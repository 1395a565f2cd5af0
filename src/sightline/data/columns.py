"""An example while it is written, column by column, and the tensors that it becomes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.layout import Axes, Medium, framed as frames_of
from ..core.patches import Grid, Patches
from ..encoders.audio import Sounds
from ..grounding.heads import PlaceTargets
from ..grounding.sampler import Regions
from .batch import IGNORE, Example
from .images import Seen, ways


@dataclass
class Columns:
    """The columns of an example while it is written."""

    ids: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    medium: list[int] = field(default_factory=list)
    item: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # slots of each picture
    # first token of each view, grid of its patches, seconds of a step of time
    media: list[tuple[int, Grid, float]] = field(default_factory=list)
    sounds: list[int] = field(default_factory=list)  # slots of sounds
    frames: list[Tensor] = field(default_factory=list)  # of each sound
    regions: list[Regions] = field(default_factory=list)
    places: list[PlaceTargets] = field(default_factory=list)

    def add(self, ids: Sequence[int], block: int, step: int, learned: bool, medium: Medium, item: int) -> int:
        """Append tokens whose block goes up by `step` each, from `block` on; return the next block."""
        self.ids += ids
        self.block += [block + step * i for i in range(len(ids))]
        self.learned += [learned] * len(ids)
        self.medium += [medium] * len(ids)
        self.item += [item] * len(ids)
        return block + step * len(ids)

    def example(self, seen: Sequence[Seen], causal: bool, framed: bool, axes: Axes | None) -> Example:
        """What was written, with the pictures that it is about; the rest is as in `data.processor.Processor`."""
        ids = torch.tensor(self.ids)
        labels = torch.full_like(ids, IGNORE)
        labels[:-1] = torch.where(torch.tensor(self.learned[1:], dtype=torch.bool), ids[1:], IGNORE)
        slots, medium = torch.tensor(self.slots, dtype=torch.int64), torch.tensor(self.medium)
        position = torch.arange(len(ids))
        if framed:
            still, last = frames_of(slots, self.counts)
            medium[last] = Medium.TEXT
            position = torch.ones_like(ids).index_fill(0, still, 0).cumsum(0) - 1
        if axes is not None:
            position = axes.positions(len(ids), self.media)
        return Example(
            ids=ids,
            block=torch.tensor(self.block),
            position=position,
            medium=medium,
            item=torch.tensor(self.item),
            branch=torch.zeros_like(ids),
            labels=labels,
            slots=slots,
            pixels=tuple(pixels for each in seen for pixels in each.pixels),
            transforms=tuple(ways(seen)),
            tilings=tuple(each.tiling for each in seen if each.tiling is not None),
            causal=causal,
            sounds=self._sounds(),
            regions=Regions.joined(self.regions) if self.regions else None,
            places=PlaceTargets.joined(self.places) if self.places else None,
        )

    def _sounds(self) -> Sounds | None:
        """The sounds that were written."""
        if not self.frames:
            return None
        grids = tuple((len(frames), 1, 1) for frames in self.frames)
        return Sounds(torch.tensor(self.sounds), Patches(torch.cat(self.frames), grids))
