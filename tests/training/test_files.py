"""Data sets on the disk as sources: every sample once an epoch, bad ones replaced, counted, named and capped."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from sightline.core.config import from_dict, to_dict
from sightline.core.errors import ConfigError, DataError
from sightline.core.sequence import Message, Text
from sightline.data.batch import IGNORE, Batch
from sightline.language.tokenizer import Tokenizer
from sightline.training import checkpoints
from sightline.training.loader import TRIES, Batches, batches
from sightline.training.recipe import Recipe, Stage
from sightline.training.records import PassedOver
from sightline.training.run import initial_model, processor_of, run, vocabulary_text
from sightline.training.settings import DEFAULTS
from sightline.training.sources import FilesSource, ScenesSource

Alone = Callable[..., Recipe]


def rows_of(folder: Path, count: int, bad: tuple[int, ...] = (), words: str = "word {}") -> Path:
    """LLaVA rows about one picture, the answer of each its number; those of `bad` name a picture that is not there."""
    PIL.Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    rows = []
    for i in range(count):
        turns = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": words.format(i)}]
        rows.append({"image": "none.png" if i in bad else "red.png", "conversations": turns})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own(recipe: Recipe, path: Path | str, stage: str = "instruct", **changes: Any) -> Recipe:
    """The recipe with one stage that reads a file."""
    source = FilesSource(kind="conversations", format="llava", path=str(path))
    settings = {"data": {"mine": 1.0}, "precision": "fp32", **changes}
    stages = (replace(recipe.stages[recipe.stage(stage)], **settings),)
    return replace(recipe, sources={**recipe.sources, "mine": source}, stages=stages)


def data_of(recipe: Recipe, tokenizer: Tokenizer) -> Batches:
    processor = processor_of(recipe, tokenizer, initial_model(recipe))
    return Batches(recipe.stages[0], 0, recipe.seed, recipe.sources, processor)


def names(found: list[Batch]) -> list[int]:
    """Line numbers of the samples in some batches."""
    return [int(name.rpartition(":")[2]) for batch in found for name in batch.extra["names"]]


# ------------------------------------------------------------------------------------------------------------- sources


def test_sources_are_told_apart_by_their_kind(recipe: Recipe) -> None:
    data = to_dict(own(recipe, "rows.jsonl"))
    assert from_dict(Recipe, data) == own(recipe, "rows.jsonl")
    data["sources"]["mine"]["fromat"] = "llava"
    with pytest.raises(ConfigError, match=r"unknown key 'sources\.mine\.fromat'; did you mean 'format'"):
        from_dict(Recipe, data)
    data["sources"]["mine"] = {"kind": "conversation", "format": "llava"}
    with pytest.raises(ConfigError, match=r"unknown sources\.mine\.kind 'conversation'; did you mean 'conversations'"):
        from_dict(Recipe, data)
    data["sources"]["mine"] = {"kind": "conversations", "format": "lava"}
    with pytest.raises(ConfigError, match="unknown format 'lava'; did you mean 'llava'"):
        from_dict(Recipe, data)
    with pytest.raises(ConfigError, match="format 'llava' does not give preferences"):
        FilesSource(kind="preferences", format="llava")
    with pytest.raises(ConfigError, match="format 'rlhf-v' does not give conversations"):
        FilesSource(kind="conversations", format="rlhf-v")


def test_training_without_a_path_is_refused_in_one_line(recipe: Recipe, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"source 'mine' names no file; set sources\.mine\.path=FILE"):
        next(run(own(recipe, ""), folder, workers=0))


def test_samples_are_conversations_captions_or_preferences(tmp_path: Path) -> None:
    path = str(rows_of(tmp_path, 1))
    talk = FilesSource(kind="conversations", format="llava", path=path)(0, 0, 0)
    assert talk.conversation[1].text == "word 0" and talk.name == f"{path}:1" and not talk.branches
    pair = FilesSource(kind="image-text", format="llava", path=path)(0, 0, 0)
    assert pair.image is not None and pair.caption == "word 0" and not pair.conversation
    row = {"image": "red.png", "question": "which?", "chosen": "this", "rejected": "that"}
    (tmp_path / "pairs.json").write_text(json.dumps([row]))
    found = FilesSource(kind="preferences", format="rlhf-v", path=str(tmp_path / "pairs.json"))(0, 0, 0)
    assert found.conversation[0].text == "which?" and len(found.conversation) == 1
    assert found.chosen == Message("assistant", (Text("this"),)) and found.rejected == Message(
        "assistant", (Text("that"),)
    )
    (tmp_path / "text.json").write_text(
        '[{"conversations": [{"from":"human","value":"a"},{"from":"gpt","value":"b"}]}]'
    )
    with pytest.raises(DataError, match=r"text\.json\[0\]: 0 pictures"):
        FilesSource(kind="image-text", format="llava", path=str(tmp_path / "text.json"))(0, 0, 0)


def test_captions_of_files_teach_the_encoder(recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = FilesSource(kind="image-text", format="llava", path=str(rows_of(tmp_path, 4)))
    stage = replace(recipe.stages[0], data={"mine": 1.0}, objective={"siglip": 1.0})
    chosen = replace(recipe, sources={"mine": source}, stages=(stage,))
    batch = data_of(chosen, tokenizer)[0]
    assert batch.extra["captions"].shape[0] == 2 and batch.patches is not None and batch.patches.values.shape[0] == 8
    dense = replace(chosen, stages=(replace(stage, objective={"dense": 1.0}),))
    with pytest.raises(ConfigError, match="objective 'dense' learns the truth of every patch; source 'mine' has none"):
        data_of(dense, tokenizer)
    with pytest.raises(ConfigError, match="packs rows, but reads pictures; only conversations are packed"):
        data_of(replace(chosen, stages=(replace(stage, packing=64),)), tokenizer)


def test_the_vocabulary_knows_the_words_of_files(recipe: Recipe, tmp_path: Path) -> None:
    chosen = own(recipe, rows_of(tmp_path, 3, bad=(1,)))
    chosen = replace(chosen, sources={"mine": chosen.sources["mine"]})
    assert list(vocabulary_text(chosen)) == ["which?", "word 0", "which?", "word 2"]


# --------------------------------------------------------------------------------------------------------------- order


def test_every_sample_comes_once_an_epoch_in_another_order(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    data = data_of(own(recipe, rows_of(tmp_path, 12), steps=6, batch=4), tokenizer)
    found = names(list(batches(data, 0, workers=0)))
    assert sorted(found[:12]) == sorted(found[12:]) == list(range(1, 13))
    assert found[:12] != found[12:] and found[:12] != sorted(found[:12])
    assert names(list(batches(data, 2, workers=2))) == found[8:]
    other = data_of(replace(own(recipe, rows_of(tmp_path, 12), steps=6, batch=4), seed=1), tokenizer)
    assert names([other[0], other[1], other[2]]) != found[:12]


def test_mixed_sources_keep_their_shares_and_their_own_order(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    chosen = own(recipe, rows_of(tmp_path, 6), steps=6, batch=5, data={"mine": 0.4, "captions": 0.6})
    found = [name for batch in batches(data_of(chosen, tokenizer), 0, 0) for name in batch.extra["names"]]
    mine = [int(name.rpartition(":")[2]) for name in found if "rows" in name]
    assert len(mine) == 12 and sorted(mine[:6]) == sorted(mine[6:]) == [1, 2, 3, 4, 5, 6]
    assert all(sum("rows" in name for name in found[i : i + 5]) == 2 for i in range(0, 30, 5))
    scenes = [int(name.removeprefix("scene ")) - 3_000_000 for name in found if "scene" in name]
    assert scenes == [i for i, name in enumerate(found) if "scene" in name]  # what grows, grows with the stage


@pytest.mark.parametrize("group, workers, start", [(3, 0, 0), (3, 1, 0), (3, 0, 4), (3, 2, 5), (4, 0, 2)])
def test_grouped_by_length_batches_are_pure_functions_of_their_number(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer, group: int, workers: int, start: int
) -> None:
    data = data_of(own(recipe, rows_of(tmp_path, 40), steps=10, batch=4, group=group), tokenizer)
    wanted = [data[k] for k in range(10)]
    assert sorted(names(wanted)) == list(range(1, 41))
    found = list(batches(data, start, workers, group))
    assert len(found) == 10 - start
    for one, other in zip(found, wanted[start:], strict=True):
        assert torch.equal(one.ids, other.ids) and one.extra["names"] == other.extra["names"]


def test_grouping_leaves_little_padding_and_no_order_of_lengths(
    recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = rows_of(tmp_path, 64)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["conversations"][1]["value"] = "one " * (1 + i * 37 % 64)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def padding(group: int) -> tuple[float, list[int]]:
        found = list(batches(data_of(own(recipe, path, steps=8, batch=8, group=group), tokenizer), 0, 0, group))
        real = sum(int((batch.layout.document >= 0).sum()) for batch in found)
        return 1 - real / sum(batch.ids.numel() for batch in found), [batch.layout.length for batch in found]

    (alone, _), (grouped, lengths) = padding(1), padding(8)
    assert alone > 0.25 and grouped < 0.1
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)


# ------------------------------------------------------------------------------------------------------------ bad data


def test_a_bad_sample_is_replaced_named_and_counted_once(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    chosen = own(recipe, rows_of(tmp_path, 20, bad=(3, 7)), steps=20, batch=2, save_every=100)
    done = list(run(chosen, folder, workers=0))
    assert len(done) == 20 and all(step.applied for step in done)
    lines = (folder / "passed-over.txt").read_text().splitlines()
    where = f"{tmp_path}/rows.jsonl"
    assert sorted(lines) == [f"{where}:{line}: none.png: no such file" for line in (4, 8)]


def test_what_is_put_in_place_is_the_same_for_all(recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer) -> None:
    bad = tuple(range(0, 24, 3))
    data = data_of(own(recipe, rows_of(tmp_path, 24, bad), steps=6, batch=4), tokenizer)
    wanted = list(batches(data, 0, 0))
    found = names(wanted)
    assert not {i + 1 for i in bad} & set(found) and len(found) == 24
    assert Counter(found).most_common(1)[0][1] >= 2  # others twice, in their place
    passed = [line for batch in wanted for line in batch.extra["passed"]]
    assert {line.split(":")[1] for line in passed} == {str(i + 1) for i in bad}
    for start, workers in ((0, 2), (3, 1)):
        again = list(batches(data, start, workers))
        assert names(again) == found[start * 4 :]
        assert [line for batch in again for line in batch.extra["passed"]] == [
            line for batch in wanted[start:] for line in batch.extra["passed"]
        ]


def test_a_killed_run_of_files_goes_on_bit_for_bit(
    recipe: Recipe, fresh: Callable[[str], Path], tmp_path: Path
) -> None:
    path = rows_of(tmp_path, 10, bad=(2,))
    chosen = own(recipe, path, steps=8, batch=2, accumulate=2, packing=128, group=4, save_every=3)
    whole = [step.loss for step in run(chosen, fresh("whole"), workers=0)]
    folder, first = fresh("killed"), []
    for step in run(chosen, folder, workers=0):
        first.append(step.loss)
        if step.step == 5:
            break
    assert first == whole[:5]
    assert [step.loss for step in run(chosen, folder, workers=1)] == whole[3:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_with_nothing_to_use_is_one_clear_error(
    recipe: Recipe, folder: Path, tmp_path: Path, workers: int
) -> None:
    chosen = own(recipe, rows_of(tmp_path, 3, bad=(0, 1, 2)))
    with pytest.raises(DataError) as failure:
        next(run(chosen, folder, workers=workers))
    told = str(failure.value)
    assert told.startswith(
        f"source 'mine': {TRIES} samples in a row cannot be used; the last is {tmp_path}/rows.jsonl:"
    )
    assert told.endswith("none.png: no such file") and "\n" not in told


def test_more_bad_samples_than_the_cap_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = torch.zeros(0)
    tally = PassedOver(tmp_path, 0.01)

    def batch(seen: int, *passed: str) -> list[Batch]:
        extra = {"names": ["good"] * seen, "passed": list(passed)}
        return [Batch(none, None, none, extra=extra)]  # type: ignore[arg-type]

    tally.count(batch(10, *(f"a:{i}: bad" for i in range(10))))  # of the first 1,000
    tally.count(batch(10, "a:3: bad", "a:4: bad"))  # told before
    with pytest.raises(DataError, match=r"11 of the first 30 samples cannot be used, more than 1.0%; the last is b:1"):
        tally.count(batch(10, "b:1: x"))
    assert capsys.readouterr().err.count("passed over") == 11 < PassedOver.TOLD
    assert len((tmp_path / "passed-over.txt").read_text().splitlines()) == 11
    later = PassedOver(tmp_path / "none", 0.01)  # a folder that cannot be written to costs nothing
    later.count(batch(5000))
    later.count(batch(0, *(f"a:{i}: bad" for i in range(50))))
    assert capsys.readouterr().err.count("passed over") == PassedOver.TOLD
    with pytest.raises(DataError, match="51 of the first 5000"):
        later.count(batch(0, "one more"))


def test_what_a_model_cannot_read_is_passed_over_too(recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Text longer than the context, which only the processor finds out."""
    path = rows_of(tmp_path, 8)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5]["conversations"][1]["value"] = "long " * 2000
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(batches(data_of(own(recipe, path, steps=4, batch=2), tokenizer), 0, 0))
    (line,) = [line for batch in found for line in batch.extra["passed"]]
    assert f"{path}:6: " in line and "for a context of 512" in line and len(names(found)) == 8


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_an_answer_of_a_pair_that_does_not_fit_is_passed_over_too(
    recipe: Recipe, folder: Path, tmp_path: Path, objective: str
) -> None:
    """Also where only another's answer is too long for a prompt, which KTO holds against it."""
    rows_of(tmp_path, 1)
    said = [("which?", "one two", "three")] * 8
    said[5] = ("which?", "long " * 2000, "two")
    said[6] = ("which? " * 60, "one", "two")
    said[7] = ("which?", "one " * 200, "two")
    rows = [{"image": "red.png", "question": q, "chosen": c, "rejected": r} for q, c, r in said]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FilesSource(kind="preferences", format="rlhf-v", path=str(path))
    settings: dict[str, Any] = {"steps": 8, "batch": 4, "objective": DEFAULTS[objective]}
    stage = replace(recipe.stages[3], data={"mine": 1.0}, **settings)
    assert len(list(run(replace(recipe, sources={"mine": source}, stages=(stage,)), folder, workers=0))) == 8
    (line,) = (folder / "passed-over.txt").read_text().splitlines()
    assert line.startswith(f"{path}:6: ") and "for a context of 512" in line


def test_the_whole_conversation_is_learned_turn_by_turn(recipe: Recipe, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Unlike the questions of a scene, a later turn sees those before it."""
    path = rows_of(tmp_path, 1)
    row = json.loads(path.read_text())
    row["conversations"] += [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "two"}]
    path.write_text(json.dumps(row))
    batch = data_of(own(recipe, path, steps=1, batch=1), tokenizer)[0]
    assert batch.labels is not None and batch.layout.causal and int(batch.layout.branch.sum()) == 0
    learned = tokenizer.decode(batch.labels[batch.labels != IGNORE].tolist())
    assert "word 0" in learned and "two" in learned and "how many" not in learned
    assert ScenesSource(kind="questions")(0, 0, 0).branches


def test_stages_of_files_finish_and_leave_checkpoints(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    chosen = own(recipe, rows_of(tmp_path, 4), steps=3, batch=2, save_every=1)
    assert isinstance(chosen.stages[0], Stage) and len(list(run(chosen, folder, workers=0))) == 3
    assert len(checkpoints.listed(folder / "checkpoints" / "instruct")) == 2


def test_what_is_known_of_pictures_lies_in_a_file_beside(tmp_path: Path) -> None:
    path, facts = rows_of(tmp_path, 2), tmp_path / "facts.json"
    facts.write_text(json.dumps({"red.png": ["all of it is red"]}))
    source = FilesSource(kind="conversations", format="llava", path=str(path), facts=str(facts))
    assert source(0, 0, 0).facts == ("all of it is red",)
    assert replace(source, facts="")(0, 0, 0).facts == ()
    facts.with_name("none.json").write_text("{}")
    with pytest.raises(DataError, match=r"none\.json has no caption of red\.png"):
        replace(source, facts=str(facts.with_name("none.json")))(0, 0, 0)
