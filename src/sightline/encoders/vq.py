"""The encoder of a VQGAN (arXiv:2012.09841): a picture becomes a grid of codes, each the nearest vector of a codebook.

Chameleon (arXiv:2405.09818) reads its codes as words (Make-A-Scene's tokenizer, arXiv:2203.13131).
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import config
from ..core.errors import ConfigError
from ..core.patches import Grid, Patches, join, unpatchify
from ..layers.attention import Attention

GROUPS = 32  # channels are normed in so many groups
EPS = 1e-6


@config
class VQConfig:
    """Sizes of the encoder and its codebook.

    multipliers: channels of each level as multiples of `width`; from one level to the next sides are halved.
    attention: levels, counted from 0, whose blocks are each followed by attention.
    """

    image_size: int
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    depth: int = 2  # blocks of a level
    attention: tuple[int, ...] = ()
    latent: int = 256  # channels after the last level
    codes: int = 8192
    code_width: int = 256
    channels: int = 3
    kind: Literal["vq"] = "vq"

    def __post_init__(self) -> None:
        if not self.multipliers or min(*self.multipliers, self.depth, self.codes, self.code_width, self.latent) < 1:
            raise ConfigError("sizes of a VQGAN's encoder are at least 1, its levels at least one")
        if self.width % GROUPS:
            raise ConfigError(f"channels of {self.width}, expected a multiple of {GROUPS}, which are normed in groups")
        if not all(0 <= level < len(self.multipliers) for level in self.attention):
            last = len(self.multipliers) - 1
            raise ConfigError(f"attention at levels {self.attention}, expected some of 0 to {last}")

    @property
    def patch_size(self) -> int:
        """Side of the square of pixels that a code stands for."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def grid(self) -> int:
        """Codes along one side at the published size."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        return self.channels * self.patch_size**2

    def feature_grid(self, grid: Grid) -> Grid:
        """The grid of the codes of an item: that of its patches."""
        return grid

    @property
    def note(self) -> str:
        return f"{len(self.multipliers)} levels of {self.depth} blocks, the nearest of {self.codes} codes"

    def build(self) -> "VQEncoder":
        """The encoder of these settings."""
        return VQEncoder(self)


class ResidualBlock(nn.Module):
    """Two convolutions, each after a norm and a swish, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs, EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, outputs, EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nn.Module):
    """Every place of a map looks at all others, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, EPS)
        self.attention = Attention(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.attention(self.norm(x).flatten(2).transpose(1, 2))
        out: Tensor = x + seen.transpose(1, 2).view_as(x)
        return out


class Level(nn.Module):
    """Blocks at one size of the map, and the convolution that halves it."""

    def __init__(self, inputs: int, outputs: int, depth: int, attends: bool, halves: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(outputs if i else inputs, outputs) for i in range(depth))
        self.attentions = nn.ModuleList(AttentionBlock(outputs) for _ in range(depth if attends else 0))
        self.down = nn.Conv2d(outputs, outputs, 3, stride=2) if halves else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        if self.down is None:
            return x
        out: Tensor = self.down(F.pad(x, (0, 1, 0, 1)))  # the side that a stride of two leaves over
        return out


class VQEncoder(nn.Module):
    """Patches of pixels in, the code of each out; a code has no gradient, so it is learned before and elsewhere."""

    def __init__(self, cfg: VQConfig) -> None:
        super().__init__()
        self.config = cfg
        sizes = [cfg.width * multiplier for multiplier in (1, *cfg.multipliers)]
        last = len(cfg.multipliers) - 1
        self.conv_in = nn.Conv2d(cfg.channels, cfg.width, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(sizes[i], sizes[i + 1], cfg.depth, i in cfg.attention, i < last) for i in range(last + 1)
        )
        top = sizes[-1]
        self.middle = nn.Sequential(ResidualBlock(top, top), AttentionBlock(top), ResidualBlock(top, top))
        self.norm = nn.GroupNorm(GROUPS, top, EPS)
        self.conv_out = nn.Conv2d(top, cfg.latent, 3, padding=1)
        self.project = nn.Linear(cfg.latent, cfg.code_width)
        self.codebook = nn.Embedding(cfg.codes, cfg.code_width)

    def vectors(self, pictures: Tensor) -> Tensor:
        """What is looked up in the codebook, [items, places, code_width] of pictures [items, channels, h, w]."""
        x = self.conv_in(pictures)
        for level in self.levels:
            x = level(x)
        x = self.conv_out(F.silu(self.norm(self.middle(x))))
        out: Tensor = self.project(x.flatten(2).transpose(1, 2))
        return out

    def forward(self, patches: Patches) -> Patches:
        """Pixel vectors [n, channels*patch*patch] to codes [n, 1] on the same grids."""
        if patches.values.shape[1] != self.config.patch_dim:
            found, wanted = patches.values.shape[1], self.config.patch_dim
            raise ConfigError(f"patch vectors of {found} numbers, this encoder reads {wanted}")
        if not patches.uniform:
            parts = [Patches(item, (grid,)) for item, grid in zip(patches.items(), patches.grids, strict=True)]
            return join([self.forward(part) for part in parts])
        x = self.vectors(unpatchify(patches, self.config.patch_size).to(self.conv_in.weight.dtype)).flatten(0, 1)
        table = self.codebook.weight
        away = (x**2).sum(1, keepdim=True) + (table**2).sum(1) - 2 * x @ table.T
        return patches.with_values(away.argmin(1, keepdim=True))
