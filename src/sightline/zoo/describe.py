"""What a design is before any weight is read: its pipeline with shapes, tokens, parameters, memory and operations.

Shapes and operations are not formulas: the model itself runs on the meta device, where tensors have no content.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.layout import Medium, causal_layout
from ..core.patches import Grid, Patches, Tiling
from ..data.batch import Batch
from ..data.media import MAX_PIXELS
from ..data.processor import Expand, ImagePipeline, whole
from ..model import VLM, VLMConfig
from .hollow import Operations, hollow, share_alike
from .numbers import short

QUESTION = 32  # tokens of text that a prompt is counted with
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Station:
    """A stop of the pipeline: what passes it, in which shape, what it is made of."""

    name: str
    shape: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Sight:
    """How a picture of some size is seen: its views by their patches, and the tokens that it takes.

    size: width and height of the picture. tiling: where the model is told how the views lie. around: control tokens
    before, between and after the picture's own.
    """

    size: tuple[int, int]
    grids: tuple[Grid, ...]
    tokens: int
    tiling: Tiling | None = None
    around: int = 0

    @property
    def prompt(self) -> int:
        """Tokens of a prompt of the picture and a question."""
        return self.tokens + self.around + QUESTION

    def note(self, patch: int) -> str:
        """The views as people read them."""
        sides = [f"{columns * patch}x{rows * patch}" for _, rows, columns in self.grids]
        kinds = [f"{sides.count(side)} of {side}" for side in dict.fromkeys(sides)]
        return f"{len(sides)} view{'s' if len(sides) > 1 else ''}: {', '.join(kinds)}"


def sight(cfg: VLMConfig, pixels: ImagePipeline, size: tuple[int, int], expand: Expand = whole) -> Sight:
    """What a model's own picture pipeline makes of a blank picture of this size; InputError for an impossible one."""
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise InputError(
            f"a picture of {size[0]}x{size[1]} pixels, expected sides of 1 or more, at most {MAX_PIXELS} in all"
        )
    seen = pixels.seen(PIL.Image.new("RGB", size))
    patch = cfg.image.patch_size
    grids = tuple((1, view.shape[-2] // patch, view.shape[-1] // patch) for view in seen.pixels)
    with hollow():
        model = VLM(cfg)
    tiling = seen.tiling
    counts = [model.num_tokens(grid) for grid in grids] if tiling is None else [model.num_tokens(grids[0], tiling)]
    parts = expand(seen, counts)
    tokens = sum(part for part in parts if not isinstance(part, str))
    return Sight(size, grids, tokens, tiling, sum(isinstance(part, str) for part in parts))


@dataclass(frozen=True)
class Description:
    """A design in numbers.

    parameters: by part. trained: parameters that learn in each stage. memory: bytes of all weights by number format;
    cache: bytes of keys and values for one token in bf16. flops: multiplications and additions, counted apart, to see
    one picture, to read a prompt of it and 32 tokens of text, and to write one further token.
    """

    name: str
    pipeline: tuple[Station, ...]
    visual_tokens: int
    parameters: Mapping[str, int]
    trained: Mapping[str, int] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    cache: int = 0
    flops: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The description as JSON knows it."""
        return {
            "name": self.name,
            "pipeline": [{"name": s.name, "shape": list(s.shape), "note": s.note} for s in self.pipeline],
            "visual_tokens": self.visual_tokens,
            "parameters": dict(self.parameters),
            "trained": dict(self.trained),
            "memory_bytes": dict(self.memory),
            "cache_bytes_per_token": self.cache,
            "flops": dict(self.flops),
        }

    def lines(self) -> list[str]:
        """The description as people read it."""
        total = sum(self.parameters.values())
        tokens = f"{self.visual_tokens} visual token{'' if self.visual_tokens == 1 else 's'}"
        out = [f"{self.name}: {short(total)} parameters, {tokens} a picture", ""]
        width = max(len(station.name) for station in self.pipeline)
        for i, station in enumerate(self.pipeline):
            shape = "x".join(map(str, station.shape))
            out.append(f"  {'  ' if i == 0 else '→ '}{station.name:<{width}}  {shape:<16}{station.note}".rstrip())
        out += ["", "parameters"]
        out += [
            f"  {part:<10}{short(count):>8}  {100 * count / total:5.1f}%" for part, count in self.parameters.items()
        ]
        if self.trained:
            out += ["", "what each stage trains"]
            out += [
                f"  {stage:<10}{short(count):>8}  {100 * count / total:5.1f}%" for stage, count in self.trained.items()
            ]
        out += ["", "memory of the weights: " + ", ".join(f"{short(b, 'B')} {name}" for name, b in self.memory.items())]
        out += [f"keys and values: {short(self.cache, 'B')} a token in bf16", ""]
        out += [f"operations (FLOPs): {', '.join(f'{short(count)} {name}' for name, count in self.flops.items())}"]
        return out


def describe(
    name: str,
    config: VLMConfig,
    stages: Mapping[str, tuple[str, ...]] | None = None,
    seen: Sight | None = None,
) -> Description:
    """Measure a design for one picture, of its published size or as it is seen; `stages` are patterns over names."""
    with hollow():
        model = VLM(config)
    image, decoder = config.image, config.decoder
    if seen is None:
        grid = (1, image.grid, image.grid)
        cut = f"{image.grid}x{image.grid} of {image.patch_size}x{image.patch_size} pixels"
        seen = Sight((image.image_size, image.image_size), (grid,), model.num_tokens(grid))
    else:
        cut = seen.note(image.patch_size)
    run = _run(model, seen)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    parts = dict.fromkeys(("encoder", "fusion", "decoder", *(name.split(".")[0] for name in sizes)))
    trained = {stage: _matched(sizes, patterns) for stage, patterns in (stages or {}).items()}
    tasks = ("to see a picture", f"to read {seen.prompt} tokens", "to write a token")
    keys = 2 * decoder.depth * (decoder.kv_heads or decoder.heads) * decoder.head_size
    return Description(
        name=name,
        pipeline=_stations(config, seen, cut, run),
        visual_tokens=seen.tokens,
        parameters={part: _matched(sizes, (f"{part}.*",)) for part in parts},
        trained=trained,
        memory={kind: total * size for kind, size in BYTES.items()},
        cache=keys * BYTES["bf16"],
        flops=dict(zip(tasks, run.flops, strict=True)),
    )


def count(config: VLMConfig) -> int:
    """Parameters of a design."""
    with hollow():
        return sum(parameter.numel() for parameter in VLM(config).parameters())


def _matched(sizes: Mapping[str, int], patterns: tuple[str, ...]) -> int:
    """Parameters whose names match any of the patterns."""
    return sum(count for name, count in sizes.items() if any(fnmatchcase(name, pattern) for pattern in patterns))


@dataclass(frozen=True)
class _Run:
    """What a picture and a question become on their way through a model, and the operations that each part takes."""

    patches: Patches
    features: Patches
    bridged: Tensor
    hidden: Tensor
    scores: Tensor
    flops: tuple[int, int, int]  # to see, to read, to write


@torch.no_grad()
def _run(model: VLM, seen: Sight) -> _Run:
    """Send one picture and a question through a model without content."""
    share_alike(model)
    with hollow():
        patches, asked = _picture(model.config, seen)
        prompt, step = _batches(model.config, seen)
        cache = model.new_cache(seen.prompt + 1)
        with Operations() as seeing:
            features = replace(model.encoder(patches), tilings=patches.tilings)
            bridge = model.fusion(features, *asked)
        with Operations() as reading:
            hidden = model(prompt, cache, bridge)
            scores = model.logits(hidden[:, -1:])
        with Operations() as writing:
            model.logits(model(step, cache))
    given = bridge.tokens if bridge.memory is None else bridge.memory.values
    bridged = bridge.ids if given is None else given
    return _Run(patches, features, bridged, hidden, scores, (seeing.count, reading.count, writing.count))


def _picture(cfg: VLMConfig, seen: Sight) -> tuple[Patches, list[Tensor]]:
    """The views of a picture; for a fusion that reads an instruction with each, one as long as the question."""
    values = torch.empty(sum(t * h * w for t, h, w in seen.grids), cfg.image.patch_dim)
    words = min(QUESTION, cfg.instruction_length)
    asked = [torch.zeros(len(seen.grids), words, dtype=torch.int64)] if words else []
    return Patches(values, seen.grids, () if seen.tiling is None else (seen.tiling,)), asked


def _batches(cfg: VLMConfig, seen: Sight) -> tuple[Batch, Batch]:
    """A prompt of a picture and a question, and the token that follows it."""
    length, texts = seen.prompt, seen.prompt - seen.tokens
    # what tokens carry decides which weights they take, and whose a picture is where its memory goes: both are real
    carried = torch.tensor([[Medium.IMAGE] * seen.tokens + [Medium.TEXT] * texts], device="cpu")
    owners = torch.tensor([[0, 0, 1]] * len(seen.grids), device="cpu")
    layout = replace(causal_layout(1, length, "meta"), medium=carried)
    prompt = Batch(torch.zeros(1, length, dtype=torch.int64), layout, torch.arange(seen.tokens), owners=owners)
    layout = replace(causal_layout(1, 1, "meta"), medium=carried[:, -1:])
    step = Batch(torch.zeros(1, 1, dtype=torch.int64), layout, torch.zeros(0, dtype=torch.int64))
    if cfg.beside:  # what is written begins with a token of its own
        return replace(step, source=prompt), step
    return prompt, step


def _stations(cfg: VLMConfig, seen: Sight, cut: str, run: _Run) -> tuple[Station, ...]:
    """The stops of a run, with what each is made of; cut: how the picture became patches."""
    image, decoder = cfg.image, cfg.decoder
    control = f", {seen.around} control" if seen.around else ""
    looked = f"read whole by {decoder.encoder_depth} blocks of their own" if cfg.beside else cfg.look
    heads = f"{decoder.heads} heads ({decoder.kv_heads or decoder.heads} for keys)"
    return (
        Station("picture", (image.channels, *reversed(seen.size))),
        Station("patches", tuple(run.patches.values.shape), cut),
        Station("encoder", tuple(run.features.values.shape), image.note),
        Station("fusion", tuple(run.bridged.shape), cfg.fusion.note),
        Station(
            "sequence",
            (seen.prompt, run.hidden.shape[2]),
            f"{seen.tokens} visual{control} and {QUESTION} text tokens, {looked}",
        ),
        Station("decoder", tuple(run.hidden.shape[1:]), f"{decoder.depth} blocks, {heads}, {decoder.activation}"),
        Station("next token", tuple(run.scores.shape[2:]), "scores over the vocabulary"),
    )
