"""Features of a frozen encoder: computed once, the same bit for bit, bounded, and anew where the disk was damaged."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch
from torch import nn

from sightline.core.patches import Patches
from sightline.encoders.vit import ViT, ViTConfig
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM
from sightline.training import trainer as module
from sightline.training.features import FeatureStore, repeats
from sightline.training.loader import Batches
from sightline.training.plan import plan
from sightline.training.recipe import Recipe, Stage
from sightline.training.run import processor_of, run
from sightline.training.sources import FilesSource
from sightline.training.trainer import Step

Alone = Callable[..., Recipe]
Fresh = Callable[[str], Path]
LARGE = 1 << 30


def encoder(seed: int = 0) -> ViT:
    torch.manual_seed(seed)
    return ViT(ViTConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2, mlp=32)).requires_grad_(False)


def pictures(*seeds: int, side: int = 4) -> Patches:
    values = [torch.randn(side * side, 48, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return Patches(torch.cat(values), ((1, side, side),) * len(seeds))


def served(folder: Path, limit: int = LARGE, seed: int = 0, preprocessing: str = "") -> tuple[FeatureStore, nn.Module]:
    store, model = FeatureStore(folder, limit), encoder(seed)
    store.serve(model, preprocessing)
    return store, model


# --------------------------------------------------------------------------------------------------------- one encoder


def test_what_was_seen_before_is_not_computed_again(tmp_path: Path) -> None:
    store, model = served(tmp_path)
    plain = encoder()(pictures(1, 2, 3))
    first = model(pictures(1, 2))
    mixed = model(pictures(3, 1, 2))
    assert (store.computed, store.hits) == (3, 2)
    assert torch.equal(first.values, encoder()(pictures(1, 2)).values)
    assert torch.equal(mixed.values[16:], first.values)
    torch.testing.assert_close(mixed.values, plain.values.roll(16, 0), atol=1e-6, rtol=1e-6)
    again, other = served(tmp_path)  # another process
    assert torch.equal(other(pictures(3, 1, 2)).values, mixed.values) and again.computed == 0


def test_pictures_of_several_sizes_come_back_in_their_own(tmp_path: Path) -> None:
    store, model = served(tmp_path)
    one, other = pictures(1), pictures(2, side=2)
    both = Patches(torch.cat((one.values, other.values)), one.grids + other.grids)
    first, second = model(both), model(both)
    assert first.grids == second.grids == both.grids and torch.equal(first.values, second.values)
    assert store.hits == 2


@pytest.mark.parametrize("change", ["weights", "preprocessing", "precision", "pixels"])
def test_features_of_anything_else_are_others(tmp_path: Path, change: str) -> None:
    _, model = served(tmp_path)
    model(pictures(1))
    store, model = served(tmp_path, seed=int(change == "weights"), preprocessing="padded" * (change == "preprocessing"))
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "precision"):
        model(pictures(2 if change == "pixels" else 1))
    assert (store.computed, store.hits) == (1, 0)


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_entry_is_computed_again(tmp_path: Path, damage: str) -> None:
    _, model = served(tmp_path)
    good = model(pictures(1)).values
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"cut": content[:-9], "bit": content, "empty": b""}[damage])
    store, model = served(tmp_path)
    assert torch.equal(model(pictures(1)).values, good) and store.computed == 1
    assert torch.equal(model(pictures(1)).values, good) and store.hits == 1


def test_the_folder_stays_within_its_limit_and_the_oldest_go_first(tmp_path: Path) -> None:
    _, model = served(tmp_path / "one")
    model(pictures(0))
    each = sum(path.stat().st_size for path in (tmp_path / "one").rglob("*.safetensors"))
    store, model = served(tmp_path / "many", limit=5 * each)
    for seed in range(5):
        model(pictures(seed))
        for path in (tmp_path / "many").rglob("*.safetensors"):  # clocks of files may be coarse
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
    model(pictures(0))  # used last, though it came first
    model(pictures(5))
    assert sum(path.stat().st_size for path in (tmp_path / "many").rglob("*") if path.is_file()) <= 5 * each
    before = store.computed
    model(pictures(0, 5))
    assert store.computed == before
    model(pictures(1))
    assert store.computed == before + 1


def test_two_that_fill_one_folder_stay_within_its_limit(tmp_path: Path) -> None:
    """Each sees what the other wrote, but for a 64th of the limit; and each finds what the other computed."""
    (one, first), (other, second) = (served(tmp_path, limit=300_000) for _ in range(2))
    most = 0
    for seed in range(0, 200, 2):
        first(pictures(seed))
        second(pictures(seed + 1))
        most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
    each = next(tmp_path.rglob("*.safetensors")).stat().st_size
    assert 250_000 < most <= 300_000 * (1 + 2 / 64) + 2 * each < 100 * 2 * each
    first(pictures(199))
    assert one.hits == 1 and other.hits == 0


def test_what_belongs_to_somebody_else_is_read_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = served(tmp_path)
    good = model(pictures(1)).values

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    store, model = served(tmp_path, limit=1)
    assert torch.equal(model(pictures(1)).values, good) and (store.hits, store.computed) == (1, 0)
    model(pictures(2))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_a_full_disk_is_told_once_and_costs_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "features").write_text("a file where the folder should be")
    store, model = served(tmp_path / "features")
    wanted = encoder()(pictures(1, 2)).values
    assert torch.equal(model(pictures(1, 2)).values, wanted) and torch.equal(model(pictures(1, 2)).values, wanted)
    assert store.hits == 0
    assert capsys.readouterr().err.count("training goes on without keeping more features") == 1


# ------------------------------------------------------------------------------------------------------------ training


def colors(recipe: Recipe, folder: Path, **changes: object) -> Recipe:
    """A stage of the projector and decoder that reads eight pictures of a file twice."""
    rows = []
    for i in range(8):
        PIL.Image.new("RGB", (32, 32), (30 * i, 200 - 20 * i, 7 * i)).save(folder / f"{i}.png")
        turns = '[{"from": "human", "value": "<image>\\nwhich?"}, {"from": "gpt", "value": "word"}]'
        rows.append(f'{{"image": "{i}.png", "conversations": {turns}}}\n')
    (folder / "rows.jsonl").write_text("".join(rows))
    source = FilesSource(kind="conversations", format="llava", path=str(folder / "rows.jsonl"))
    stage = replace(recipe.stages[recipe.stage("instruct")], data={"mine": 1.0}, steps=8, batch=2, **changes)
    return replace(recipe, sources={**recipe.sources, "mine": source}, stages=(stage,))


class Counted(FeatureStore):
    """A store that is remembered."""

    made: "list[Counted]" = []  # noqa: RUF012

    def __init__(self, folder: Path, limit: int) -> None:
        super().__init__(folder, limit)
        self.made.append(self)


def test_a_second_epoch_does_not_see_and_loses_nothing(
    recipe: Recipe, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FeatureStore", Counted)
    monkeypatch.setattr(Counted, "made", [])
    chosen = colors(recipe, tmp_path)
    asked: list[int] = []

    def losses(name: str, **changes: object) -> list[float]:
        found = []
        for step in run(colors(recipe, tmp_path, **changes), fresh(name), workers=0):
            assert isinstance(step, Step)
            found.append(step.loss)
            asked.extend(store.computed for store in Counted.made)
        return found

    kept = losses("kept")
    assert asked == [2, 4, 6, 8, 8, 8, 8, 8] and Counted.made[0].hits == 8
    assert kept == losses("anew", feature_store=0.0) and len(Counted.made) == 1
    assert repeats(chosen.stages[0], chosen.sources) == 2


def test_a_later_stage_and_evaluation_read_what_was_kept(
    recipe: Recipe, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder is asked for eight pictures in all, whoever looks at them."""
    chosen = colors(recipe, tmp_path)
    chosen = replace(chosen, stages=(chosen.stages[0], replace(chosen.stages[0], name="more")))
    asked: list[int] = []
    plain = ViT.forward

    def counted(self: ViT, patches: Patches) -> Patches:
        if not patches.values.is_meta:  # what a batch will take is measured without content
            asked.append(len(patches.grids))
        return plain(self, patches)

    monkeypatch.setattr(ViT, "forward", counted)

    def evaluate(model: VLM) -> dict[str, float]:
        batch = Batches(chosen.stages[0], 0, 0, chosen.sources, processor_of(chosen, tokenizer, model))[1]
        with torch.no_grad():
            return {"mean": float(model(batch).mean())}

    folder = fresh("run")
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    assert len(list(run(chosen, folder, workers=0, evaluate=evaluate))) == 16
    assert sum(asked) == 8


def test_an_encoder_that_learns_and_sources_without_end_have_no_store(
    recipe: Recipe, fresh: Fresh, tmp_path: Path, alone: Alone
) -> None:
    for name, chosen in {
        "learns": colors(recipe, tmp_path, learn={"*": 1e-3}),
        "endless": alone(recipe, "instruct"),
        "once": replace(
            recipe,
            sources=colors(recipe, tmp_path).sources,
            stages=(replace(colors(recipe, tmp_path).stages[0], steps=4),),
        ),
    }.items():
        list(run(chosen, fresh(name), workers=0))
        assert not list((fresh(name + "x").parent / name / "features").rglob("*.safetensors")), name


def test_the_plan_says_what_becomes_of_features(recipe: Recipe, tmp_path: Path, alone: Alone) -> None:
    def told(chosen: Recipe) -> list[str]:
        lines = plan(chosen, rate=lambda precision: 1e9)
        return [line.removeprefix("  features   of the frozen encoder are ") for line in lines if "  features " in line]

    assert told(colors(recipe, tmp_path)) == ["kept, 8 GB at most: samples are met 2.0 times"]
    assert told(alone(recipe, "instruct")) == ["computed each time: its sources never repeat"]
    assert told(alone(recipe, "encoder")) == told(alone(recipe, "language")) == []
    assert told(colors(recipe, tmp_path, feature_store=0.0)) == []
    stage = Stage("x", {"*": 1.0}, {"text": 1.0}, steps=3)
    assert repeats(stage, recipe.sources) == 0
