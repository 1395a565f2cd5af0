"""The plan of a run: it names what learns and how much, and finds what matches nothing, before anything is done."""

import pytest

from sightline.core.config import override
from sightline.core.errors import ConfigError
from sightline.model import VLM
from sightline.recipes import sightline_mini
from sightline.training.plan import STATE, plan
from sightline.zoo.describe import short


def test_every_stage_is_told_with_what_it_learns() -> None:
    recipe = sightline_mini()
    sizes = {name: p.numel() for name, p in VLM(recipe.model).named_parameters()}
    lines = list(plan(recipe))
    assert [line for line in lines if line in {stage.name for stage in recipe.stages}] == [
        s.name for s in recipe.stages
    ]
    fusion = sum(size for name, size in sizes.items() if name.startswith("fusion."))
    total = sum(sizes.values())
    align = list(plan(recipe, "align"))
    assert f"  learns     {short(fusion)} of {short(total)} parameters ({fusion / total:.1%})" in align
    assert any(short(4 * total + STATE * fusion, "B") in line for line in align)
    assert "instruct" not in align


def test_what_matches_nothing_is_told() -> None:
    with pytest.raises(ConfigError, match="no stage 'algin'; did you mean 'align'"):
        list(plan(sightline_mini(), "algin"))
    with pytest.raises(ConfigError, match=r"'fussion\.\*' matches no parameter"):
        list(plan(override(sightline_mini(), ["stages.2.learn={fussion.*: 0.1}"])))
