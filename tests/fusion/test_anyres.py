"""Tiles laid out as rows: by hand, with padding left out, for pictures of several sizes at once."""

import pytest
import torch

from sightline.core.patches import Patches, Tiling, join
from sightline.fusion.anyres import AnyRes, AnyResConfig
from sightline.fusion.projector import ProjectorConfig

NEWLINE = -7.0
SIZES = [(40, 40), (90, 30), (41, 200), (300, 1), (33, 47), (2000, 3), (1, 1)]


def identity(shuffle: int = 1) -> AnyRes:
    """Features of one number go through as they are; the newline is -7."""
    fusion = AnyRes(AnyResConfig(ProjectorConfig(inputs=1, width=1, layers=1, shuffle=shuffle)))
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            parameter.fill_(NEWLINE if name == "newline" else float(name.endswith("weight")))
    return fusion


@torch.no_grad()
def test_rows_go_through_all_tiles_and_end_with_a_newline() -> None:
    """Two by two tiles of 2 x 2 patches, a picture twice as wide as high: a row of padding above and below."""
    values = torch.arange(20.0)[:, None]
    patches = Patches(values, ((1, 2, 2),) * 5, (Tiling(2, 2, 80, 40),))
    tokens = identity()(patches).tokens
    assert tokens is not None
    wanted = [0, 1, 2, 3, 6, 7, 10, 11, NEWLINE, 12, 13, 16, 17, NEWLINE]
    assert tokens[:, 0].tolist() == wanted


@torch.no_grad()
def test_columns_of_padding_are_left_out_too() -> None:
    patches = Patches(torch.arange(12.0)[:, None], ((1, 2, 2),) * 3, (Tiling(1, 2, 20, 20),))
    tokens = identity()(patches).tokens
    assert tokens is not None
    assert tokens[:, 0].tolist() == [0, 1, 2, 3, 5, 8, NEWLINE, 7, 10, NEWLINE]


@torch.no_grad()
def test_a_picture_without_tiles_ends_with_one_newline() -> None:
    tokens = identity()(Patches(torch.arange(8.0)[:, None], ((1, 2, 2),) * 2)).tokens
    assert tokens is not None
    assert tokens[:, 0].tolist() == [0, 1, 2, 3, NEWLINE, 4, 5, 6, 7, NEWLINE]


@pytest.mark.parametrize("shuffle", [1, 2])
@torch.no_grad()
def test_pictures_together_are_pictures_one_by_one_and_counted(shuffle: int) -> None:
    fusion, grid = identity(shuffle), (1, 4, 4)
    pictures = []
    for i, size in enumerate(SIZES):
        tiling = Tiling(1 + i % 2, 1 + i % 3, *size)
        pictures.append(Patches(torch.randn(16 * tiling.items, 1), (grid,) * tiling.items, (tiling,)))
    alone = [fusion(picture).tokens for picture in pictures]
    for picture, tokens in zip(pictures, alone, strict=True):
        assert tokens is not None and len(tokens) == fusion.num_tokens(grid, picture.tilings[0])
    together = fusion(join(pictures)).tokens
    assert torch.equal(together, torch.cat(alone))  # type: ignore[arg-type]
