"""An encoder of tiles: canvases of every shape, alone and together; what fills up, what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sightline.core.errors import ConfigError
from sightline.core.patches import Patches, join, patchify
from sightline.encoders.tiles import TiledViT
from sightline.encoders.vit import TilesConfig, ViTConfig

SHAPES = ((1, 1), (1, 2), (2, 1), (2, 2))
CONFIG = ViTConfig(
    image_size=8,
    patch_size=4,
    width=16,
    depth=2,
    heads=2,
    mlp=24,
    qkv_bias=False,
    out_bias=False,
    patch_bias=False,
    class_token=True,
    pre_norm=True,
    layer=(-1, -2),
    keep_prefix=True,
    tiles=TilesConfig(SHAPES, depth=1),
)


@pytest.fixture(scope="module")
def model() -> TiledViT:
    torch.manual_seed(0)
    made = TiledViT(CONFIG).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


def canvas(rows: int, columns: int, seed: int = 0) -> Patches:
    pixels = torch.randn(1, 3, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(seed))
    return patchify(pixels, 4)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_tile_has_its_tokens(model: TiledViT, shape: tuple[int, int]) -> None:
    seen = canvas(*shape)
    out = model(seen)
    tiles = shape[0] * shape[1]
    assert out.values.shape == (tiles * 5, 32)
    assert out.grids == (CONFIG.feature_grid(seen.grids[0]),) == ((1, 1, tiles * 5),)


@torch.no_grad()
def test_canvases_together_are_as_alone(model: TiledViT) -> None:
    seen = [canvas(*shape, seed) for seed, shape in enumerate((*SHAPES, (2, 1)))]
    together = model(join(seen))
    alone = torch.cat([model(each).values for each in seen])
    torch.testing.assert_close(together.values, alone, atol=1e-5, rtol=0.0)


@torch.no_grad()
def test_tiles_see_each_other_and_know_where_they_lie(model: TiledViT) -> None:
    def features(pixels: Tensor) -> Tensor:
        return model(patchify(pixels, 4)).values

    pixels = torch.randn(1, 3, 8, 16)
    other = pixels.clone()
    other[..., 8:] = 0.0
    assert float((features(pixels)[:5] - features(other)[:5]).abs().max()) > 1e-2
    turned = torch.cat((pixels[..., :8], pixels[..., 8:]), dim=2)  # the same two tiles, one below the other
    assert float((features(pixels) - features(turned)).abs().max()) > 1e-2


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    made = TiledViT(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    made(join([canvas(*shape) for shape in SHAPES])).values.square().sum().backward()
    assert [name for name, parameter in made.named_parameters() if parameter.grad is None] == []


def test_a_canvas_that_is_not_known_is_refused(model: TiledViT) -> None:
    for rows, columns in ((1, 3), (3, 1)):
        with pytest.raises(ConfigError, match="expected tiles of 2x2 in one of 1x1, 1x2, 2x1, 2x2"):
            model(canvas(rows, columns))
    with pytest.raises(ConfigError, match="a canvas of 3x2 patches"):
        model(patchify(torch.zeros(1, 3, 12, 8), 4))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"registers": 2}, "no registers and no scales"),
        ({"residual": "parallel"}, "has pre-norm blocks"),
        ({"keep_prefix": False}, "keeps its class token"),
        ({"layer": -2}, "takes the last layer first"),
    ],
)
def test_settings_that_do_not_fit_tiles_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TiledViT(replace(CONFIG, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("shapes, depth", [((), 1), (((0, 1),), 1), (((1, 1),), -1)])
def test_tiles_of_nothing_are_refused(shapes: tuple[tuple[int, int], ...], depth: int) -> None:
    with pytest.raises(ConfigError, match="tiles need canvases"):
        TilesConfig(shapes, depth)
