"""Tensor parallelism (Megatron, arXiv:1909.08053): processes side by side compute one block of the decoder together.

Each has some of the heads and a part of every hidden layer: queries, keys, values, gates and ups are cut by columns,
the maps back to the stream by rows, and what those make is summed. All else is computed by each, from the same samples.
Blocks know nothing of it: torch cuts their maps by name and speaks for them where they are called.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F

from ..core.errors import ConfigError
from ..fusion.cross_attention import CrossAttentionConfig
from ..language.decoder import DecoderConfig
from ..layers.adapted import AdaptedLinear
from ..layers.attention import Attention
from ..layers.feedforward import FeedForward, GatedFeedForward
from ..layers.norms import HeadNorm
from ..model import VLMConfig
from .recipe import Stage

COLUMNS = ("q", "k", "v", "gate", "up")  # maps whose outputs are shared out
ROWS = ("o", "down")  # maps that read what was shared out
NORMS = ("q_norm", "k_norm")  # over each head by itself
HEADS = Shard(1)  # of [batch, heads, length, dim]


class Cut(ParallelStyle):
    """Parameters of a module by name and how they are cut, for what torch has no style of its own.

    reads, gives: how its input and output lie on the processes.
    """

    def __init__(self, how: Mapping[str, Placement], reads: Placement, gives: Placement) -> None:
        super().__init__()
        self.how, self.reads, self.gives = how, reads, gives

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, AdaptedLinear):
            module.seen = partial(seen, module)  # type: ignore[method-assign]
        return distribute_module(module, device_mesh, self._cut, self._read, self._give)  # type: ignore[arg-type]

    def _cut(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for own, p in list(module.named_parameters(recurse=False)):
            placed = distribute_tensor(p, mesh, [self.how[own]], src_data_rank=self.src_data_rank)
            module.register_parameter(own, nn.Parameter(placed, requires_grad=p.requires_grad))

    def _read(self, module: nn.Module, given: tuple[Any, ...], mesh: DeviceMesh) -> DTensor:
        x = given[0]
        return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [self.reads], run_check=False)

    def _give(self, module: nn.Module, out: DTensor, mesh: DeviceMesh) -> Tensor:
        return out.redistribute(placements=[self.gives]).to_local()


def seen(module: AdaptedLinear, x: Tensor) -> Tensor:
    """What an adapter's update sees of inputs, of which each process may have a part: what one process would leave out.

    All in a group draw the same of the whole, as their steps begin from the same chance.
    """
    if not (module.training and module.dropout and isinstance(x, DTensor)):
        return x
    kept = F.dropout(torch.ones(x.shape, dtype=x.dtype, device=x.device), module.dropout)
    whole = DTensor.from_local(kept, x.device_mesh, [Replicate()], run_check=False)
    return x * whole.redistribute(placements=x.placements)


BY_COLUMNS: Mapping[str, Placement] = {
    "weight": Shard(0),
    "bias": Shard(0),
    "lora_a": Replicate(),
    "lora_b": Shard(0),
    "magnitude": Shard(0),
}
BY_ROWS: Mapping[str, Placement] = {
    "weight": Shard(1),
    "bias": Replicate(),
    "lora_a": Shard(1),
    "lora_b": Replicate(),
    "magnitude": Replicate(),
}


def styles(block: nn.Module) -> dict[str, ParallelStyle]:
    """How each module of a block is cut, by name; what is not named here every process has whole."""
    found: dict[str, ParallelStyle] = {}
    for name, module in block.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, Attention):  # its input once for three maps, whose gradients are then summed at once
            found[name] = once(7)
        elif isinstance(module, FeedForward | GatedFeedForward):
            found[name] = once(1)
        elif last in COLUMNS and isinstance(module, AdaptedLinear):
            found[name] = Cut(BY_COLUMNS, Replicate(), Shard(-1))
        elif last in COLUMNS:
            found[name] = ColwiseParallel()
        elif last in ROWS and isinstance(module, AdaptedLinear):
            found[name] = Cut(BY_ROWS, Shard(-1), Replicate())
        elif last in ROWS:
            found[name] = RowwiseParallel()
        elif last in NORMS:
            how: Placement = Shard(0) if isinstance(module, HeadNorm) else Replicate()
            found[name] = Cut({"weight": how, "bias": how}, HEADS, HEADS)
    return found


def once(given: int) -> PrepareModuleInput:
    """The first of so many inputs, the same on every process, told to torch before several maps read it."""
    layouts = (Replicate(), *(None for _ in range(given - 1)))
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)  # type: ignore[arg-type]


def cut(block: nn.Module, mesh: DeviceMesh) -> None:
    """Leave of a block on each process of a mesh what that one computes; all begin from the same weights."""
    parallelize_module(block, mesh, styles(block), src_data_rank=None)


# ------------------------------------------------------------------------------------------------------------- sizes


def check_tensor_parallel(model: VLMConfig, stage: Stage, count: int, processes: int, shard: bool) -> None:
    """ConfigError for a model or a stage whose blocks so many processes cannot compute together."""
    if count == 1:
        return
    if not shard:
        raise ConfigError(f"tensor parallelism of {count} is for a model in shards; ask for shards as well")
    if processes % count:
        raise ConfigError(f"{processes} processes cannot stand in groups of {count} for tensor parallelism")
    if model.beside:
        raise ConfigError("tensor parallelism cuts the blocks of a decoder, an encoder-decoder has none of its kind")
    for what, size in sizes(model).items():
        if size % count:
            raise ConfigError(f"tensor parallelism of {count} cannot share out {what} alike, of which there are {size}")
    decoder = model.decoder
    across = not isinstance(decoder.qk_norm, bool) and decoder.qk_norm.across
    known = {"inner_norm": decoder.inner_norm, "qk_norm.across": across, "scores.alibi": decoder.scores.alibi}
    for name in (name for name, there in known.items() if there):
        raise ConfigError(f"a decoder with {name} needs all of its heads, of which tensor parallelism leaves some each")


def sizes(model: VLMConfig) -> dict[str, int]:
    """What must be shared out alike, and how much there is of it."""
    found = _sizes("decoder", model.decoder)
    if isinstance(model.fusion, CrossAttentionConfig):
        found |= _sizes("cross-attention", model.fusion)
    experts = model.decoder.experts
    if experts is not None:
        found |= {"the hidden numbers of an expert": experts.mlp, "those of the shared expert": experts.shared}
        if experts.every == 1:
            del found["the hidden numbers of the decoder"]
    return found


def _sizes(whose: str, cfg: DecoderConfig | CrossAttentionConfig) -> dict[str, int]:
    return {
        f"the heads of the {whose}": cfg.heads,
        f"the heads of keys of the {whose}": cfg.kv_heads or cfg.heads,
        f"the hidden numbers of the {whose}": cfg.mlp,
    }


def divided(model: VLMConfig, count: int) -> VLMConfig:
    """The model as one of so many processes computes it: as wide, with its share of heads and hidden sizes."""
    decoder, fusion = model.decoder, model.fusion
    experts = decoder.experts
    if experts is not None:
        experts = replace(experts, mlp=experts.mlp // count, shared=experts.shared // count)
    decoder = replace(_divided(decoder, count, decoder.head_size), experts=experts)
    if isinstance(fusion, CrossAttentionConfig):
        fusion = _divided(fusion, count, fusion.head_dim or fusion.width // fusion.heads)
    return replace(model, decoder=decoder, fusion=fusion)


def _divided(cfg: Any, count: int, head_dim: int) -> Any:
    heads, kv_heads, mlp = cfg.heads // count, (cfg.kv_heads or cfg.heads) // count, max(cfg.mlp // count, 1)
    return replace(cfg, heads=heads, kv_heads=kv_heads, head_dim=head_dim, mlp=mlp)
