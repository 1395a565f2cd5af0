"""A recipe with another fusion: it fits, it learns as before, and what there is not is told."""

import pytest

from sightline.core.errors import ConfigError
from sightline.evaluation.designs import FUSIONS, price, with_fusion
from sightline.model import VLM
from sightline.recipes import tiny
from sightline.training.recipe import learning_rates
from sightline.zoo.hollow import hollow


@pytest.mark.parametrize("name", FUSIONS)
def test_every_fusion_fits_the_tiny_recipe_and_learns(name: str) -> None:
    recipe = with_fusion(tiny(), name)
    with hollow():
        model = VLM(recipe.model)
    learned = set(learning_rates(model, recipe.stages[0].learn))
    frozen = {key.split(".")[0] for key, _ in model.named_parameters() if key not in learned}
    assert frozen == (set() if name == "native" else {"encoder"})
    assert recipe.taken == (() if name == "native" else ("encoder.*",))
    assert price(recipe).visual == {"qformer": 16, "resampler": 16, "cross-attention": 1}.get(name, 64)


def test_an_unknown_fusion_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown fusion 'lineer'; did you mean 'linear'"):
        with_fusion(tiny(), "lineer")
