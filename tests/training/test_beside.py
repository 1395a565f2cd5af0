"""The same loop teaches a model whose encoder of text reads and whose decoder writes beside it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sightline.language.seq2seq import Seq2SeqConfig
from sightline.training.recipe import Recipe
from sightline.training.run import run


def test_a_stage_is_run(recipe: Recipe, folder: Path, alone: Callable[..., Recipe]) -> None:
    words = Seq2SeqConfig(
        vocab_size=480, width=24, encoder_depth=1, decoder_depth=1, heads=2, head_dim=8, mlp=48, max_length=512
    )
    learn = {"encoder.*": 1e-2, "fusion.*": 1e-2, "decoder.*": 1e-2}
    chosen = alone(replace(recipe, model=replace(recipe.model, decoder=words)), "instruct", learn=learn, steps=8)
    steps = list(run(chosen, folder, workers=0))
    assert len(steps) == 8 and all(step.applied for step in steps)
    assert steps[-1].loss < steps[0].loss
