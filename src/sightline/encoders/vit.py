"""One vision transformer whose settings are CLIP, SigLIP and DINOv2 (arXiv:2010.11929).

- CLIP (arXiv:2103.00020): class token, a norm before the blocks, no patch bias, quick_gelu; LLaVA takes layer -2.
- SigLIP (arXiv:2303.15343): no class token, tanh GELU, features after the final norm.
- DINOv2 (arXiv:2304.07193, registers arXiv:2309.16588): LayerScale, optional register tokens, gated feed-forward for g.
- Small models may put a stack of strided convolutions before the blocks (arXiv:2106.14881).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import config
from ..core.errors import ConfigError
from ..core.patches import Grid, Patches, join, unpatchify
from ..layers.attention import Attention
from ..layers.feedforward import FeedForward, GatedFeedForward
from ..layers.linear import working_precision


@config
class ViTConfig:
    """Sizes and settings of a vision transformer."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    channels: int = 3
    activation: str = "gelu"
    gated: bool = False  # gate, up, down instead of up, down
    eps: float = 1e-6
    patch_bias: bool = True
    class_token: bool = False
    registers: int = 0  # tokens between the class token and the patches, without a position
    pre_norm: bool = False  # a norm before the first block
    final_norm: bool = True
    layer_scale: bool = False
    stem: tuple[int, ...] = ()  # channels of strided convolutions before the patch embedding
    antialias: bool = False  # how positions are resized: DINOv2 with registers smooths them
    layer: int = -1  # whose output is taken: -1 the last block's, -2 the one before
    normed: bool = True  # whether the final norm is applied to what is taken
    keep_prefix: bool = False  # whether the tokens before the patches are features too

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
        return self.channels * self.patch_size**2

    @property
    def used_depth(self) -> int:
        """How many blocks are computed to give the layer that is taken."""
        return self.depth + 1 + self.layer


class ViTBlock(nn.Module):
    """Pre-norm attention and feed-forward, each branch optionally scaled per channel."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, cfg.eps)
        self.attention = Attention(cfg.width, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.width, cfg.eps)
        branch = GatedFeedForward if cfg.gated else FeedForward
        self.feedforward = branch(cfg.width, cfg.mlp, cfg.activation, bias=True)
        self.scale1 = nn.Parameter(torch.ones(cfg.width)) if cfg.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(cfg.width)) if cfg.layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.attention(self.norm1(x))
        x = x + (a if self.scale1 is None else a * self.scale1)
        f = self.feedforward(self.norm2(x))
        return x + (f if self.scale2 is None else f * self.scale2)


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
    """Patches of pixels in, patches of features out; tokens before the patches are dropped unless asked for."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        if not 0 <= cfg.used_depth <= cfg.depth:
            raise ConfigError(f"layer {cfg.layer} of {cfg.depth} blocks, expected {-1 - cfg.depth} to -1")
        self.config = cfg
        self.stem = ConvStem(cfg.channels, cfg.stem, cfg.patch_size) if cfg.stem else None
        inputs = cfg.stem[-1] * self.stem.rest**2 if self.stem else cfg.patch_dim
        self.patch = nn.Linear(inputs, cfg.width, bias=cfg.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(cfg.width)) if cfg.class_token else None
        self.registers = nn.Parameter(torch.zeros(cfg.registers, cfg.width)) if cfg.registers else None
        self.positions = nn.Parameter(torch.zeros(int(cfg.class_token) + cfg.grid**2, cfg.width))
        self.pre_norm = nn.LayerNorm(cfg.width, cfg.eps) if cfg.pre_norm else None
        self.blocks = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, cfg.eps) if cfg.final_norm else None
        self.reset()

    def reset(self) -> None:
        """Random start: normal of 0.02, biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def position_table(self, grid: Grid) -> Tensor:
        """Positions [prefix class + h*w, width]; bicubic from the published grid when the picture's differs."""
        side, (_, rows, columns) = self.config.grid, grid
        if (rows, columns) == (side, side):
            return self.positions
        head = int(self.config.class_token)
        table = self.positions[head:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(rows, columns), mode="bicubic", antialias=self.config.antialias)
        return torch.cat((self.positions[:head], table[0].flatten(1).T.to(self.positions.dtype)))

    def embed(self, patches: Patches) -> Tensor:
        """Tokens [items, prefix + h*w, width] of a uniform batch, before the first block."""
        pixels = patches.with_values(patches.values.to(self.patch.weight.dtype))
        x = self.patch(self.stem(pixels) if self.stem is not None else pixels.dense())
        table = self.position_table(patches.grids[0])
        head = int(self.config.class_token)
        x = x + table[head:]
        before = []
        if self.class_token is not None:
            before.append((self.class_token + table[0])[None])
        if self.registers is not None:
            before.append(self.registers)
        if before:
            x = torch.cat((torch.cat(before).to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        return x if self.pre_norm is None else self.pre_norm(x)

    def tokens(self, patches: Patches) -> Tensor:
        """All tokens [items, prefix + h*w, width] of a uniform batch at the layer that is taken."""
        x = working_precision(self.embed(patches))
        for block in self.blocks[: self.config.used_depth]:
            x = block(x)
        return self.norm(x) if self.norm is not None and self.config.normed else x

    def forward(self, patches: Patches) -> Patches:
        """Pixel vectors [n, channels*patch*patch] to features [n, width] on the same grids.

        With the tokens before the patches kept, all tokens of an item are one row, (1, 1, prefix + h*w).
        """
        if patches.values.shape[1] != self.config.patch_dim:
            found, wanted = patches.values.shape[1], self.config.patch_dim
            raise ConfigError(f"patch vectors of {found} numbers, this encoder reads {wanted}")
        if patches.uniform:
            tokens = self.tokens(patches)
            if self.config.keep_prefix:
                return Patches(tokens.flatten(0, 1), ((1, 1, tokens.shape[1]),) * len(tokens))
            return patches.with_values(tokens[:, self.config.prefix :].flatten(0, 1))
        parts = [Patches(item, (grid,)) for item, grid in zip(patches.items(), patches.grids, strict=True)]
        done: dict[int, Patches] = {}
        for shape in set(patches.grids):  # pictures of one shape are computed together
            where = [i for i, grid in enumerate(patches.grids) if grid == shape]
            out = self.forward(join([parts[i] for i in where]))
            done |= {i: Patches(item, out.grids[:1]) for i, item in zip(where, out.items(), strict=True)}
        return join([done[i] for i in range(len(parts))])
