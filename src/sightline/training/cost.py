"""What a sample costs a stage, measured on a model without content: tokens, operations, memory until the gradients.

Nothing here is a formula over layers: the model runs on the meta device with exactly the stage's parameters asking for
gradients, and autograd itself says which products have one and what it keeps for them.
"""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import CapacityError, DataError, InputError
from ..core.layout import Medium, causal_layout
from ..core.patches import Patches
from ..core.sequence import Conversation, Region, Text, images_of
from ..data.batch import Batch
from ..model import VLM
from ..zoo.hollow import Operations
from .recipe import Source
from .sources import FilesSource, Sample, ScenesSource

WORD = re.compile(r"\w+|[^\w\s]")
LOOKED_AT = 8  # samples
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Usual:
    """A usual sample of a source: how many pictures, how many tokens of text; both may be a guess."""

    pictures: int
    text: int
    guess: bool = False


@dataclass(frozen=True)
class Cost:
    """What one sample costs.

    visual: tokens of pictures. forward, backward: multiplications and additions, counted apart. kept: numbers that stay
    until the gradients are made. copied, joined: weights of products with gradients that are kept in another precision,
    and those of them that are joined into one product; however many samples there are.
    """

    visual: int = 0
    text: int = 0
    forward: int = 0
    backward: int = 0
    kept: int = 0
    copied: int = 0
    joined: int = 0

    @property
    def tokens(self) -> int:
        return self.visual + self.text

    @property
    def operations(self) -> int:
        return self.forward + self.backward

    def memory(self, batch: int, precision: str) -> int:
        """Bytes of what so many samples at a time keep, in this precision."""
        copies = 4 * self.joined if precision == "fp32" else BYTES[precision] * self.copied
        return BYTES[precision] * self.kept * batch + copies


class Tape(Operations):
    """Counts the operations of a forward pass, and of the backward pass that would follow, while it is on.

    A product of two operands has as many operations again for each of them that asks for gradients, attention twice as
    many. kept: numbers that autograd keeps, weights apart.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backward = self.kept = self.copied = self.joined = 0
        self.weights = {_place(p): p.numel() for p in model.parameters()}
        self.cat: dict[int, Tensor] = {}
        self.storages: dict[int, Tensor] = {}  # held, so that none of their numbers is given twice

    def __enter__(self) -> "Tape":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x)
        self.hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.hooks.__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self.count
        out = super().__torch_function__(func, types, args, kwargs)
        if func is torch.cat and all(_place(part) in self.weights for part in args[0]):
            self.cat[_place(out)] = out
        spent = self.count - before
        if not spent:
            return out
        if func is F.scaled_dot_product_attention:
            self.backward += 2 * spent * out.requires_grad
            return out
        self.backward += spent * sum(each.requires_grad for each in args[:2])
        if args[0].requires_grad and func is F.linear:
            self.copied += args[1].numel()
            self.joined += args[1].numel() if _place(args[1]) in self.cat else 0
        return out

    def _keep(self, x: Tensor) -> Tensor:
        place = _place(x)
        if place not in self.weights and place not in self.cat and place not in self.storages and x.is_floating_point():
            self.storages[place] = x
            self.kept += x.untyped_storage().nbytes() // x.element_size()
        return x


def _place(x: Tensor) -> int:
    """What tells one storage from another, on the meta device as well."""
    return int(x.untyped_storage()._cdata)


def cost(model: VLM, sample: Usual, reads: bool = True) -> Cost:
    """What such a sample costs a model without content whose learned parameters ask for gradients.

    reads: whether the decoder is part of it; else the encoder is, and the fusion where it learns.
    """
    image, count, text = model.config.image, sample.pictures, max(sample.text, 1)
    grid = (1, image.grid, image.grid)
    visual = count * model.num_tokens(grid) if reads else count * image.grid**2
    with torch.device("meta"), Tape(model) as tape:
        patches = Patches(torch.empty(count * image.grid**2, image.patch_dim), (grid,) * count) if count else None
        if reads:
            asked = min(text, model.config.instruction_length)
            # what tokens carry decides which weights they take, and whose a picture is where its memory goes
            carried = torch.tensor([[Medium.IMAGE] * visual + [Medium.TEXT] * text], device="cpu")
            prompt = Batch(
                torch.zeros(1, visual + text, dtype=torch.int64),
                replace(causal_layout(1, visual + text, "meta"), medium=carried),
                torch.arange(visual),
                patches,
                instruction=torch.zeros(count, asked, dtype=torch.int64) if asked and count else None,
                owners=torch.tensor([[0, 0, k + 1] for k in range(count)], device="cpu") if count else None,
            )
            scores = model.logits(model(prompt, rows=torch.arange(visual, visual + text)))
            F.cross_entropy(scores, torch.zeros(text, dtype=torch.int64))
        elif patches is not None:
            features = model.encoder(patches)
            if any(p.requires_grad for p in model.fusion.parameters()):
                model.fusion(features)
    return Cost(visual, sample.text, tape.count, tape.backward, tape.kept, tape.copied, tape.joined)


# ---------------------------------------------------------------------------------------------------------- samples


def usual(source: Source) -> Usual:
    """A usual sample of a source: the mean of some that can be used, or what it says itself while it names no file."""
    if isinstance(source, FilesSource) and not source.path:
        return Usual(1, source.text, guess=True)
    first = source.grown if isinstance(source, ScenesSource) else 0
    count = min(LOOKED_AT, source.length or LOOKED_AT)
    samples = []
    for k in range(count):
        with suppress(DataError, InputError, CapacityError):  # a run passes over what cannot be used
            samples.append(source(0, 0, first + k))
    if not (count := len(samples)):
        return Usual(1, source.text if isinstance(source, FilesSource) else 0, guess=True)
    pictures = sum(len(images_of(_talk(s))) or int(s.image is not None) for s in samples)
    return Usual(round(pictures / count), round(sum(map(_length, samples)) / count))


def _talk(sample: Sample) -> Conversation:
    """All that is said in a sample, of two answers both."""
    answers = (each for each in (sample.chosen, sample.rejected) if each is not None)
    return (*sample.conversation, *answers)


def _length(sample: Sample) -> int:
    """Tokens of a sample's text, about: words and signs, six for a place, two around each message."""
    talk = _talk(sample)
    total = 2 * len(talk)
    for message in talk:
        for part in message.parts:
            if isinstance(part, Text):
                total += len(WORD.findall(part.text))
            elif isinstance(part, Region):
                total += 6 + len(WORD.findall(part.shape.label))
    return total


# ------------------------------------------------------------------------------------------------------- this machine


def matmul_rate(precision: str, seconds: float = 0.3, side: int = 1024) -> float:
    """Operations a second that this machine does in a large product of matrices, the best of what fits in the time."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.rand(side, side).to(dtype)
    a @ a  # what a first product sets up is not timed
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds or best == float("inf"):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
