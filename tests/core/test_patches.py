"""Packed patches: pictures cut and put together again, grids that hold what they say."""

from dataclasses import replace

import pytest
import torch

from sightline.core.patches import Patches, Tiling, join, patchify, patchify_film, unpatchify


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (12, 4)])
def test_cutting_is_undone_exactly(size: tuple[int, int]) -> None:
    pictures = torch.randn(3, 2, *size)
    patches = patchify(pictures, 4)
    assert patches.grids == ((1, size[0] // 4, size[1] // 4),) * 3
    assert torch.equal(unpatchify(patches, 4), pictures)


def test_patches_come_row_by_row_and_hold_channels_then_rows() -> None:
    picture = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    patches = patchify(picture, 2)
    assert patches.values.shape == (6, 8)
    assert torch.equal(patches.values[4], picture[0, :, 2:4, 2:4].flatten())  # second row, second column


def test_patches_of_a_film_hold_channels_then_frames_then_rows() -> None:
    film = torch.arange(3 * 2 * 2 * 5 * 6).reshape(3, 2, 2, 5, 6)
    patches = patchify_film(film, 2)
    assert patches.grids == ((3, 2, 3),) and patches.values.shape == (18, 16)
    wanted = film[1, :, :, 2:4, 4:6].transpose(0, 1).flatten()  # second step of time, second row, last column
    assert torch.equal(patches.values[6 + 3 + 2], wanted)


@pytest.mark.parametrize(
    "size, grid", [((9, 11), (1, 2, 2)), ((7, 8), (1, 1, 2)), ((4, 7), (1, 1, 1)), ((3, 9), (1, 0, 2))]
)
def test_what_does_not_fill_a_patch_is_dropped(size: tuple[int, int], grid: tuple[int, int, int]) -> None:
    picture = torch.randn(2, 3, *size)
    patches = patchify(picture, 4)
    assert patches.grids == (grid, grid)
    kept = picture[:, :, : 4 * grid[1], : 4 * grid[2]]
    assert torch.equal(patches.values, patchify(kept, 4).values)
    assert patches.values.sum() == pytest.approx(kept.sum().item(), abs=1e-4)


def test_packs_are_joined_in_order_whatever_their_grids() -> None:
    wide, tall = patchify(torch.randn(2, 1, 4, 8), 4), patchify(torch.randn(1, 1, 12, 4), 4)
    both = join([wide, tall])
    assert both.grids == ((1, 1, 2), (1, 1, 2), (1, 3, 1)) and not both.uniform
    assert [len(item) for item in both.items()] == [2, 2, 3]
    assert torch.equal(both.items()[2], tall.values)


def test_a_uniform_batch_is_dense() -> None:
    patches = patchify(torch.randn(3, 1, 4, 8), 4)
    assert patches.uniform and patches.dense().shape == (3, 2, 16)
    assert torch.equal(patches.dense()[1], patches.items()[1])
    assert patches.with_values(patches.values[:, :5]).dense().shape == (3, 2, 5)


@pytest.mark.parametrize("grids, held", [(((1, 2, 2),), 4), (((1, 2, 2), (2, 1, 1)), 6), ((), 0)])
def test_vectors_that_do_not_fill_the_grids_are_refused(grids: tuple[tuple[int, int, int], ...], held: int) -> None:
    Patches(torch.zeros(held, 3), grids)
    with pytest.raises(ValueError, match=f"5 patch vectors for grids that hold {held}"):
        Patches(torch.zeros(5, 3), grids)


def test_features_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match="1 patch vectors for grids that hold 2"):
        patchify(torch.randn(1, 1, 4, 8), 4).with_values(torch.zeros(1, 16))


def test_moving_keeps_the_grids() -> None:
    moved = patchify(torch.randn(1, 1, 4, 8), 4).to("meta")
    assert moved.values.device.type == "meta" and moved.grids == ((1, 1, 2),)


# ----------------------------------------------------------------------------------------------------------- tilings


@pytest.mark.parametrize(
    ("size", "padding"),
    [((40, 40), (0, 0)), ((80, 40), (2, 0)), ((40, 80), (0, 2)), ((400, 1), (4, 0)), ((9, 8), (0, 0))],
)
def test_padding_follows_from_the_original_s_proportions(size: tuple[int, int], padding: tuple[int, int]) -> None:
    """Of two by two tiles of 4 x 4 tokens."""
    assert Tiling(2, 2, *size).padding(4, 4) == padding


def test_pictures_of_several_items() -> None:
    first, second = Tiling(1, 2, 20, 10), Tiling(1, 1, 10, 10)
    wide, tall = patchify(torch.randn(3, 1, 4, 8), 4), patchify(torch.randn(2, 1, 12, 4), 4)
    both = join([replace(wide, tilings=(first,)), replace(tall, tilings=(second,))])
    assert both.pictures() == [((1, 1, 2), first), ((1, 3, 1), second)]
    assert both.to("meta").pictures() == both.pictures()
    assert tall.pictures() == [((1, 3, 1), None)] * 2
    with pytest.raises(ValueError, match="5 items for tilings of 3"):
        join([replace(wide, tilings=(first,)), tall])
