"""Pairs from AI feedback: what a judge tells apart is written, read again as preferences, and never asked twice."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from sightline.core.errors import CapacityError, DataError
from sightline.core.sequence import Conversation, Image, Message, Text, ask, images_of
from sightline.evaluation.feedback import Summary, rated, write_pairs
from sightline.serving.sampling import Sampling
from sightline.serving.talker import Answer, Stream, Talker
from sightline.training.preferences import PairsSource
from sightline.training.sources import FilesSource, Sample

RED = PIL.Image.new("RGB", (8, 8), "red")


class Speaker(Talker):
    """Says what its seed chooses, and remembers what it was asked."""

    name = "speaker"

    def __init__(self, *says: str) -> None:
        self.says, self.asked = says, list[Conversation]()

    def answer(
        self, talks: Sequence[Conversation], sampling: Sampling | Sequence[Sampling] = Sampling()
    ) -> list[Answer]:
        each = [sampling] * len(talks) if isinstance(sampling, Sampling) else sampling
        self.asked += talks
        said = [self.says[s.seed % len(self.says)] for s in each]
        return [Answer(text, error=CapacityError("full") if text == "!" else None) for text in said]

    def stream_chat(self, talk: Conversation, **sampling: Any) -> Stream:
        raise NotImplementedError


def brief(conversation: Conversation, facts: Sequence[str]) -> float:
    return -len(conversation[-1].text)


def samples(count: int = 2, name: str = "") -> list[Sample]:
    return [Sample(ask("what?", Image(RED, name), answer="red"), name=f"sample {k}") for k in range(count)]


def read(path: Path, images: Path | None = None) -> list[Sample]:
    where = str(images) if images else ""
    source = FilesSource(kind="preferences", format="openai-pairs", path=str(path), images=where)
    return [source(0, 0, k) for k in range(source.length or 0)]


def test_pairs_are_written_and_read_as_preferences(tmp_path: Path) -> None:
    model, path = Speaker("a", "ccc", "bb", "a", " "), tmp_path / "pairs.jsonl"
    assert write_pairs(model, samples(), brief, path, answers=5) == Summary(pairs=6)
    assert [talk[-1].role for talk in model.asked] == ["user"] * 10  # the answer that was there is not shown
    found = read(path)
    pairs = {(s.chosen.text, s.rejected.text) for s in found if s.chosen and s.rejected}
    assert pairs == {("a", "bb"), ("a", "ccc"), ("bb", "ccc")} and len(found) == 6
    assert all(images_of(s.conversation) == (Image(RED),) and s.conversation[-1].text == "what?" for s in found)


def test_pictures_of_a_folder_are_named_and_not_copied(tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    path = tmp_path / "below" / "pairs.jsonl"
    path.parent.mkdir()
    write_pairs(Speaker("a", "bb"), samples(1, "red.png"), brief, path, answers=2, images=tmp_path)
    assert '"red.png"' in path.read_text()
    (found,) = read(path, tmp_path)
    assert images_of(found.conversation) == (Image(RED),)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_pairs(Speaker("a", "bb"), samples(2), brief, path, answers=2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # a kill while the second prompt's pair was written
    model = Speaker("a", "bb")
    assert write_pairs(model, samples(3), brief, path, answers=2) == Summary(pairs=2, skipped=1)
    assert path.read_bytes().startswith(whole) and len(model.asked) == 4
    names = [json.loads(line)["name"] for line in path.read_text().splitlines()]
    assert names == ["sample 0", "sample 1", "sample 2"]


def test_what_cannot_be_asked_or_rated_costs_its_prompt_only(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    broken = [Sample(name="empty"), *samples(1)]
    assert write_pairs(Speaker("a", "bb"), broken, brief, path, answers=2) == Summary(pairs=1, errors=1)
    assert write_pairs(Speaker("a", "!"), samples(2)[1:], brief, path, answers=2) == Summary(errors=1)


def test_a_model_is_asked_for_a_number() -> None:
    model = Speaker("I say 7.5 of 10.")
    pair = PairsSource(first=2)(0, 0, 0)
    assert pair.chosen is not None
    talk = (*pair.conversation, pair.chosen)
    assert rated(model)(talk, pair.facts) == 7.5
    ((message,),) = model.asked
    assert images_of((message,)) == images_of(talk)
    for part in (pair.conversation[-1].text, f"assistant: {pair.chosen.text}", pair.facts[0], "from 1"):
        assert part in message.text
    with pytest.raises(DataError, match="speaker rates an answer with 'well', expected a number"):
        rated(Speaker("well"))((Message("user", (Text("?"),)), pair.chosen), ())
