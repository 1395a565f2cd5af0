"""A Q-Former's first stage: each loss by hand, what learns, and that it learns to tell what is in a picture."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.core.errors import ConfigError
from sightline.core.sequence import Image
from sightline.data.batch import Batch
from sightline.data.images import Square
from sightline.fusion.qformer import QFormerConfig
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM
from sightline.recipes import recipe as shipped
from sightline.training import contrast, representation
from sightline.training.contrast import Scores, clip_loss
from sightline.training.loader import Batches
from sightline.training.objectives import features_of
from sightline.training.recipe import Recipe, Stage, check_sources, freeze, learning_rates
from sightline.training.representation import Representation
from sightline.training.run import final_model, initial_model, last_of, objective_of, processor_of, run
from sightline.training.settings import RepresentationConfig
from sightline.training.sources import Sample
from sightline.training.trainer import Trainer
from sightline.worlds.scenes import SceneConfig, scene
from sightline.zoo.names import locate
from sightline.zoo.own import load_model

LEARN = dict.fromkeys(("fusion.queries", "fusion.norm.*", "fusion.layers.*"), 5e-3)
V = 480


@pytest.fixture(scope="module")
def two(recipe: Recipe) -> Recipe:
    """A Q-Former that first represents and then generates; of the latter only its map to the decoder learns."""
    fusion = QFormerConfig(inputs=16, width=24, queries=3, hidden=8, depth=2, heads=2, mlp=16)
    objective = RepresentationConfig(projection=6, max_length=24)
    plain = replace(recipe.stages[0], steps=3, batch=4, save_every=100)
    stages = (
        replace(plain, name="represent", learn=LEARN, objective=objective),
        replace(plain, name="generate", learn={"fusion.out.*": 1e-2}, data={"captions": 1.0}, objective={"answers": 1}),
    )
    return replace(recipe, model=replace(recipe.model, fusion=fusion), stages=stages)


@pytest.fixture(scope="module")
def model(two: Recipe) -> VLM:
    found = initial_model(two)
    with torch.no_grad():
        for parameter in found.fusion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return found


@pytest.fixture(scope="module")
def batch(two: Recipe, model: VLM, tokenizer: Tokenizer) -> Batch:
    stage = replace(two.stages[0], batch=5)
    return Batches(stage, 0, 0, two.sources, processor_of(two, tokenizer, model))[0]


@pytest.fixture(scope="module")
def objective(model: VLM, tokenizer: Tokenizer) -> Representation:
    torch.manual_seed(1)
    return Representation(model, V, tokenizer.control("<pad>"), RepresentationConfig(projection=6, max_length=24))


def rows(objective: Representation, batch: Batch) -> list[Tensor]:
    """Ids [1, length] of every caption as it is read, without padding."""
    captions = (each[each != objective.pad_id][:22] for each in batch.extra["captions"])
    return [torch.tensor([[V, *each.tolist(), V + 2]]) for each in captions]


# ------------------------------------------------------------------------------------------------------ losses by hand


def test_captions_are_read_between_two_tokens_and_cut(objective: Representation, batch: Batch) -> None:
    long = torch.arange(1, 31)
    short = F.pad(torch.tensor([7, 8]), (0, 28), value=objective.pad_id)
    read = objective.written(torch.stack((long, short)))
    assert read[0].tolist() == [V, *range(1, 23), V + 2]
    assert read[1].tolist() == [V, 7, 8, V + 2, *[-1] * 20]
    both = replace(batch, extra={"captions": torch.stack((long, short))})
    assert objective.counts(both) == {"itc": 2, "itm": 6, "itg": 23 + 3}


@torch.no_grad()
def test_contrast_is_of_the_nearest_query(objective: Representation, model: VLM, batch: Batch) -> None:
    features, texts = features_of(model, batch), rows(objective, batch)
    scores = torch.zeros(5, 5)
    for i in range(5):
        queries = objective.picture_projection(model.fusion.ask(features[i][None], None))[0]
        for j, ids in enumerate(texts):
            text = objective.text_projection(objective.text.alone(model.fusion, ids)[0, 0])
            scores[i, j] = max(F.cosine_similarity(query, text, dim=0) for query in queries) / 0.07
    wanted = 0.0
    for x in (scores, scores.T):
        for i in range(5):
            of = x[i].log_softmax(-1)
            wanted -= float(0.9 * of[i] + 0.1 * of.mean()) / 2
    total, count = objective(model, batch)["itc"]
    assert float(total) == pytest.approx(wanted, rel=1e-4) and count == 5
    torch.testing.assert_close(clip_loss(Scores(scores, scores.T), 0.1)[0], total, rtol=1e-4, atol=1e-4)


def test_matching_is_the_mean_over_queries_of_three_kinds_of_pairs(
    objective: Representation, model: VLM, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([4, 3, 0, 2, 1])
    monkeypatch.setattr(contrast, "hard_negatives", lambda scores, same, chance: wrong)
    features, texts = features_of(model, batch), rows(objective, batch)
    pairs = [(i, i, 1) for i in range(5)] + [(i, int(wrong[0][i]), 0) for i in range(5)]
    wanted = torch.zeros(())
    for picture, text, truth in pairs + [(int(wrong[1][i]), i, 0) for i in range(5)]:
        seen = objective.text.together(model.fusion, features[picture][None], texts[text])[0]
        said = torch.stack([objective.match(query) for query in seen]).mean(0)
        wanted = wanted - said.log_softmax(-1)[truth]
    total, count = objective(model, batch)["itm"]
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-4)
    assert count == 15


@torch.no_grad()
def test_generation_is_of_every_word_and_the_end(objective: Representation, model: VLM, batch: Batch) -> None:
    features, wanted, number = features_of(model, batch), 0.0, 0
    for picture, ids in zip(features, rows(objective, batch), strict=True):
        begun = ids.clone()
        begun[0, 0] = V + 1
        _, words = objective.text.told(model.fusion, picture[None], begun[:, :-1])
        logits = objective.say(words[0]) @ objective.text.words.weight.T + objective.bias
        for given, target in zip(logits.log_softmax(-1), ids[0, 1:], strict=True):
            wanted -= float(0.9 * given[target] + 0.1 * given.mean())
            number += 1
    total, count = objective(model, batch)["itg"]
    assert float(total) == pytest.approx(wanted, rel=1e-4)
    assert count == number == objective.counts(batch)["itg"]


def test_wrong_pairs_are_never_true_ones(
    objective: Representation, model: VLM, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Tensor, Tensor]] = []
    matches = objective.matches

    def spy(qformer: object, features: Tensor, ids: Tensor) -> Tensor:
        asked.append((features, ids))
        return matches(model.fusion, features, ids)

    monkeypatch.setattr(objective, "matches", spy)
    captions = batch.extra["captions"].clone()
    captions[3] = captions[0]  # two pictures of one caption, either of which is right
    alike = replace(batch, extra=batch.extra | {"captions": captions})
    for step in range(20):
        objective.prepare(model, [alike], f"0 0 {step}")
        objective(model, alike)
    features, read = features_of(model, alike), objective.written(captions)
    for pictures, ids in asked:
        for k in range(15):
            own = next(i for i in range(5) if torch.equal(pictures[k], features[i]))
            assert torch.equal(ids[k], read[own]) == (k < 5)


# ---------------------------------------------------------------------------------------------------------- what learns


def test_gradients_land_on_the_q_former_alone(two: Recipe, batch: Batch, tokenizer: Tokenizer) -> None:
    model, stage = initial_model(two), two.stages[0]
    rates = learning_rates(model, stage.learn)
    freeze(model, rates)
    objective = objective_of(stage, two, tokenizer, model)
    torch.stack([total for total, _ in objective(model, batch).values()]).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(rates)
    assert not any(name.startswith(("encoder.", "decoder.", "fusion.out.")) for name in rates)
    assert all(p.grad is not None and bool(p.grad.any()) for p in objective.parameters())


def test_the_second_stage_begins_from_the_first_one_s_q_former(two: Recipe, folder: Path) -> None:
    steps = list(run(two, folder, workers=0))
    assert [(step.stage, set(step.terms)) for step in steps[2:4]] == [
        ("represent", {"itc", "itm", "itg"}),
        ("generate", {"answers"}),
    ]
    found = last_of(folder, two.stages[0])
    assert found is not None
    drawn, last = initial_model(two).state_dict(), final_model(two, folder)[0].state_dict()
    for name in learning_rates(initial_model(two), LEARN):
        assert torch.equal(last[name], found.tensors["model"][name]), name
        assert not torch.equal(last[name], drawn[name]), name
    assert not torch.equal(last["fusion.out.weight"], drawn["fusion.out.weight"])
    assert last.keys() == drawn.keys()  # nothing of the text's side is left


def test_what_it_cannot_teach(two: Recipe, recipe: Recipe, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="a Q-Former of queries alone, this model has projector"):
        Representation(initial_model(recipe), V, 0, RepresentationConfig())
    reads = replace(two.model, fusion=replace(two.model.fusion, vocab_size=30))
    with pytest.raises(ConfigError, match="this model has one that reads instructions"):
        Representation(VLM(reads), V, 0, RepresentationConfig())
    stage = two.stages[0]
    with pytest.raises(ConfigError, match="'qformer' compares samples of a batch, expected one of at least 2"):
        check_sources(replace(stage, batch=1), two.sources)
    with pytest.raises(ConfigError, match="learns from pictures"):
        check_sources(replace(stage, data={"captions": 1.0}), two.sources)


def test_two_objectives_with_one_name_of_a_term_are_told(
    two: Recipe, model: VLM, batch: Batch, tokenizer: Tokenizer
) -> None:
    stage = replace(two.stages[0], objective={"qformer": 1.0, "itm": 1.0})
    with pytest.raises(ConfigError, match="two objectives of one stage have a term 'itm'"):
        objective_of(stage, two, tokenizer, model).counts(batch)


# ------------------------------------------------------------------------------------------------------------- learning


@dataclass(frozen=True)
class Things:
    """Scenes of one thing, told by its colour and shape."""

    gives: Literal["pictures"] = "pictures"
    length: int | None = None

    def __call__(self, seed: int, epoch: int, index: int) -> Sample:
        drawn = scene(70_000_000 + index, SceneConfig(min_objects=1, max_objects=1, textures=("solid",)))
        (thing,) = drawn.objects
        return Sample(image=Image(drawn.picture()), caption=f"a {thing.color} {thing.shape}", name=str(index))


def test_it_learns_to_tell_which_caption_is_of_which_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the default model's encoder sees, matched with words; on 64 other scenes, and on blank ones by chance."""
    mini = shipped("sightline-mini")
    weights, words = load_model(locate("sightline-mini")), Tokenizer.from_folder(locate("sightline-mini"))
    fusion = QFormerConfig(inputs=192, width=192, queries=8, hidden=32, depth=2, heads=4, mlp=64)
    rates = dict.fromkeys(LEARN, 1e-2)
    objective = RepresentationConfig(projection=32, max_length=16)
    stage = Stage(
        "represent", rates, {"things": 1.0}, 160, objective=objective, precision="fp32", warmup=10, save_every=1000
    )
    world = Recipe("things", replace(mini.model, fusion=fusion), Square(128), {}, (stage,))
    model = initial_model(world)
    model.encoder.load_state_dict(weights.encoder.state_dict())
    data = Batches(stage, 0, 0, {"things": Things()}, processor_of(world, words, model))
    known = [data[k] for k in range(16)]
    unseen = Batches(replace(stage, batch=64), 0, 0, {"things": Things()}, data.processor)[100]
    assert unseen.patches is not None
    blank = replace(unseen, patches=replace(unseen.patches, values=torch.zeros_like(unseen.patches.values)))
    trainer = Trainer(world, stage, model, objective_of(stage, world, words, model), tmp_path)
    with torch.no_grad():
        seen = {id(batch): features_of(model, batch) for batch in (*known, unseen, blank)}
    monkeypatch.setattr(representation, "features_of", lambda model, batch: seen[id(batch)])
    assert 0.3 < matched(trainer, seen[id(unseen)], unseen) < 0.7
    for k in range(stage.steps):
        assert trainer.learn([known[k % len(known)]]).applied
    assert matched(trainer, seen[id(unseen)], unseen) > 0.85
    assert 0.3 < matched(trainer, seen[id(blank)], unseen) < 0.7


@torch.no_grad()
def matched(trainer: Trainer, features: Tensor, batch: Batch) -> float:
    """For how many pictures the own caption is likelier than that of another, where the two differ."""
    taught = trainer.objective.get_submodule("terms.qformer")
    assert isinstance(taught, Representation)
    ids = taught.written(batch.extra["captions"])
    other = ids.roll(1, 0)
    likely = [taught.matches(trainer.model.fusion, features, each).log_softmax(-1)[:, 1] for each in (ids, other)]
    return float((likely[0] > likely[1])[(ids != other).any(1)].float().mean())
