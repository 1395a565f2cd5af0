"""How much memory a batch will take, known before any of it is asked for.

A system that has promised more than it has ends a process without a word: what cannot be had must not be begun.
"""

import ctypes
import math
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from ..core.patches import Grid
from ..data.batch import IGNORE, Batch
from ..language.decoder import apart
from ..layers.attention import LONGEST
from ..model import VLM
from ..zoo.hollow import hollow
from ..zoo.numbers import short
from .adapters import adapt
from .cost import BYTES, Usual, cost, kept, taught_by
from .objectives import AT_ONCE
from .recipe import Recipe, Stage, freeze, learning_rates
from .tensor_parallel import divided

STACKS = ("blocks", "gated", "encoder_blocks")  # names that parts of models have for their lists of blocks
TEXT = 16  # tokens of the samples that are measured


def recompute(model: VLM) -> None:
    """Let every block of the encoder and of what reads and writes keep its input only, and be computed again.

    An encoder of codes has no blocks that gradients reach.
    """
    stacks = (getattr(part, name, ()) for part in (model.encoder, model.decoder) for name in STACKS)
    for block in (block for stack in stacks for block in stack):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Budget:
    """Bytes that a stage keeps of a batch until its gradients are made; the least it takes.

    token: of each token of its rows, padding among them, where it has pictures; text: where it has none. patch: of
    each patch of its pictures, beside the tokens that they become. alone: of each patch where nothing else is read.
    score: of each learned token, as long as all of these are kept at once.
    token_pair, text_pair, patch_pair, alone_pair: of each two of them that attend to each other, where scores are kept.
    usual: the patches of a picture that these were measured with.
    """

    token: float = 0.0
    text: float = 0.0
    patch: float = 0.0
    alone: float = 0.0
    score: float = 0.0
    token_pair: float = 0.0
    text_pair: float = 0.0
    patch_pair: float = 0.0
    alone_pair: float = 0.0
    usual: int = 0

    def of(self, batch: Batch) -> int:
        """What a batch takes."""
        tokens, patches = batch.ids.numel(), 0 if batch.patches is None else len(batch.patches.values)
        seen = sum(map(self._pairs, () if batch.patches is None else batch.patches.grids))
        if not tokens:
            return int(self.alone * patches + self.alone_pair * seen)
        each, pair = (self.token, self.token_pair) if patches else (self.text, self.text_pair)
        sides = [batch.ids.shape[1]] * len(batch.ids)
        if (runs := apart(batch.layout)) is not None:
            sides = [stop - start for _, start, stop in runs]
        found = each * tokens + self.patch * patches + self.patch_pair * seen
        found += pair * sum(side**2 for side in sides if side <= LONGEST)
        learned = 0 if batch.labels is None else int((batch.labels != IGNORE).sum())
        return int(found + min(self.score * learned, 4 * AT_ONCE)) if found else 0

    def _pairs(self, grid: Grid) -> int:
        """Pairs of patches of a picture that attend to each other; a patch of a large one has no more than usual."""
        times, patches = grid[0], grid[1] * grid[2]
        return times * patches * min(patches, self.usual) if patches <= LONGEST else 0


def budget_of(recipe: Recipe, stage: Stage, together: int = 1, device: str = "cpu") -> Budget:
    """What a stage takes on a process that computes blocks with others, `together` of them, measured without content.

    device: the kind it computes on, which decides whether scores of attention are kept. Of an encoder-decoder nothing
    is foreseen.
    """
    if recipe.model.beside:
        return Budget()
    with hollow():
        model = VLM(divided(recipe.model, together) if together > 1 else recipe.model)
        adapt(model, stage.learn)
    freeze(model, learning_rates(model, stage.learn))
    if stage.recompute:
        recompute(model)
    size, patches = BYTES[stage.precision], model.config.image.grid**2
    visual = model.num_tokens((1, model.config.image.grid, model.config.image.grid))

    def measured(pictures: int, times: int) -> tuple[int, int]:
        return kept(model, Usual(pictures, times * TEXT), device, stage.precision)

    (seen, few), (longer, more), (_, most) = (measured(1, times) for times in (1, 2, 3))
    (brief, _), (said, pairs) = measured(0, 1), measured(0, 2)
    token, text = (longer - seen) / TEXT, (said - brief) / TEXT
    alone = cost(model, Usual(1, 0), False, taught_by(recipe, stage, model), device, stage.precision)
    token_pair = looked = 0.0
    if visual + 3 * TEXT <= LONGEST:  # else rows with pictures are too long for scores to be kept
        token_pair = (most - 2 * more + few) / (2 * TEXT**2)
        crossed = more - few - token_pair * TEXT * (2 * visual + 3 * TEXT)  # of text with what is beside it
        looked = max(0.0, few - crossed - token_pair * (visual + TEXT) ** 2)
    return Budget(
        token=size * token,
        text=size * text,
        patch=size * max(0.0, seen - token * (visual + TEXT)) / patches,
        alone=size * (alone.kept - alone.scores) / patches,
        score=4 * recipe.model.decoder.vocab_size,
        token_pair=size * token_pair,
        text_pair=size * pairs / (2 * TEXT) ** 2,
        patch_pair=size * looked / patches**2,
        alone_pair=size * alone.scores / patches**2,
        usual=patches,
    )


# -------------------------------------------------------------------------------------------------- what there is left


def room(device: torch.device) -> float:
    """Bytes that this process can still have, as far as the system says so."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return min(_limits(), default=math.inf)


class Memory:
    """What batches take of a device, and whether it has as much.

    fitted: bytes of the largest batch that there was room for; of smaller ones it is not asked again.
    """

    def __init__(self, budget: Budget, device: torch.device) -> None:
        self.budget, self.device, self.fitted = budget, device, 0

    def lacks(self, micro: Sequence[Batch], beside: int) -> str:
        """What is wrong with batches, one at a time, that there is no room for; nothing where there is.

        beside: bytes that will be asked for with them.
        """
        needed = max(map(self.budget.of, micro))
        if needed <= self.fitted:
            return ""
        if (free := room(self.device)) < needed + beside:
            give_back()
            free = room(self.device)
        if free < needed + beside:
            return f"would take {short(needed + beside, 'B')} of memory, {short(max(free, 0), 'B')} are free"
        self.fitted = needed
        return ""


def give_back() -> None:
    """Hand what was freed, and is kept for what is asked for next, back to the system, which then counts it."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _limits() -> Iterator[float]:
    """What is left of each limit: the process's own, the machine's memory, and its control group's."""
    own, machine = _numbers(Path("/proc/self/status")), _numbers(Path("/proc/meminfo"))
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and used in own:
            yield most - 1024 * own[used]
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of the run on this machine
    if "MemAvailable" in machine:
        yield 1024 * (machine["MemAvailable"] + machine.get("SwapFree", 0)) / beside
    with suppress(OSError, ValueError, IndexError):
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().split("::/")[1].splitlines()[0]
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))  # or "max"
        files = _numbers(group / "memory.stat")
        yield (most - used + files.get("inactive_file", 0) + files.get("active_file", 0)) / beside


def _numbers(path: Path) -> dict[str, int]:
    """The numbers of a file of names and numbers; none where there is no such file."""
    found = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, *rest = line.replace(":", " ").split()
            if rest and rest[0].isdecimal():
                found[name] = int(rest[0])
    return found
