"""One vision transformer whose settings are the published encoders (arXiv:2010.11929).

- CLIP (arXiv:2103.00020): class token, a norm before the blocks, no patch bias, quick_gelu; LLaVA takes layer -2.
- SigLIP (arXiv:2303.15343): no class token, tanh GELU, features after the final norm.
- DINOv2 (arXiv:2304.07193, registers arXiv:2309.16588): LayerScale, optional register tokens, gated feed-forward for g.
- InternViT (arXiv:2312.14238): LayerScale, no final norm; the 6B has RMS norms and one of queries and keys.
- EVA-CLIP g (arXiv:2303.15389) as BLIP-2 uses it: the class token is kept, every token goes through the final norm.
- EVA2-CLIP E (the same) as CogVLM uses it: branches are normalised after they are computed.
- OpenCLIP's ViT-bigG as Qwen-VL uses it (arXiv:2308.12966): no class token, a position table smaller than the grid.
- ViT-22B (arXiv:2302.05442): both branches of a block read the same input, queries and keys are normalised per head.
- Aria's encoder: positions are looked up by fractions of the side (NaViT, arXiv:2307.06304).
- Llama-4's encoder: each head is turned by the column in its first half and by the row in its second.
- Qwen2-VL's encoder (arXiv:2409.12191): pictures of any size, no table but rotary positions in the plane, patches of
  two frames; Qwen2.5-VL's (arXiv:2502.13923): most blocks look within squares of patches.
- Fuyu has none: of depth 0, without positions and norms, it is a linear map of pixels.
- Small models may put a stack of strided convolutions before the blocks (arXiv:2106.14881).
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import config
from ..core.errors import ConfigError
from ..core.patches import Grid, Patches, join, unpatchify
from ..layers.attention import Attention
from ..layers.feedforward import FeedForward, GatedFeedForward
from ..layers.linear import working_precision
from ..layers.norms import AcrossHeads, RMSNorm
from .plane import looked_up, resized, turns, windowed

NORMS: dict[str, type[nn.LayerNorm] | type[RMSNorm]] = {"layer": nn.LayerNorm, "rms": RMSNorm}


@config
class TilesConfig:
    """How tiles of a picture are seen together (`encoders.tiles`).

    shapes: rows and columns of the canvases that there are, in the order of their numbers. depth: how many gated blocks
    follow the others.
    """

    shapes: tuple[tuple[int, int], ...]
    depth: int

    def __post_init__(self) -> None:
        if not self.shapes or min(map(min, self.shapes)) < 1 or self.depth < 0:
            raise ConfigError("tiles need canvases of at least one row and column, and no less than 0 gated blocks")

    @property
    def most(self) -> int:
        """Tiles of the largest canvas."""
        return max(rows * columns for rows, columns in self.shapes)


@config
class ViTConfig:
    """Sizes and settings of a vision transformer.

    residual: how a block adds its branches f to x: x + f(norm(x)), x + norm(f(x)) (the name is Swin-V2's), or
    x + attention(norm(x)) + feedforward(norm(x)).
    layer: whose output is taken: -1 the last block's, -2 the one before; several are joined along the width in the
    order given.
    image_size: of the pictures the table of positions was learned for; without a table, the size it is described at.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    channels: int = 3
    temporal_patch_size: int = 1  # frames that a patch holds
    activation: str = "gelu"
    gated: bool = False  # gate, up, down instead of up, down
    norm: Literal["layer", "rms"] = "layer"
    eps: float = 1e-6
    residual: Literal["pre-norm", "res-post-norm", "parallel"] = "pre-norm"
    qkv_bias: bool = True
    out_bias: bool = True  # of attention's output map
    qk_norm: Literal["head", "width"] | None = None  # RMS norm of queries and keys, per head or over all heads at once
    patch_bias: bool = True
    class_token: bool = False
    registers: int = 0  # tokens between the class token and the patches, without a position
    pre_norm: bool = False  # a norm before the first block
    final_norm: bool = True
    layer_scale: bool = False
    stem: tuple[int, ...] = ()  # channels of strided convolutions before the patch embedding
    positions: Literal["learned", "none"] = "learned"  # whether a table of positions is added to the patches
    antialias: bool = False  # how positions are resized: DINOv2 with registers smooths them
    bucketed: bool = False  # positions are rows of the table, looked up by fractions of the side, not resized
    position_grid: int | None = None  # side of the table of positions; None: that of the published grid
    rope_theta: float | None = None  # base of rotary positions in the plane, table or not; None: there are none
    window: int | None = None  # side of the squares of patches that blocks look within; None: at the whole picture
    full_blocks: tuple[int, ...] = ()  # blocks, counted from 0, that look at the whole picture all the same
    layer: int | tuple[int, ...] = -1
    normed: bool = True  # whether the final norm is applied to what is taken, to each of several layers
    l2_norm: bool = False  # whether features are scaled to length one
    keep_prefix: bool = False  # whether the tokens before the patches are features too
    tiles: TilesConfig | None = None  # a picture is a canvas of tiles of the published size (`encoders.tiles`)

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "heads", "mlp", "channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of an encoder is {getattr(self, name)}, expected at least 1")
        if not self.taken or not all(0 <= depth <= self.depth for depth in self.taken):
            raise ConfigError(f"layer {self.layer} of {self.depth} blocks, expected {-1 - self.depth} to -1")
        if self.keep_prefix and not self.prefix:
            raise ConfigError("keep_prefix is set, but there is neither a class token nor a register to keep")
        if self.position_grid is not None and self.position_grid < 1:
            raise ConfigError(f"position_grid is {self.position_grid}, expected the side of a table of positions")
        if self.bucketed and self.antialias:
            raise ConfigError("antialias smooths positions that are resized, bucketed ones are not; set one of them")
        if self.rope_theta is not None and (self.rope_theta <= 0 or self.width // self.heads % 4):
            head = self.width // self.heads
            raise ConfigError(
                f"rope_theta {self.rope_theta} with heads of {head}, expected multiples of 4 and theta > 0"
            )
        if self.positions == "none" and (self.class_token or self.position_grid or self.bucketed or self.antialias):
            raise ConfigError("positions is 'none', but a class token or a setting of the table asks for one")
        if self.temporal_patch_size < 1 or (self.temporal_patch_size > 1 and self.stem):
            raise ConfigError(f"temporal_patch_size is {self.temporal_patch_size}, expected 1 or more, with a stem 1")
        if self.window is not None and (self.window < 1 or self.prefix):
            raise ConfigError(
                f"window is {self.window} with {self.prefix} tokens before the patches, which lie in none"
            )
        if not all(0 <= block < self.depth for block in self.full_blocks) or (self.full_blocks and not self.window):
            raise ConfigError(
                f"full_blocks {self.full_blocks} of {self.depth} blocks, expected some of them and a window"
            )

    @property
    def grid(self) -> int:
        """Patches along one side at the published size."""
        return self.image_size // self.patch_size

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token) + self.registers

    @property
    def patch_dim(self) -> int:
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def taken(self) -> tuple[int, ...]:
        """After how many blocks each layer is taken; 0 is the input of the first."""
        layers = (self.layer,) if isinstance(self.layer, int) else self.layer
        return tuple(self.depth + 1 + layer for layer in layers)

    @property
    def used_depth(self) -> int:
        """How many blocks are computed to give the layers that are taken."""
        return max(self.taken)

    @property
    def features(self) -> int:
        """Width of the features: that of all layers taken together."""
        return self.width * len(self.taken)

    def feature_grid(self, grid: Grid) -> Grid:
        """The grid of the features of an item whose pixels have this one.

        It is the same unless the tokens before the patches are kept: these have no place among rows and columns, so
        all tokens of the item are one row, (1, 1, t * (prefix + h*w)).
        """
        frames, rows, columns = grid
        if self.tiles is not None:
            return (1, 1, rows * columns // self.grid**2 * (self.prefix + self.grid**2))
        return (1, 1, frames * (self.prefix + rows * columns)) if self.keep_prefix else grid

    @property
    def note(self) -> str:
        return f"{self.used_depth} blocks, {self.heads} heads, {self.activation}" if self.used_depth else "linear"

    def build(self) -> "ViT":
        """The encoder of these settings."""
        from .tiles import TiledViT  # which is made of what is in this file

        return ViT(self) if self.tiles is None else TiledViT(self)


class ViTBlock(nn.Module):
    """Attention and feed-forward, each branch normalised before or after and optionally scaled per channel."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        norm = NORMS[cfg.norm]
        self.residual = cfg.residual
        self.norm1 = norm(cfg.width, cfg.eps)
        biases = {"qkv_bias": cfg.qkv_bias, "out_bias": cfg.out_bias}
        self.attention = Attention(cfg.width, cfg.heads, **biases, qk_norm=cfg.qk_norm == "head")
        if cfg.qk_norm == "width":
            self.attention.q_norm, self.attention.k_norm = AcrossHeads(cfg.width), AcrossHeads(cfg.width)
        self.norm2 = norm(cfg.width, cfg.eps) if cfg.residual != "parallel" else None
        branch = GatedFeedForward if cfg.gated else FeedForward
        self.feedforward = branch(cfg.width, cfg.mlp, cfg.activation, bias=True)
        self.scale1 = nn.Parameter(torch.ones(cfg.width)) if cfg.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(cfg.width)) if cfg.layer_scale else None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        if self.norm2 is None:
            y = self.norm1(x)
            seen = self.attention(y, mask, rotary=rotary)
            return x + scaled(seen, self.scale1) + scaled(self.feedforward(y), self.scale2)
        if self.residual == "res-post-norm":
            x = x + scaled(self.norm1(self.attention(x, mask, rotary=rotary)), self.scale1)
            return x + scaled(self.norm2(self.feedforward(x)), self.scale2)
        if self.scale1 is None:
            x = self.attention(self.norm1(x), mask, rotary=rotary, onto=x)
            return self.feedforward(self.norm2(x), onto=x)
        x = x + scaled(self.attention(self.norm1(x), mask, rotary=rotary), self.scale1)
        return x + scaled(self.feedforward(self.norm2(x)), self.scale2)


def scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    """LayerScale (arXiv:2103.17239)."""
    return branch if scale is None else branch * scale


class ConvStem(nn.Module):
    """Strided 3x3 convolutions, each halving the side, that shrink a patch before it is embedded.

    Neighbouring patches overlap through it, which a small encoder learns shapes from much sooner.
    """

    def __init__(self, channels: int, stem: tuple[int, ...], patch: int) -> None:
        super().__init__()
        if patch % 2 ** len(stem):
            side = 2 ** len(stem)
            raise ConfigError(f"a stem of {len(stem)} halvings needs a patch size divisible by {side}, not {patch}")
        sizes = (channels, *stem)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(sizes, stem, strict=False))
        self.norms = nn.ModuleList(nn.GroupNorm(1, b) for b in stem)  # without them shapes are learned much later
        self.patch = patch
        self.rest = patch // 2 ** len(stem)

    def forward(self, patches: Patches) -> Tensor:
        """Pixels of a uniform batch to vectors [items, patches, channels * rest * rest]."""
        x = unpatchify(patches, self.patch).contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        items, channels, rows, columns = x.shape
        cut = x.reshape(items, channels, rows // self.rest, self.rest, columns // self.rest, self.rest)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class ViT(nn.Module):
    """Patches of pixels in, features out: one per patch, and with `keep_prefix` the tokens before the patches first."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.config = cfg
        norm = NORMS[cfg.norm]
        side = cfg.position_grid or cfg.grid
        self.stem = ConvStem(cfg.channels, cfg.stem, cfg.patch_size) if cfg.stem else None
        inputs = cfg.stem[-1] * self.stem.rest**2 if self.stem else cfg.patch_dim
        self.patch = nn.Linear(inputs, cfg.width, bias=cfg.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(cfg.width)) if cfg.class_token else None
        self.registers = nn.Parameter(torch.zeros(cfg.registers, cfg.width)) if cfg.registers else None
        places = int(cfg.class_token) + side**2
        self.positions = nn.Parameter(torch.zeros(places, cfg.width)) if cfg.positions == "learned" else None
        self.pre_norm = norm(cfg.width, cfg.eps) if cfg.pre_norm else None
        self.blocks = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.depth))
        self.norm = norm(cfg.width, cfg.eps) if cfg.final_norm else None
        self.reset()

    def reset(self) -> None:
        """Random start: normal of 0.02, biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def position_table(self, grid: Grid) -> Tensor | None:
        """Positions [prefix class + h*w, width]; bicubic from the table's grid when the picture's differs."""
        if self.positions is None:
            return None
        side, head = self.config.position_grid or self.config.grid, int(self.config.class_token)
        if self.config.bucketed:  # at the table's own size as well, where fractions may round to the place before
            return torch.cat((self.positions[:head], looked_up(self.positions[head:], side, grid)))
        if grid[1:] == (side, side):
            return self.positions
        return torch.cat((self.positions[:head], resized(self.positions[head:], side, grid, self.config.antialias)))

    def rotary_tables(self, grid: Grid) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [prefix + h*w, head width]; tokens before the patches are not turned."""
        cfg = self.config
        if cfg.rope_theta is None:
            return None
        cos, sin = turns(grid, cfg.width // cfg.heads, cfg.rope_theta, self.patch.weight.device)
        still = cos.new_zeros(cfg.prefix, cos.shape[1])
        return torch.cat((still + 1, cos)), torch.cat((still, sin))

    def _square(self, block: nn.Module, part: Tensor, shape: Grid) -> Tensor:
        """Tokens of squares through a block that sees each alone."""
        out: Tensor = block(part, self.rotary_tables(shape))
        return out

    def embed(self, patches: Patches) -> Tensor:
        """Tokens [items, prefix + h*w, width] of a uniform batch, before the first block."""
        pixels = patches.with_values(patches.values.to(self.patch.weight.dtype))
        x = self.patch(self.stem(pixels) if self.stem is not None else pixels.dense())
        table = self.position_table(patches.grids[0])
        head = int(self.config.class_token)
        if table is not None:
            x = x + table[head:]
        before = []
        if self.class_token is not None and table is not None:
            before.append((self.class_token + table[0])[None])
        if self.registers is not None:
            before.append(self.registers)
        if before:
            x = torch.cat((torch.cat(before).to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        return x if self.pre_norm is None else self.pre_norm(x)

    def tokens(self, patches: Patches) -> Tensor:
        """All tokens [items, prefix + h*w, features] of a uniform batch at the layers that are taken."""
        cfg = self.config
        grid = patches.grids[0]
        x, rotary = working_precision(self.embed(patches)), self.rotary_tables(grid)
        found = {0: x} if 0 in cfg.taken else {}
        for depth, block in enumerate(self.blocks[: cfg.used_depth], 1):
            if cfg.window is None or depth - 1 in cfg.full_blocks:
                x = block(x, rotary)
            else:  # distances within a square are those in the picture, so its positions may be counted from its corner
                x = windowed(x, grid, cfg.window, partial(self._square, block))
            if depth in cfg.taken:
                found[depth] = x
        if self.norm is not None and cfg.normed:
            found = {depth: self.norm(found[depth]) for depth in set(cfg.taken)}
        x = found[cfg.taken[0]] if len(cfg.taken) == 1 else torch.cat([found[depth] for depth in cfg.taken], dim=-1)
        return F.normalize(x, dim=-1) if cfg.l2_norm else x

    def forward(self, patches: Patches) -> Patches:
        """Pixel vectors [n, channels*patch*patch] to features [m, features] on grids of `ViTConfig.feature_grid`."""
        if patches.values.shape[1] != self.config.patch_dim:
            found, wanted = patches.values.shape[1], self.config.patch_dim
            raise ConfigError(f"patch vectors of {found} numbers, this encoder reads {wanted}")
        if any(frames != 1 for frames, _, _ in patches.grids):  # each step of time is seen for itself
            steps = tuple((1, rows, columns) for frames, rows, columns in patches.grids for _ in range(frames))
            seen = self.forward(Patches(patches.values, steps))
            return Patches(seen.values, tuple(self.config.feature_grid(grid) for grid in patches.grids))
        if patches.uniform:
            kept = self.tokens(patches)[:, 0 if self.config.keep_prefix else self.config.prefix :]
            return Patches(kept.flatten(0, 1), tuple(self.config.feature_grid(grid) for grid in patches.grids))
        parts = [Patches(item, (grid,)) for item, grid in zip(patches.items(), patches.grids, strict=True)]
        done: dict[int, Patches] = {}
        for shape in set(patches.grids):  # pictures of one shape are computed together
            where = [i for i, grid in enumerate(patches.grids) if grid == shape]
            out = self.forward(join([parts[i] for i in where]))
            done |= {i: Patches(item, out.grids[:1]) for i, item in zip(where, out.items(), strict=True)}
        return join([done[i] for i in range(len(parts))])
