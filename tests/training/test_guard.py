"""Whether a model looks at its pictures is measured on samples that it never learns from, and told when it does not."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import pytest
import torch

from sightline.core.errors import ConfigError
from sightline.core.sequence import Image, Message, Text, Video, ask, images_of
from sightline.data.images import Square
from sightline.encoders.vit import ViTConfig
from sightline.fusion.cross_attention import CrossAttentionConfig
from sightline.fusion.glu import GLUConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.fusion.qformer import QFormerConfig
from sightline.fusion.resampler import ResamplerConfig
from sightline.fusion.visual_expert import VisualExpertConfig
from sightline.language.decoder import DecoderConfig
from sightline.language.tokenizer import Tokenizer
from sightline.model import FusionConfig, VLMConfig
from sightline.training.adapters import Lora, adapt
from sightline.training.features import FeatureStore
from sightline.training.guard import GREY, blank, shuffled, with_images
from sightline.training.loader import HELD, Batches
from sightline.training.recipe import Recipe, Stage, check_sources
from sightline.training.run import initial_model, objective_of, processor_of
from sightline.training.settings import DenseDPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardConfig
from sightline.training.sources import Sample
from sightline.training.trainer import Trainer

COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@dataclass(frozen=True)
class Colors:
    """Red and blue pictures and which of the two each is, every other one; blind: all of them grey."""

    blind: bool = False
    length: int | None = None
    gives: Literal["conversations"] = "conversations"

    def __call__(self, seed: int, epoch: int, index: int) -> Sample:
        true = list(COLORS)[index % 2]
        shade = GREY if self.blind else tuple(c + index % 20 for c in COLORS[true])
        image = Image(PIL.Image.new("RGB", (16, 16), shade))
        return Sample(ask("what is it?", image, answer=true), name=f"{index}")


def world(source: Any, **changes: Any) -> Recipe:
    model = VLMConfig(
        image=ViTConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp=32),
        fusion=ProjectorConfig(inputs=16, width=24),
        decoder=DecoderConfig(vocab_size=480, width=24, depth=1, heads=2, mlp=48, tied=True, max_length=64),
    )
    settings = {"steps": 40, "batch": 8, "warmup": 5, "precision": "fp32", "decay": 0.0, "guard_every": 40, **changes}
    recipe = Recipe("colors", model, Square(16), {}, (), vocabulary=480, max_length=64)
    object.__setattr__(recipe, "sources", {"colors": source})  # a source of this test alone
    object.__setattr__(recipe, "stages", (Stage("look", {"*": 1e-2}, {"colors": 1.0}, **settings),))
    return recipe


def trained(recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> list[dict[str, Any]]:
    """What the guard wrote in a run."""
    folder.mkdir(exist_ok=True)
    model, stage = initial_model(recipe), recipe.stages[0]
    trainer = Trainer(recipe, stage, model, objective_of(stage, recipe, tokenizer, model), folder)
    list(trainer.run(processor_of(recipe, tokenizer, model), workers=0))
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "guard" in row]


def test_a_model_that_looks_has_a_gap(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = trained(world(Colors()), tokenizer, tmp_path)
    assert (row["stage"], row["step"]) == ("look", 40)
    guard = row["guard"]
    assert guard["sees"] and guard["real"] < 0.2 < guard["blank"] and guard["shuffled"] > 3 * guard["real"]
    assert "WARNING" not in capsys.readouterr().err


def test_a_blind_one_is_told_once(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = trained(world(Colors(blind=True), guard_every=10), tokenizer, tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30, 40] and not any(row["guard"]["sees"] for row in rows)
    told = capsys.readouterr().err
    assert told.count("WARNING: stage 'look', step 10: pictures make no clear difference") == 1


def test_the_guard_changes_nothing_of_what_an_endless_source_teaches(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = []
    for every in (0, 1):
        recipe = world(Colors(), guard_every=every, steps=3)
        model, stage = initial_model(recipe), recipe.stages[0]
        folder = tmp_path / str(every)
        folder.mkdir()
        trainer = Trainer(recipe, stage, model, objective_of(stage, recipe, tokenizer, model), folder)
        found.append([step.loss for step in trainer.run(processor_of(recipe, tokenizer, model), workers=0)])
        assert model.training
    assert found[0] == found[1]


@pytest.mark.parametrize("length", [None, 200, 45])
def test_what_is_held_is_never_learned(tokenizer: Tokenizer, length: int | None) -> None:
    recipe = world(Colors(length=length), steps=48)
    data = Batches(recipe.stages[0], 0, 0, recipe.sources, processor_of(recipe, tokenizer, initial_model(recipe)))
    held = [sample.name for sample in data.held()]
    assert len(set(held)) == len(held) == (HELD if length is None else length // 10)
    learned = [name for k in range(len(data)) for name in data[k].extra["names"]]
    assert not set(held) & set(learned)
    if length is not None:  # all others, each once an epoch
        rest = length - len(held)
        assert set(learned) | set(held) == {str(i) for i in range(length)}
        assert len(set(learned[:rest])) == len(set(learned[rest : 2 * rest])) == rest
        assert learned[:20] != learned[rest : rest + 20]


@dataclass(frozen=True)
class Held(Colors):
    """The same as a file of so many rows; odd ones break a reader; gives: pairs of answers, or conversations."""

    broken: bool = False
    film: bool = False
    gives: Literal["conversations", "pairs"] = "conversations"

    def __call__(self, seed: int, epoch: int, index: int) -> Sample:
        if self.broken and index % 2:
            raise KeyError("no reader foresaw it")
        sample = super().__call__(seed, epoch, index)
        (image,), answer = images_of(sample.conversation), sample.conversation[-1]
        if self.film:
            film = Video((image, blank(image)), (0.0, 1.0))
            sample = replace(sample, conversation=(*ask("what is it?", film), answer))
        if self.gives == "conversations":
            return sample
        false = Message("assistant", (Text("blue" if answer.text == "red" else "red"),))
        return replace(sample, conversation=sample.conversation[:1], chosen=answer, rejected=false)


WIDTHS: Any = {"inputs": 16, "width": 24}
FUSIONS: dict[str, FusionConfig] = {
    "mlp": ProjectorConfig(**WIDTHS),
    "q-former": QFormerConfig(**WIDTHS, queries=3, hidden=16, depth=2, heads=2, mlp=24),
    "resampler": ResamplerConfig(**WIDTHS, latents=3, depth=1, heads=2, head_dim=8),
    "cross-attention": CrossAttentionConfig(
        **WIDTHS, heads=2, mlp=32, interval=1, start=0, resampler=ProjectorConfig(**WIDTHS)
    ),
    "expert": VisualExpertConfig(GLUConfig(**WIDTHS, hidden=24)),
}
WAYS: dict[str, dict[str, Any]] = {
    "next token": {},
    "packed": {"packing": 64},
    "adapters": {"learn": {"decoder.*": Lora(rank=2, alpha=4)}},
    "recomputed": {"recompute": True},
    "films": {"film": True},
    "dpo": {"objective": DPOConfig(), "gives": "pairs", "learn": {"decoder.*": Lora(rank=2, alpha=4, rate=0.1)}},
    "dense-dpo": {"objective": DenseDPOConfig(), "gives": "pairs"},
    "orpo": {"objective": ORPOConfig(), "gives": "pairs"},
    "kto": {"objective": KTOConfig(), "gives": "pairs"},
    "reward": {"objective": RewardConfig(), "gives": "pairs"},
}


def looks(
    tokenizer: Tokenizer, folder: Path, fusion: FusionConfig, way: dict[str, Any], store: FeatureStore | None = None
) -> list[dict[str, float]]:
    """What the guard finds in two steps of a model whose weights are so large that every pixel counts."""
    source = Held(length=60, **{name: way[name] for name in ("film", "gives") if name in way})
    stage = {name: value for name, value in way.items() if name not in ("film", "gives")}
    settings: dict[str, Any] = {"learn": {"fusion.*": 1e-2, "decoder.*": 1e-2}, "steps": 2, "guard_every": 1, **stage}
    recipe = world(source)
    object.__setattr__(recipe, "model", replace(recipe.model, fusion=fusion))
    object.__setattr__(recipe, "stages", (replace(recipe.stages[0], **settings),))
    model, generator = initial_model(recipe), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder.mkdir()
    adapt(model, recipe.stages[0].learn)
    objective = objective_of(recipe.stages[0], recipe, tokenizer, model)
    trainer = Trainer(recipe, recipe.stages[0], model, objective, folder, store=store)
    list(trainer.run(processor_of(recipe, tokenizer, model), workers=0))
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["guard"] for row in rows if "guard" in row]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_stage_can_be_guarded(tokenizer: Tokenizer, tmp_path: Path, fusion: str, way: str) -> None:
    """Each loss is a number of its own; with features that are kept they are the same."""
    found = looks(tokenizer, tmp_path / "run", FUSIONS[fusion], WAYS[way])
    assert len(found) == 2
    for row in found:
        assert len({row["real"], row["blank"], row["shuffled"]}) == 3 and all(map(math.isfinite, list(row.values())))
    store = FeatureStore(tmp_path / "features", 1 << 30)
    kept = looks(tokenizer, tmp_path / "kept", FUSIONS[fusion], WAYS[way], store)
    for row, other in zip(found, kept, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    assert store.hits > 0


def test_what_no_reader_foresaw_is_not_held(tokenizer: Tokenizer) -> None:
    recipe = world(Held(length=200, broken=True), steps=48)
    data = Batches(recipe.stages[0], 0, 0, recipe.sources, processor_of(recipe, tokenizer, initial_model(recipe)))
    assert [sample.name for sample in data.held()] == [str(i) for i in range(180, 200, 2)]


def test_a_guard_with_nothing_to_look_at_is_told(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained(world(Held(length=19), steps=2, guard_every=1), tokenizer, tmp_path) == []
    told = "stage 'look': guard_every measures nothing; of the samples that it holds out 1 can be used"
    assert capsys.readouterr().err.count(told) == 1


def test_blank_and_shuffled_pictures_keep_their_sizes() -> None:
    small, large, other = (
        Image(PIL.Image.new("RGB", size, color))
        for size, color in [((8, 8), "red"), ((16, 8), "red"), ((8, 8), "blue")]
    )
    assert blank(large).picture.size == (16, 8) and blank(large).picture.getpixel((0, 0)) == GREY
    found = shuffled([(small, large), (small,), (other,)])
    assert [[i.picture.size for i in each] for each in found] == [[(8, 8), (16, 8)], [(8, 8)], [(8, 8)]]
    assert [each[0].picture.getpixel((0, 0)) for each in found] == [(0, 0, 255), (0, 0, 255), (255, 0, 0)]
    film = Video((small, small), (0.0, 1.0))
    talk = (replace(ask("?", small)[0], parts=(film, small)),)
    shown = with_images(Sample(conversation=talk), (large, other, other))
    assert images_of(shown.conversation) == (large, other, other)


def test_a_stage_without_answers_has_nothing_to_guard(recipe: Recipe) -> None:
    for name, objective in [("pictures", "dense"), ("pairs", "grpo")]:
        stage = Stage("s", {"*": 1.0}, {name: 1.0}, steps=9, objective={objective: 1.0}, guard_every=3)
        with pytest.raises(ConfigError, match="stage 's': guard_every needs losses of answers"):
            check_sources(stage, recipe.sources)
