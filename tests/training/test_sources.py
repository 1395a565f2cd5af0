"""Samples and batches are pure functions of their number, and what they hold is what the scene says."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from sightline.core.errors import ConfigError
from sightline.core.geometry import Box
from sightline.core.sequence import Region, Text
from sightline.data.batch import IGNORE, Batch
from sightline.language.tokenizer import Tokenizer
from sightline.training.loader import Batches, batches
from sightline.training.recipe import Recipe
from sightline.training.run import initial_model, processor_of
from sightline.training.sources import ScenesSource
from sightline.worlds.scenes import COLORS, SHAPES, scene

KINDS = ("pictures", "captions", "questions", "text")


def data_of(recipe: Recipe, tokenizer: Tokenizer, stage: str, **changes: object) -> Batches:
    number = recipe.stage(stage)
    processor = processor_of(recipe, tokenizer, initial_model(recipe))
    return Batches(replace(recipe.stages[number], **changes), number, recipe.seed, recipe.sources, processor)


def equal(one: Batch, other: Batch) -> bool:
    assert one.labels is not None and other.labels is not None
    pairs = [(one.ids, other.ids), (one.labels, other.labels), (one.slots, other.slots)]
    if one.patches is not None and other.patches is not None:
        pairs.append((one.patches.values, other.patches.values))
    return one.extra["names"] == other.extra["names"] and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_a_pure_function_of_its_number(kind: str) -> None:
    source = ScenesSource(kind=kind)  # type: ignore[arg-type]
    one, again, other, seeded = source(0, 0, 7), source(0, 0, 7), source(0, 0, 8), source(1, 0, 7)
    assert (one.conversation, one.image, one.caption) == (again.conversation, again.image, again.caption)
    assert all(np.array_equal(one.dense[name], again.dense[name]) for name in one.dense)
    assert len({one.name, other.name, seeded.name, source(0, 1, 7).name}) == 4


def test_a_picture_comes_with_its_caption_and_dense_truth() -> None:
    source = ScenesSource(kind="pictures", start=100)
    sample, truth = source(0, 0, 5), scene(105)
    assert sample.image is not None
    assert np.array_equal(np.asarray(sample.image.picture), np.asarray(truth.picture()))
    assert sample.dense["object"].sum() == len(truth.objects)
    pairs = zip(sample.dense["color"].flat, sample.dense["shape"].flat, strict=True)
    found = {(COLORS[color], SHAPES[shape]) for color, shape in pairs if color >= 0}
    assert found == {(each.color, each.shape) for each in truth.objects}
    assert sample.caption and not sample.conversation


def test_text_names_every_object_and_its_box_without_a_picture() -> None:
    sample, truth = ScenesSource(kind="text", turns=3)(0, 0, 11), scene(11)
    described, *talk = sample.conversation
    places = [part.shape for part in described.parts if isinstance(part, Region)]
    boxes = [(place.x1, place.y1, place.x2, place.y2) for place in places if isinstance(place, Box)]
    assert boxes == [tuple(map(float, each.box)) for each in truth.objects]
    assert [message.role for message in talk] == ["user", "assistant"] * (len(talk) // 2) and len(talk) == 6
    assert sample.image is None


def test_questions_are_answered_by_words_or_by_places() -> None:
    source = ScenesSource(kind="questions")
    answers = [m for k in range(20) for m in source(0, 0, k).conversation if m.role == "assistant"]
    kinds = Counter(type(part) for message in answers for part in message.parts)
    assert kinds[Text] > 50 and kinds[Region] > 20


def test_plain_samples_ask_the_kinds_that_are_wanted_about_objects_that_all_differ() -> None:
    source = ScenesSource(kind="plain", first=3, grown=10**9, asks=("color",), distinct=True)
    for index in range(20):
        talk = source(0, 0, index).conversation
        asked, answers = [m.text for m in talk[::2]], [m.text for m in talk[1::2]]
        assert 2 <= len(asked) <= 8
        assert all(text.startswith("What color is the ") for text in asked)
        assert len(set(asked)) == len(set(answers)) == len(asked)


def test_a_scene_without_anything_to_ask_is_another_scene() -> None:
    """Of many objects few have a shape or colour of their own; a source must not run dry on those without any."""
    source = ScenesSource(kind="plain", asks=("color",))
    assert any(source.drawn(number, 0) is None for number in range(40))
    assert all(source(0, 0, index).conversation for index in range(40))
    with pytest.raises(ConfigError, match="holds anything that it asks: relation"):
        ScenesSource(kind="plain", asks=("relation",), first=1, grown=10**9)(0, 0, 0)


def test_scenes_grow_with_the_index() -> None:
    source = ScenesSource(kind="pictures", first=2, grown=1000)

    def objects(index: int) -> float:
        return float(np.mean([source(0, 0, index + k).dense["object"].sum() for k in range(40)]))

    assert all(source(0, 0, k).dense["object"].sum() <= 2 for k in range(40))
    assert objects(0) < objects(500) < objects(5000)
    assert max(source(0, 0, 5000 + k).dense["object"].sum() for k in range(40)) > 10


def test_scenes_that_do_not_grow_begin_with_all_objects() -> None:
    with pytest.raises(ConfigError, match="first is 2, but scenes of 12 objects come at once; set grown as well"):
        ScenesSource(kind="pictures", first=2)
    for first in (0, 13):
        with pytest.raises(ConfigError, match=f"first is {first} objects, expected 1 to 12"):
            ScenesSource(kind="pictures", first=first, grown=10)


def test_training_never_meets_the_scenes_of_evaluation(recipe: Recipe) -> None:
    from sightline.evaluation.scenes import FIRST_SEED
    from sightline.recipes import sightline_mini

    mini = sightline_mini()
    used: list[range] = []
    for stage in mini.stages:
        length = stage.steps * stage.batch * stage.accumulate
        used += [range(mini.sources[name].start, mini.sources[name].start + length) for name in stage.data]
    assert all(part.stop <= FIRST_SEED for part in used)
    for seed, epoch in [(1, 0), (0, 1), (1, 1), (900, 0)]:
        number = int(ScenesSource(kind="text")(seed, epoch, 0).name.removeprefix("scene "))
        assert number > FIRST_SEED + 50_000_000 or number < FIRST_SEED - 50_000_000


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("stage", ["encoder", "language", "instruct"])
def test_batch_k_is_the_same_from_wherever_it_is_reached(recipe: Recipe, tokenizer: Tokenizer, stage: str) -> None:
    data = data_of(recipe, tokenizer, stage)
    straight = list(batches(data, 0, workers=0))
    assert len(straight) == 6
    for start, workers in [(0, 1), (4, 0), (4, 1)]:
        found = list(batches(data, start, workers))
        assert len(found) == 6 - start
        assert all(equal(a, b) for a, b in zip(found, straight[start:], strict=True))
    assert not equal(straight[0], straight[1])


def test_every_sample_is_used_once(recipe: Recipe, tokenizer: Tokenizer) -> None:
    data = data_of(recipe, tokenizer, "language", accumulate=2)
    names = [name for batch in batches(data, 0, workers=0) for name in batch.extra["names"]]
    assert len(names) == len(set(names)) == 6 * 2 * 2


def test_sources_are_drawn_by_weight(recipe: Recipe, tokenizer: Tokenizer) -> None:
    data = data_of(recipe, tokenizer, "instruct", steps=100)
    starts = Counter(int(data.sample(k).name.removeprefix("scene ")) // 1_000_000 for k in range(200))
    assert set(starts) == {2, 3} and 0.65 < starts[2] / 200 < 0.85  # weights 3 and 1


@pytest.mark.parametrize("stage", ["language", "align", "instruct"])
def test_every_row_teaches_its_answers(recipe: Recipe, tokenizer: Tokenizer, stage: str) -> None:
    """The learned ids of each row, put together, are the answers of its sample, each closed by the end token."""
    data = data_of(recipe, tokenizer, stage, batch=6)
    batch = data[0]
    assert batch.labels is not None
    for row, k in zip(batch.labels, range(6), strict=True):
        learned = row[row != IGNORE].tolist()
        said = [message for message in data.sample(k).conversation if message.role == "assistant"]
        assert learned.count(tokenizer.control("<eos>")) == len(said) > 0
        written = tokenizer.decode(learned)
        assert all(part.text.strip() in written for m in said for part in m.parts if isinstance(part, Text))


def test_a_sample_that_cannot_be_made_ends_the_run_instead_of_hanging_it() -> None:
    """A helper process must not outlive the failure, which the program would wait for without end."""
    code = """
from sightline.training.workers import ahead

def broken(k): raise ValueError(f"sample {k} is broken")

next(ahead(broken, 4, 1, 2, print))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "sample 0 is broken" in ended.stderr
