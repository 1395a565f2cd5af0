"""Adapters: what a stage puts beside weights that it does not change, and the layout of peft, in and out.

A published model may hold several of our maps as one, their rows joined (Qwen's queries, keys and values). Its adapter
is then one of the sum of their ranks, and one that was made there is taken apart by rows; both are exact.
"""

import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import config, nearest
from ..core.errors import CheckpointError, ConfigError
from ..layers.adapted import AdaptedLinear, adapted
from ..zoo.checkpoint import read_file, read_json, write_tensors
from ..zoo.families import FAMILIES
from ..zoo.keymap import SAME, Reshape

HEADS = ("head", "extra_head")  # maps to the vocabulary
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PLAIN = {
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "target_parameters": None,
}
NOWHERE = "is no linear map in the published model, an adapter of it has no place there"
KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?")


@config
class Lora:
    """How adapters learn: LoRA (arXiv:2106.09685), or DoRA (arXiv:2402.09353), at a rate of their own.

    alpha: the update is multiplied by alpha / rank; None: alpha is the rank. dropout: the share of inputs that an
    update does not see in training.
    """

    rank: int = 64
    alpha: float | None = None
    rate: float = 2e-4
    dora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"an adapter of rank {self.rank}, expected at least 1")
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigError(f"an adapter's alpha is {self.alpha:g}, expected more than 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"an adapter's dropout is {self.dropout:g}, expected from 0 to less than 1")

    def beside(self, base: nn.Linear) -> AdaptedLinear:
        """A linear map with a new adapter."""
        return AdaptedLinear(base, self.rank, self.alpha or self.rank, self.dora, self.dropout)

    def __str__(self) -> str:
        kind = "DoRA" if self.dora else "LoRA"
        return f"{self.rate:g}, {kind} of rank {self.rank}, alpha {self.alpha or self.rank:g}"


Learning = Mapping[str, float | Lora]


def nearest_pattern(pattern: str, names: Iterable[str]) -> str:
    """The ending of a message about a pattern that matches no parameter: the nearest one, or the parts of the model."""
    parts = {f"{name.partition('.')[0]}.*" for name in names}
    return nearest(pattern, {*names, *parts}, parts)


def adapt(model: nn.Module, learn: Learning) -> None:
    """Put an adapter beside every linear map that a `Lora` of these patterns names, in place.

    Of several patterns the last counts. None lands on a weight that another pattern learns in full nor, unless it is
    named exactly, on the head. ConfigError where nothing is left for a pattern, or an adapter is there already.
    """
    maps = {f"{name}.weight": name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    full = [pattern for pattern, how in learn.items() if not isinstance(how, Lora)]
    free = [weight for weight in maps if not any(fnmatchcase(weight, pattern) for pattern in full)]
    chosen: dict[str, Lora] = {}
    for pattern, how in learn.items():
        if not isinstance(how, Lora):
            continue
        found = [w for w in free if fnmatchcase(w, pattern) and (w == pattern or w.split(".")[-2] not in HEADS)]
        if not found:
            raise ConfigError(
                f"pattern {pattern!r} leaves no linear map for an adapter{nearest_pattern(pattern, maps)}"
            )
        chosen |= dict.fromkeys((maps[weight] for weight in found), how)
    there = adapted(model)
    for name, lora in chosen.items():
        if name in there:
            raise ConfigError(f"{name} has an adapter already; merge it before another is learned")
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        model.set_submodule(name, lora.beside(base))


# ------------------------------------------------------------------------------------------------------- peft's layout


def save_adapters(model: Any, folder: Path, family: str = "sightline", base: str = "") -> None:
    """Write a model's adapters as peft does, under the names that maps have in transformers' model of the family.

    base: the name or folder of the model that they stand beside. ConfigError where peft's layout cannot say what the
    adapters are; CheckpointError for a map that is no linear one there.
    """
    there = adapted(model)
    if not there:
        raise ConfigError("the model has no adapters to save")
    if len({module.magnitude is None for module in there.values()}) > 1:
        raise ConfigError("adapters of LoRA and of DoRA in one model, expected one kind, as peft's layout knows")
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    names = _names(model, family)
    for name in there.keys() - {each for ours, _ in names.values() for each in ours}:
        raise CheckpointError(f"{name} {NOWHERE}")
    for name, (ours, reshape) in names.items():
        if any(each in there for each in ours):
            parts = _joined([model.get_submodule(each) for each in ours], _rows(name, model, ours, reshape))
            sizes[name] = len(parts["lora_A.weight"]), parts.pop("alpha").item()
            tensors |= {f"{PREFIX}{name}.{part}": value for part, value in parts.items()}
    rank, alpha = next(iter(sizes.values()))
    one = next(iter(there.values()))
    settings = {
        **PLAIN,
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": one.dropout,
        "use_dora": one.magnitude is not None,
        "target_modules": sorted(sizes),
        "rank_pattern": {re.escape(name): r for name, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, (_, a) in sizes.items() if a != alpha},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")


@torch.no_grad()
def load_adapters(model: Any, folder: Path, family: str = "sightline") -> None:
    """Put the adapters of a folder of peft's beside a model's maps; CheckpointError for what has no place in it."""
    settings = read_json(folder / SETTINGS)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: adapters of kind {settings.get('peft_type')!r}, expected 'LORA'")
    for key, usual in PLAIN.items():
        if settings.get(key) not in (None, usual):
            raise CheckpointError(f"{folder / SETTINGS}: {key} is {settings[key]!r}, expected {usual!r}")
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in read_file(folder / WEIGHTS).items():
        match = KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{folder / WEIGHTS}: {key} is no part of an adapter of a linear map")
        found.setdefault(match["module"], {})[match["part"]] = value
    names = _names(model, family)
    for theirs, parts in found.items():
        name = _module(family, theirs)
        if name not in names:
            raise CheckpointError(f"{folder}: the model has no place for an adapter of {theirs}{nearest(name, names)}")
        ours, reshape = names[name]
        bases = [model.get_submodule(each) for each in ours]
        rank = _check(folder, theirs, parts, bases)
        alpha = _setting(settings, "alpha_pattern", "lora_alpha", theirs)
        if settings.get("use_rslora"):
            alpha *= rank**0.5
        rows = _rows(name, model, ours, reshape)
        lora = Lora(rank, alpha, dora="lora_magnitude_vector" in parts, dropout=settings.get("lora_dropout") or 0.0)
        for each, base, mine in zip(ours, bases, rows.argsort().split([b.out_features for b in bases]), strict=True):
            module = lora.beside(base)
            module.lora_a.copy_(parts["lora_A"])
            module.lora_b.copy_(parts["lora_B"][mine])
            if module.magnitude is not None:
                module.magnitude.copy_(parts["lora_magnitude_vector"][mine])
            model.set_submodule(each, module)


def _module(family: str, name: str) -> str:
    """What transformers' model of a family calls a map, by its name in any layout."""
    return FAMILIES[family].modules(name) if family in FAMILIES else name


def _names(model: Any, family: str) -> dict[str, tuple[tuple[str, ...], Reshape]]:
    """The linear maps of a family's model: which of ours each is made of, and how their rows are joined."""
    ours = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if family == "sightline":
        return {name: ((name,), SAME) for name in ours}
    if family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}{nearest(family, FAMILIES)}")
    joins = FAMILIES[family].keys(model.config).joins([f"{name}.weight" for name in ours])
    return {
        _module(family, theirs.removesuffix(".weight")): (tuple(n.removesuffix(".weight") for n in names), reshape)
        for theirs, (names, reshape) in joins.items()
        if theirs.endswith(".weight")
    }


def _rows(name: str, model: nn.Module, ours: tuple[str, ...], reshape: Reshape) -> Tensor:
    """For each row of a published map, which it is of ours below each other; CheckpointError where rows are changed."""
    sizes = [len(model.get_submodule(each).weight) for each in ours]  # type: ignore[arg-type]
    try:
        rows = reshape.back(list(torch.arange(sum(sizes))[:, None].split(sizes)))
    except RuntimeError:
        rows = torch.empty(0)
    if tuple(rows.shape) != (sum(sizes), 1):
        raise CheckpointError(f"{name} {NOWHERE}")
    return rows[:, 0]


@torch.no_grad()
def _joined(maps: list[nn.Module], rows: Tensor) -> dict[str, Tensor]:
    """The adapter of several maps whose rows are joined in this order, and its alpha."""
    with_one = [each for each in maps if isinstance(each, AdaptedLinear)]
    ranks = [len(each.lora_a) for each in with_one]
    scale, first, columns = with_one[0].scale, 0, []
    for each in maps:
        column = each.weight.new_zeros(len(each.weight), sum(ranks))  # type: ignore[operator,arg-type]
        if isinstance(each, AdaptedLinear):
            last = first + len(each.lora_a)
            column[:, first:last] = each.lora_b * (each.scale / scale)
            first = last
        columns.append(column)
    parts = {
        "lora_A.weight": torch.cat([each.lora_a for each in with_one]),
        "lora_B.weight": torch.cat(columns)[rows],
        "alpha": torch.tensor(scale * sum(ranks), dtype=torch.float64),
    }
    if with_one[0].magnitude is not None:
        lengths: list[Tensor] = [getattr(each, "magnitude", each.weight.norm(dim=1)) for each in maps]  # type: ignore
        parts["lora_magnitude_vector"] = torch.cat(lengths)[rows]
    return parts


def _check(folder: Path, name: str, parts: Mapping[str, Tensor], bases: list[Any]) -> int:
    """The rank of an adapter whose tensors fit the maps that it is for."""
    if not {"lora_A", "lora_B"} <= set(parts):
        raise CheckpointError(f"{folder}: the adapter of {name} is not whole")
    rank, inputs, outputs = len(parts["lora_A"]), bases[0].in_features, sum(base.out_features for base in bases)
    wanted = {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_magnitude_vector": (outputs,)}
    for part, value in parts.items():
        if tuple(value.shape) != wanted[part]:
            raise CheckpointError(f"{folder}: {part} of {name} is {list(value.shape)}, expected {list(wanted[part])}")
    return rank


def _setting(settings: Mapping[str, Any], patterns: str, usual: str, name: str) -> float:
    """A setting of one map: that of the first pattern that its name ends in, or the usual one."""
    for key, value in (settings.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return float(value)
    return float(settings[usual])
