"""The projector: as many tokens as it counts, squares folded as a plain loop would, grids that do not fit refused."""

import itertools

import pytest
import torch

from sightline.core.errors import ConfigError
from sightline.core.patches import Grid, Patches
from sightline.fusion.projector import Projector, ProjectorConfig
from sightline.language.decoder import DecoderConfig, SelfBlock

GRIDS: list[tuple[Grid, ...]] = [((1, 4, 4),), ((1, 4, 6), (1, 4, 6)), ((1, 2, 4), (3, 4, 2), (1, 6, 6))]


def features(grids: tuple[Grid, ...], width: int = 5) -> Patches:
    return Patches(torch.randn(sum(t * h * w for t, h, w in grids), width), grids)


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("shuffle", [1, 2])
def test_it_counts_the_tokens_that_it_makes(grids: tuple[Grid, ...], shuffle: int) -> None:
    projector = Projector(ProjectorConfig(inputs=5, width=8, shuffle=shuffle))
    bridge = projector(features(grids))
    assert bridge.tokens is not None and bridge.memory is None
    assert bridge.tokens.shape == (sum(projector.num_tokens(grid) for grid in grids), 8)


@pytest.mark.parametrize("grids", GRIDS)
@torch.no_grad()
def test_folding_is_a_plain_loop(grids: tuple[Grid, ...]) -> None:
    """Token by token: frame, row and column of squares, then the patches of a square row by row."""
    projector = Projector(ProjectorConfig(inputs=5, width=8, layers=1, shuffle=2))
    seen = features(grids)
    squares = []
    for item, (frames, rows, columns) in zip(seen.items(), grids, strict=True):
        cube = item.reshape(frames, rows, columns, 5)
        for t, r, c in itertools.product(range(frames), range(0, rows, 2), range(0, columns, 2)):
            squares.append(torch.cat([cube[t, r, c], cube[t, r, c + 1], cube[t, r + 1, c], cube[t, r + 1, c + 1]]))
    torch.testing.assert_close(projector(seen).tokens, projector.layers[0](torch.stack(squares)))


@pytest.mark.parametrize("grids", [((1, 5, 4),), ((1, 4, 3),), ((1, 5, 4),) * 4, ((1, 4, 4), (1, 3, 4))])
def test_a_grid_that_cannot_be_folded_is_refused(grids: tuple[Grid, ...]) -> None:
    """Four grids of 5 x 4 have as many patches as five of 4 x 4: a reshape alone would mix their pictures."""
    projector = Projector(ProjectorConfig(inputs=5, width=8, shuffle=2))
    with pytest.raises(ConfigError, match=r"a grid of \dx\d patches cannot be folded in squares of 2"):
        projector(features(grids))
    with pytest.raises(ConfigError, match="cannot be folded"):
        projector.num_tokens(grids[-1])


@torch.no_grad()
def test_transposed_squares_go_column_by_column() -> None:
    """Within a square nothing changes; its grid is walked down the columns instead of along the rows."""
    grids: tuple[Grid, ...] = ((1, 4, 6), (2, 2, 4))
    plain = Projector(ProjectorConfig(inputs=5, width=8, layers=1, shuffle=2))
    turned = Projector(ProjectorConfig(inputs=5, width=8, layers=1, shuffle=2, transposed=True))
    turned.load_state_dict(plain.state_dict())
    seen = features(grids)
    first, second = plain(seen).tokens.split([6, 4])
    wanted = torch.cat([first.reshape(2, 3, 8).transpose(0, 1).flatten(0, 1), second])
    torch.testing.assert_close(turned(seen).tokens, wanted)


def test_without_folding_there_is_nothing_to_transpose() -> None:
    with pytest.raises(ConfigError, match="no order of squares to transpose"):
        Projector(ProjectorConfig(inputs=5, width=8, transposed=True))


@torch.no_grad()
def test_layers_with_activations_between_them_and_a_norm_before() -> None:
    projector = Projector(ProjectorConfig(inputs=5, width=8, layers=3, hidden=7, activation="relu", norm=True))
    assert [layer.weight.shape for layer in projector.layers] == [(7, 5), (7, 7), (8, 7)]
    assert projector.norm is not None
    seen = features(GRIDS[0])
    first, second, third = projector.layers
    wanted = third(torch.relu(second(torch.relu(first(projector.norm(seen.values))))))
    torch.testing.assert_close(projector(seen).tokens, wanted)


def test_biases_can_be_left_out() -> None:
    assert all(layer.bias is None for layer in Projector(ProjectorConfig(inputs=5, width=8, bias=False)).layers)


def test_no_layer_is_no_projector() -> None:
    with pytest.raises(ConfigError, match="a projector of 0 layers from 5 numbers into 8, expected one layer"):
        Projector(ProjectorConfig(inputs=5, width=8, layers=0))


def test_the_decoder_s_blocks_are_left_as_they_are() -> None:
    decoder = DecoderConfig(vocab_size=9, width=8, depth=3, heads=2, mlp=8)
    blocks = Projector(ProjectorConfig(inputs=5, width=8)).blocks(decoder)
    assert [type(block) for block in blocks] == [SelfBlock] * 3


def test_without_layers_features_are_tokens() -> None:
    model = Projector(ProjectorConfig(inputs=8, width=8, layers=0))
    features = Patches(torch.randn(6, 8), ((1, 2, 3),))
    assert model(features).tokens is features.values and not list(model.parameters())
    assert ProjectorConfig(inputs=8, width=8, layers=0).note == "as they are"
