"""The encoder of a VQGAN: the nearest code at every place, whatever lies beside it in the batch."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sightline.core.errors import ConfigError
from sightline.core.patches import Patches, join, patchify
from sightline.encoders.vq import VQConfig

SMALL = VQConfig(image_size=8, width=32, multipliers=(1, 2), depth=1, latent=6, codes=9, code_width=4)


def test_each_place_gets_its_nearest_code() -> None:
    model, pictures = SMALL.build().eval(), torch.randn(2, 3, 8, 12)
    codes = model(patchify(pictures, 2))
    assert codes.grids == ((1, 4, 6),) * 2 and codes.values.shape == (48, 1) and not codes.values.is_floating_point()
    away = torch.cdist(model.vectors(pictures).flatten(0, 1).double(), model.codebook.weight.double())
    assert torch.equal(codes.values[:, 0], away.argmin(1))
    alone = join([model(patchify(pictures[1:], 2)), model(patchify(torch.ones(1, 3, 4, 4), 2))])
    both = model(join([patchify(pictures[1:], 2), patchify(torch.ones(1, 3, 4, 4), 2)]))
    assert torch.equal(both.values, alone.values) and both.grids == alone.grids


def test_patches_of_another_size_are_told() -> None:
    with pytest.raises(ConfigError, match="patch vectors of 5 numbers, this encoder reads 12"):
        SMALL.build()(Patches(torch.zeros(1, 5), ((1, 1, 1),)))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"multipliers": ()}, "at least 1"),
        ({"depth": 0}, "at least 1"),
        ({"width": 48}, "channels of 48, expected a multiple of 32"),
        ({"attention": (2,)}, r"attention at levels \(2,\), expected some of 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(SMALL, **change)
