"""What a sample costs a stage, measured on a model without content: tokens, operations, memory until the gradients.

Nothing here is a formula over layers: the model runs on the meta device with exactly the stage's parameters asking for
gradients, and autograd itself says which products have one and what it keeps for them.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.layout import Medium, causal_layout
from ..core.patches import Patches
from ..core.sequence import Conversation, Region, Text, images_of
from ..data.batch import Batch
from ..data.tiles import Pipeline
from ..layers.attention import is_explicit
from ..model import VLM
from ..zoo.hollow import Operations, hollow
from . import distributed
from .loader import unusable
from .recipe import Recipe, Source, Stage
from .representation import Representation
from .sources import FilesSource, Sample, ScenesSource

WORD = re.compile(r"\w+|[^\w\s]")
LOOKED_AT = 8  # samples
TRIED = 32  # samples of which so many are to be found that can be used
PICTURE = 640, 480  # a usual one, as in COCO, while there are no files
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
    until the gradients are made; scores: those of them that are scores of attention. copied, joined: weights of
    products with gradients that are kept in another precision, and those of them that are joined into one product;
    however many samples there are.
    """

    visual: int = 0
    text: int = 0
    forward: int = 0
    backward: int = 0
    kept: int = 0
    scores: int = 0
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
    many. kept: numbers that autograd keeps, weights apart; scores: those of them that are scores of attention, where
    the pass would be one on `device` in `precision` that keeps these.
    """

    def __init__(self, model: nn.Module, device: str = "meta", precision: str = "fp32") -> None:
        super().__init__()
        self.explicit = partial(is_explicit, device, torch.bfloat16 if precision == "bf16" else torch.float32)
        self.backward = self.kept = self.scores = self.copied = self.joined = 0
        self.weights = {_place(p): p.numel() for p in model.parameters()}
        self.cat: dict[int, Tensor] = {}
        self.storages: dict[int, Tensor] = {}  # held, so that none of their numbers is given twice
        self.tables: dict[int, Tensor] = {}  # of scores

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
        if func is F.scaled_dot_product_attention:  # in parts without content, of which no kernel keeps what it would
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                out = super().__torch_function__(func, types, args, kwargs)
            out = self._attended(*args[:3], out) if out.requires_grad else out
        else:
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

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """What attention gives, keeping what it does where the pass would be."""
        beside: tuple[Tensor, ...] = out, out[..., 0].clone()  # of a fused kernel: a sum for each row of scores
        if self.explicit(k.shape[-2]):
            table = torch.empty(*q.shape[:-1], k.shape[-2], dtype=q.dtype, device="meta")
            self.tables[_place(table)], beside = table, (table,)
        given: Tensor = _Attended.apply(out, q, k, v, *beside)  # type: ignore[no-untyped-call]
        return given

    def _keep(self, x: Tensor) -> Tensor:
        place = _place(x)
        if place not in self.weights and place not in self.cat and place not in self.storages and x.is_floating_point():
            self.storages[place] = x
            self.kept += x.untyped_storage().nbytes() // x.element_size()
            self.scores += x.numel() if place in self.tables else 0
        return x


class _Attended(torch.autograd.Function):
    """What attention gives, and what it keeps for its gradients."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return out


def _place(x: Tensor) -> int:
    """What tells one storage from another, on the meta device as well."""
    return int(x.untyped_storage()._cdata)


def cost(
    model: VLM,
    sample: Usual,
    reads: bool = True,
    taught: Representation | None = None,
    device: str = "meta",
    precision: str = "fp32",
) -> Cost:
    """What such a sample costs a model without content whose learned parameters ask for gradients.

    reads: whether the decoder is part of it; else the encoder is, and the fusion where it learns, as often as what it
    is taught by has it read the picture and its words. device, precision: where and in what it would be computed, on
    which hangs what attention keeps.
    """
    grid, count, parts = model.config.image.grid, sample.pictures, (model, *([taught] if taught else []))
    with torch.device("meta"), Tape(nn.ModuleList(parts), device, precision) as tape:
        if reads:
            prompt = _prompt(model, sample)
            visual = len(prompt.slots)
            scores = model.logits(model(prompt, rows=torch.arange(visual, prompt.ids.shape[1])))
            F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64))
        else:
            visual = count * grid**2
            if count:
                pictures = _pictures(model, count)
                if taught is not None:
                    taught.rehearse(model.fusion, model.encoder(pictures).dense(), max(sample.text, 1))
                elif any(p.requires_grad for p in model.fusion.parameters()):
                    model.see(pictures, _instruction(model, sample))
                else:
                    model.encoder(pictures)
    return Cost(visual, sample.text, tape.count, tape.backward, tape.kept, tape.scores, tape.copied, tape.joined)


def kept(model: VLM, sample: Usual, device: str, precision: str) -> tuple[int, int]:
    """Numbers that stay of such a sample, of which one token is learned, until the gradients are made.

    Those that are scores of attention, which grow with the square of its length, come second.
    """
    with torch.device("meta"), Tape(model, device, precision) as tape:
        prompt = _prompt(model, sample)
        out = model(prompt, rows=torch.arange(1) + prompt.ids.shape[1] - 1)
    # what blocks that are computed again note down is let go of where there are no gradients
    return (tape.kept - tape.scores, tape.scores) if out.requires_grad else (0, 0)


def _pictures(model: VLM, count: int) -> Patches:
    image = model.config.image
    return Patches(torch.empty(count * image.grid**2, image.patch_dim), ((1, image.grid, image.grid),) * count)


def _instruction(model: VLM, sample: Usual) -> Tensor | None:
    """What a fusion reads with each picture, where it reads any text."""
    asked = min(max(sample.text, 1), model.config.instruction_length)
    return torch.zeros(sample.pictures, asked, dtype=torch.int64) if asked and sample.pictures else None


def _prompt(model: VLM, sample: Usual) -> Batch:
    """A row without content of so many pictures and so much text; on the meta device."""
    count, text = sample.pictures, max(sample.text, 1)
    visual = count * model.num_tokens((1, model.config.image.grid, model.config.image.grid))
    # what tokens carry decides which weights they take, and whose a picture is where its memory goes
    carried = torch.tensor([[Medium.IMAGE] * visual + [Medium.TEXT] * text], device="cpu")
    return Batch(
        torch.zeros(1, visual + text, dtype=torch.int64),
        replace(causal_layout(1, visual + text, "meta"), medium=carried),
        torch.arange(visual),
        _pictures(model, count) if count else None,
        instruction=_instruction(model, sample),
        owners=torch.tensor([[0, 0, k + 1] for k in range(count)], device="cpu") if count else None,
    )


def taught_by(recipe: Recipe, stage: Stage, model: VLM) -> Representation | None:
    """What teaches a Q-Former by itself, without content, where a stage does."""
    if "qformer" not in stage.terms:
        return None
    with hollow():
        return Representation(model, recipe.model.decoder.vocab_size, 0, stage.settings("qformer"))


# ---------------------------------------------------------------------------------------------------------- samples


def usual_samples(recipe: Recipe, stage: Stage) -> dict[str, Usual]:
    """A usual sample of each source that a stage learns from."""
    return {name: usual(recipe.sources[name], recipe.pixels) for name in stage.data}


def usual(source: Source, pixels: Pipeline | None = None) -> Usual:
    """A usual sample of a source: the mean of some, or what it says itself while it has none that can be used.

    pixels: what makes several pictures of one, such as tiles, each of which counts.
    """
    samples = _some(source)
    if not samples and isinstance(source, FilesSource):
        return Usual(_views(PIL.Image.new("RGB", PICTURE), pixels), source.text, guess=True)
    images = [image for s in samples for image in images_of(_talk(s)) or ([s.image] if s.image is not None else [])]
    pictures = sum(_views(image.picture, pixels) for image in images)
    return Usual(round(pictures / len(samples)), round(sum(map(_length, samples)) / len(samples)))


def _some(source: Source) -> list[Sample]:
    """The first samples of a source that can be used; none of files while it names none."""
    if isinstance(source, FilesSource) and not source.path:
        return []
    first, found = source.grown if isinstance(source, ScenesSource) else 0, []
    for k in range(min(TRIED, source.length or TRIED)):
        try:
            found.append(source(0, 0, first + k))
        except Exception as error:
            if not unusable(error) or not isinstance(source, FilesSource):
                raise
        if len(found) == LOOKED_AT:
            break
    return found


def _views(picture: PIL.Image.Image, pixels: Pipeline | None) -> int:
    """How many pictures are made of one."""
    return 1 if pixels is None else len(pixels.seen(picture).pixels)


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
    """Operations a second that a large product of matrices does where a run here would, the best of those timed."""
    device = torch.device(distributed.device())
    side *= 8 if device.type == "cuda" else 1
    a = torch.rand(side, side, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)

    def product() -> float:
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    product()  # what a first one sets up is not timed
    best, begun = product(), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        best = min(best, product())
    return 2 * side**3 / best


def machine_memory() -> int:
    """Bytes of memory that a run here would have: of its GPU, if there is one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(distributed.device()).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
