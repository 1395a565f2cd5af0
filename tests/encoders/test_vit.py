"""One vision transformer as the published encoders: what each setting changes, positions, grids, the stem."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.core.errors import ConfigError
from sightline.core.patches import Patches, join, patchify
from sightline.encoders.vit import ViT, ViTConfig

SIGLIP = ViTConfig(image_size=32, patch_size=8, width=24, depth=3, heads=3, mlp=40, activation="gelu_tanh")
CLIP = replace(
    SIGLIP, activation="quick_gelu", patch_bias=False, class_token=True, pre_norm=True, layer=-2, normed=False
)
DINO = replace(SIGLIP, activation="gelu", class_token=True, registers=2, layer_scale=True, antialias=True)
GIANT = replace(DINO, activation="silu", gated=True, registers=0)
STEM = replace(SIGLIP, stem=(6, 10), pre_norm=True)
INTERN = replace(
    SIGLIP, class_token=True, norm="rms", qkv_bias=False, qk_norm="width", final_norm=False, layer_scale=True
)
EVA2 = replace(SIGLIP, activation="gelu", class_token=True, residual="res-post-norm", final_norm=False)
BIGG = replace(SIGLIP, activation="gelu", patch_bias=False, pre_norm=True, final_norm=False, position_grid=3)
LLAMA4 = replace(CLIP, activation="gelu", layer=-1, normed=True, rope_theta=100.0)
QWEN2 = replace(SIGLIP, patch_bias=False, positions="none", rope_theta=100.0)
QWEN25 = replace(QWEN2, norm="rms", gated=True, activation="silu", window=2, full_blocks=(1,))
ARIA = replace(SIGLIP, normed=False, bucketed=True)
VIT_22B = replace(SIGLIP, norm="rms", residual="parallel", qkv_bias=False, qk_norm="head")
FAMILIES = {
    "siglip": SIGLIP,
    "clip": CLIP,
    "dinov2": DINO,
    "dinov2-giant": GIANT,
    "stem": STEM,
    "internvit": INTERN,
    "eva2-clip": EVA2,
    "vit-bigg": BIGG,
    "vit-22b": VIT_22B,
    "llama4": LLAMA4,
    "aria": ARIA,
}


def vit(cfg: ViTConfig) -> ViT:
    """An encoder no parameter of which hides behind a zero or a one."""
    made = ViT(cfg).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def pictures(count: int, rows: int = 4, columns: int = 4) -> Patches:
    return patchify(torch.randn(count, 3, rows * 8, columns * 8), 8)


def by_hand(model: ViT, patches: Patches) -> Tensor:
    """The whole encoder at its published size, step by step, from the settings alone."""
    cfg = model.config
    x = F.linear(patches.dense(), model.patch.weight, model.patch.bias)
    places = model.position_table((1, 4, 4))[0 if model.class_token is None else 1 :]
    x = x + places
    if model.class_token is not None:
        before = [(model.class_token + model.positions[0])[None]]
        before += [] if model.registers is None else [model.registers]
        x = torch.cat([torch.cat(before).expand(len(x), -1, -1), x], dim=1)
    x = x if model.pre_norm is None else model.pre_norm(x)
    for block in list(model.blocks)[: cfg.depth + 1 + cfg.layer]:
        start = x
        for norm, branch, scale in (
            (block.norm1, block.attention, block.scale1),
            (block.norm2 or block.norm1, block.feedforward, block.scale2),
        ):
            seen = start if cfg.residual == "parallel" else x
            turn = {"rotary": model.rotary_tables((1, 4, 4))} if branch is block.attention else {}
            out = norm(branch(seen, **turn)) if cfg.residual == "res-post-norm" else branch(norm(seen), **turn)
            x = x + (out if scale is None else out * scale)
    x = model.norm(x) if model.norm is not None and cfg.normed else x
    return x[:, cfg.prefix :].flatten(0, 1)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "stem"])
@torch.no_grad()
def test_settings_are_the_families(name: str) -> None:
    model, seen = vit(FAMILIES[name]), pictures(3)
    out = model(seen)
    assert out.grids == seen.grids
    torch.testing.assert_close(out.values, by_hand(model, seen), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "there", "absent"),
    [
        ("siglip", ("patch.bias", "norm.weight"), ("class_token", "pre_norm.weight", "blocks.0.scale1", "registers")),
        ("clip", ("class_token", "pre_norm.weight"), ("patch.bias", "registers", "blocks.0.scale1")),
        ("dinov2", ("class_token", "registers", "blocks.0.scale1"), ("pre_norm.weight", "blocks.0.feedforward.gate")),
        ("dinov2-giant", ("blocks.0.feedforward.gate.weight", "blocks.2.scale2"), ("registers", "stem.convs.0.weight")),
        ("internvit", ("blocks.0.attention.q_norm.weight",), ("blocks.0.attention.q.bias", "blocks.0.norm1.bias")),
        ("eva2-clip", ("blocks.0.attention.k.bias", "blocks.0.norm2.bias"), ("norm.weight", "blocks.0.scale1")),
        ("vit-22b", ("blocks.0.feedforward.up.bias", "norm.weight"), ("blocks.0.norm2.weight", "norm.bias")),
    ],
)
def test_parameters_are_the_families(name: str, there: tuple[str, ...], absent: tuple[str, ...]) -> None:
    names = set(ViT(FAMILIES[name]).state_dict())
    assert set(there) <= names
    assert not names & set(absent)


@pytest.mark.parametrize("name", ["clip", "dinov2"])
@torch.no_grad()
def test_tokens_before_the_patches_are_seen_but_not_given_out(name: str) -> None:
    model, seen = vit(FAMILIES[name]), pictures(2)
    tokens, out = model.tokens(seen), model(seen)
    assert tokens.shape[1] == 16 + model.config.prefix
    assert torch.equal(out.dense(), tokens[:, model.config.prefix :])
    for parameter in (model.class_token, model.registers):
        if parameter is not None:
            parameter.normal_()
            moved = model(seen).values
            assert float((moved - out.values).abs().max()) > 1e-3
            out = out.with_values(moved)


@pytest.mark.parametrize("name", ["clip", "dinov2"])
@torch.no_grad()
def test_kept_tokens_are_one_row_with_the_patches(name: str) -> None:
    """Those before the patches come first, whether pictures are alike or not; without any there is nothing to keep."""
    model = vit(replace(FAMILIES[name], keep_prefix=True))
    shapes, prefix = [(4, 4), (2, 3), (4, 4)], model.config.prefix
    seen = [pictures(1, *shape) for shape in shapes]
    together = model(join(seen))
    assert together.grids == ((1, 1, 16 + prefix), (1, 1, 6 + prefix), (1, 1, 16 + prefix))
    for item, alone in zip(together.items(), seen, strict=True):
        torch.testing.assert_close(item, model.tokens(alone)[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="keep_prefix is set, but there is neither a class token nor a register"):
        ViT(replace(SIGLIP, keep_prefix=True))


@pytest.mark.parametrize("normed", [False, True])
@torch.no_grad()
def test_several_layers_are_joined_in_their_order(normed: bool) -> None:
    cfg = replace(SIGLIP, layer=(-3, -4, -1, -3), normed=normed)
    model, seen = vit(cfg), pictures(2)
    found = model(seen).values
    assert found.shape[1] == cfg.features == 4 * 24
    for part, layer in zip(found.split(24, dim=1), cfg.layer, strict=True):
        single = ViT(replace(cfg, layer=layer))
        single.load_state_dict(model.state_dict())
        assert torch.equal(part, single(seen).values)


@torch.no_grad()
def test_features_of_length_one() -> None:
    model, seen = vit(SIGLIP), pictures(2)
    scaled = ViT(replace(SIGLIP, l2_norm=True))
    scaled.load_state_dict(model.state_dict())
    found, plain = scaled(seen).values, model(seen).values
    torch.testing.assert_close(found, plain / plain.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"layer": 0}, r"layer 0 of 3 blocks, expected -4 to -1"),
        ({"layer": (-1, -5)}, r"layer \(-1, -5\) of 3 blocks, expected -4 to -1"),
        ({"layer": ()}, r"layer \(\) of 3 blocks"),
        ({"position_grid": 0}, "position_grid is 0, expected the side of a table"),
        ({"bucketed": True, "antialias": True}, "antialias smooths positions that are resized, bucketed ones are not"),
        ({"rope_theta": 100.0, "heads": 4}, "rope_theta 100.0 with heads of 6, expected multiples of 4"),
        ({"rope_theta": 0.0}, "expected multiples of 4 and theta > 0"),
    ],
)
def test_settings_that_fit_no_encoder_are_told(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ViT(replace(SIGLIP, **wrong))


@torch.no_grad()
def test_layer_minus_2_is_a_shallower_encoder_without_its_last_norm() -> None:
    model = vit(CLIP)
    shallow = ViT(replace(CLIP, depth=2, layer=-1))
    shallow.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("blocks.2.")})
    seen = pictures(2)
    assert torch.equal(model(seen).values, shallow(seen).values)
    normed = vit(replace(CLIP, normed=True))
    normed.load_state_dict(model.state_dict())
    torch.testing.assert_close(normed(seen).values, model.norm(model(seen).values))


@pytest.mark.parametrize("layer", [0, 3, -5])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"layer {layer} of 3 blocks, expected -4 to -1"):
        ViT(replace(SIGLIP, layer=layer))


# ---------------------------------------------------------------------------------------------------- positions, grids


def test_positions_of_the_published_grid_are_used_as_they_are() -> None:
    model = vit(CLIP)
    assert model.position_table((1, 4, 4)) is model.positions


@pytest.mark.parametrize("name", ["siglip", "clip"])
@torch.no_grad()
def test_resized_positions_stay_at_their_share_of_the_side(name: str) -> None:
    """A table that holds its own row and column does so on a larger, oblong grid; bicubic strays by a tenth."""
    model = vit(FAMILIES[name])
    head = int(model.config.class_token)
    row, column = torch.meshgrid(torch.arange(4) + 0.5, torch.arange(4) + 0.5, indexing="ij")
    model.positions[head:, 0], model.positions[head:, 1] = row.flatten(), column.flatten()
    table = model.position_table((1, 8, 12))
    assert torch.equal(table[:head], model.positions[:head])
    found = table[head:].unflatten(0, (8, 12))[2:-2, 3:-3]  # away from the edges, beyond which there is nothing
    rows, columns = (torch.arange(8) + 0.5) * 4 / 8, (torch.arange(12) + 0.5) * 4 / 12
    torch.testing.assert_close(found[..., 0], rows[2:-2, None].expand(4, 6), atol=0.1, rtol=0)
    torch.testing.assert_close(found[..., 1], columns[None, 3:-3].expand(4, 6), atol=0.1, rtol=0)


@torch.no_grad()
def test_a_smaller_table_of_positions_is_resized_to_the_published_grid() -> None:
    model = vit(BIGG)
    assert model.positions.shape == (9, 24)
    table = model.position_table((1, 4, 4))
    square = model.positions.reshape(1, 3, 3, 24).permute(0, 3, 1, 2)
    wanted = F.interpolate(square, size=(4, 4), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(table, wanted)
    assert model.position_table((1, 3, 3)) is model.positions


def test_rotary_positions_turn_by_column_then_row_and_leave_the_class_token() -> None:
    """Head width 8: pairs of frequencies 1 and 1/10, first two by the column, last two by the row, both from 1."""
    tables = ViT(LLAMA4).rotary_tables((1, 2, 3))
    assert tables is not None
    for table, wave, still in zip(tables, (torch.cos, torch.sin), (1.0, 0.0), strict=True):
        assert table.shape == (7, 8) and torch.equal(table[0], torch.full((8,), still))
        for row in range(2):
            for column in range(3):
                angles = torch.tensor([column + 1, (column + 1) / 10, row + 1, (row + 1) / 10])
                torch.testing.assert_close(table[1 + 3 * row + column], wave(angles).repeat(2))


@torch.no_grad()
def test_bucketed_positions_are_rows_of_the_table() -> None:
    """Eight places of a side fall by two into the four of the table, two places into its first and third."""
    model = vit(ARIA)
    found = model.position_table((1, 2, 8))
    wanted = [[4 * down + across // 2 for across in range(8)] for down in (0, 2)]
    assert torch.equal(found, model.positions[torch.tensor(wanted).flatten()])
    assert torch.equal(model.position_table((1, 4, 4)), model.positions)


@torch.no_grad()
def test_smoothing_of_resized_positions_is_a_setting() -> None:
    smooth, sharp = vit(replace(SIGLIP, antialias=True)), vit(replace(SIGLIP, antialias=False))
    smooth.load_state_dict(sharp.state_dict())
    assert not torch.allclose(smooth.position_table((1, 2, 2)), sharp.position_table((1, 2, 2)), atol=1e-2)
    for model in (smooth, sharp):
        model.positions[:] = model.positions[:1]
        torch.testing.assert_close(model.position_table((1, 2, 2)), model.positions[:4])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_mixed_grids_are_as_one_by_one(name: str) -> None:
    model = vit(FAMILIES[name])
    shapes = [(4, 4), (2, 6), (4, 4), (6, 2), (3, 3), (2, 6)]
    seen = [pictures(1, *shape) for shape in shapes]
    together = model(join(seen))
    assert together.grids == tuple((1, *shape) for shape in shapes)
    for item, alone in zip(together.items(), seen, strict=True):
        torch.testing.assert_close(item, model(alone).values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [False, True])
@torch.no_grad()
def test_frames_are_seen_one_by_one(kept: bool) -> None:
    """Two videos of three and two frames, and a picture."""
    model = vit(replace(CLIP, keep_prefix=kept))
    frames = [pictures(1, 4, 4) for _ in range(6)]
    values = torch.cat([each.values for each in frames])
    videos = Patches(values, ((3, 4, 4), (2, 4, 4), (1, 4, 4)))
    out = model(videos)
    assert out.grids == tuple((1, 1, t * 17) if kept else (t, 4, 4) for t in (3, 2, 1))
    wanted = torch.cat([model(each).values for each in frames])
    torch.testing.assert_close(out.values, wanted, atol=1e-5, rtol=1e-5)


def test_patches_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="patch vectors of 48 numbers, this encoder reads 192"):
        ViT(SIGLIP)(patchify(torch.randn(1, 3, 16, 16), 4))


# ---------------------------------------------------------------------------------------------------------------- stem


@torch.no_grad()
def test_the_stem_cuts_what_its_convolutions_make_of_the_whole_picture() -> None:
    """Patch (row, column) of an oblong picture is its own 2x2 square of the shrunken picture, channels first."""
    model, picture = vit(STEM), torch.randn(1, 3, 16, 40)
    assert model.stem is not None
    x = picture
    for conv, norm in zip(model.stem.convs, model.stem.norms, strict=True):
        x = F.gelu(norm(conv(x)))
    found = model.stem(patchify(picture, 8))[0]
    assert found.shape == (2 * 5, 10 * 2 * 2)
    for row in range(2):
        for column in range(5):
            square = x[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(found[5 * row + column], square.flatten(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_neighbours_overlap_through_the_stem_alone() -> None:
    pixels = torch.randn(1, 3, 32, 32)
    changed = pixels.clone()
    changed[:, :, :, 15] += 1.0  # the last column of the second patch
    for cfg, touched in ((STEM, {1, 2}), (SIGLIP, {1})):
        model = vit(cfg)
        if model.stem is not None:
            model.stem.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in cfg.stem)  # it looks at everything
        before, after = (model.embed(patchify(x, 8)).unflatten(1, (4, 4)) for x in (pixels, changed))
        moved = (before - after).abs().amax((0, 1, 3)) > 1e-6
        assert set(moved.nonzero()[:, 0].tolist()) == touched


def test_a_stem_must_divide_its_patch() -> None:
    with pytest.raises(ConfigError, match="a stem of 3 halvings needs a patch size divisible by 8, not 12"):
        ViT(replace(STEM, patch_size=12, stem=(4, 4, 4)))


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (1, 7), (2, 2), (6, 5)])
def test_most_blocks_look_within_squares(grid: tuple[int, int]) -> None:
    """As with a mask over the whole picture; the second block sees all of it."""
    model = vit(QWEN25)
    patches = pictures(2, *grid)
    x, (cos, sin) = model.embed(patches), model.rotary_tables(patches.grids[0])
    down, across = torch.arange(grid[0]) // 2, torch.arange(grid[1]) // 2
    square = (down[:, None] * 100 + across).flatten()
    for depth, block in enumerate(model.blocks):
        mask = None if depth == 1 else (square[:, None] == square)[None, None]
        x = x + block.attention(block.norm1(x), mask=mask, rotary=(cos, sin))
        x = x + block.feedforward(block.norm2(x))
    torch.testing.assert_close(model(patches).values, model.norm(x).flatten(0, 1), atol=2e-5, rtol=1e-5)


def test_steps_of_time_are_seen_each_for_itself() -> None:
    """A film among pictures; a patch holds two frames."""
    model = vit(replace(QWEN2, temporal_patch_size=2))
    values = torch.randn(3 * 6 + 4, 2 * 3 * 64)
    found = model(Patches(values, ((3, 2, 3), (1, 2, 2))))
    assert found.grids == ((3, 2, 3), (1, 2, 2))
    for start, grid in ((0, (1, 2, 3)), (6, (1, 2, 3)), (12, (1, 2, 3)), (18, (1, 2, 2))):
        alone = model(Patches(values[start : start + grid[1] * grid[2]], (grid,)))
        torch.testing.assert_close(found.values[start : start + len(alone.values)], alone.values)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"class_token": True}, "positions is 'none', but a class token or a setting of the table asks for one"),
        ({"position_grid": 3}, "positions is 'none'"),
        ({"window": 0}, "window is 0 with 0 tokens before the patches"),
        ({"window": 2, "registers": 1}, "window is 2 with 1 tokens before the patches"),
        ({"full_blocks": (1,)}, "full_blocks .* expected some of them and a window"),
        ({"window": 2, "full_blocks": (3,)}, r"full_blocks \(3,\) of 3 blocks"),
        ({"temporal_patch_size": 0}, "temporal_patch_size is 0"),
        ({"temporal_patch_size": 2, "stem": (6,)}, "temporal_patch_size is 2, expected 1 or more, with a stem 1"),
    ],
)
def test_settings_of_an_encoder_for_any_size_that_contradict_each_other(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ViT(replace(QWEN2, **change))
