"""Preference samples: rankings, a judge's scores, and truths of scenes against what the picture contradicts."""

import random
from collections import Counter

import pytest

from sightline.core.errors import ConfigError, DataError, InputError
from sightline.core.sequence import Message, Text, ask, images_of
from sightline.training.preferences import HALLUCINATIONS, Listed, PairsSource, ranked, scored
from sightline.training.sources import Sample, ScenesSource
from sightline.worlds.scene_phrases import Phrase
from sightline.worlds.scenes import COLORS, SHAPES, SceneConfig, scene


def said(*texts: str) -> list[Message]:
    return [Message("assistant", (Text(text),)) for text in texts]


def pair(sample: Sample) -> tuple[str, str]:
    assert sample.chosen is not None and sample.rejected is not None
    return sample.chosen.text, sample.rejected.text


def test_a_ranking_gives_every_pair_that_differs() -> None:
    found = ranked(ask("?"), said("a", "b", "c", "d"), [2.0, 1.0, 3.0, 2.0], name="x")
    assert {pair(sample) for sample in found} == {("a", "b"), ("c", "a"), ("c", "b"), ("d", "b"), ("c", "d")}
    assert [sample.name for sample in found] == [f"x {k}" for k in range(5)]
    assert all(sample.conversation == ask("?") for sample in found)
    with pytest.raises(InputError, match="1 ratings for 2 answers"):
        ranked(ask("?"), said("a", "b"), [1.0])


def test_a_judge_reads_the_whole_conversation() -> None:
    heard = []

    def length(conversation: tuple[Message, ...]) -> float:
        heard.append([message.text for message in conversation])
        return len(conversation[-1].text)

    found = scored(ask("what?"), said("long", "no"), length)
    assert [pair(sample) for sample in found] == [("long", "no")]
    assert heard == [["what?", "long"], ["what?", "no"]]


def test_a_list_is_a_source_that_uses_each_sample_once_an_epoch() -> None:
    samples = [Sample(name=str(k)) for k in range(7)]
    source = Listed(samples)
    rounds = [[source(3, 0, 7 * turn + k).name for k in range(7)] for turn in range(2)]
    assert all(sorted(names) == [str(k) for k in range(7)] for names in rounds)
    assert rounds[0] != rounds[1] == [source(3, 1, k).name for k in range(7)]
    assert rounds[0] == [source(3, 0, k).name for k in range(7)]


@pytest.mark.parametrize("kind", list(HALLUCINATIONS))
def test_samples_are_pure_and_one_answer_is_true(kind: str) -> None:
    source = PairsSource(asks=(kind,), first=6)
    for index in range(60):
        one, again = source(0, 0, index), source(0, 0, index)
        assert one == again
        good, bad = pair(one)
        assert good != bad and len(images_of(one.conversation)) == 1
    assert len({source(0, 0, 1).name, source(1, 0, 1).name, source(0, 1, 1).name, source(0, 0, 2).name}) == 4


def test_what_is_rejected_is_not_in_the_picture() -> None:
    wrong: Counter[str] = Counter()
    for seed in range(150):
        picture = scene(seed, SceneConfig(max_objects=6))
        known = {(each.color, each.shape) for each in picture.objects}
        found = HALLUCINATIONS["count"](picture, random.Random(seed))
        assert found is not None and abs(int(found[1]) - int(found[2])) == 1 and int(found[2]) >= 0
        found = HALLUCINATIONS["caption"](picture, random.Random(seed))
        assert found is not None
        told = [{(c, s) for c in COLORS for s in SHAPES if Phrase(c, s).singular() in text} for text in found[1:]]
        assert known <= told[0]
        assert told[1] - told[0] or len(told[1]) < len(told[0]), found
        wrong["more" if len(found[2].split()) > len(found[1].split()) else "other"] += 1
        if (asked := HALLUCINATIONS["color"](picture, random.Random(seed))) is not None:
            shape = next(s for s in SHAPES if f"the {s}?" in asked[0])
            assert (asked[1], shape) in known and (asked[2], shape) not in known
            wrong["color"] += 1
        if (asked := HALLUCINATIONS["existence"](picture, random.Random(seed))) is not None:
            assert {asked[1], asked[2]} == {"yes", "no"}
            wrong[asked[1]] += 1
    assert min(wrong[name] for name in ("more", "other", "color", "yes", "no")) > 20


def test_what_is_known_of_a_picture_comes_beside_the_prompt_and_not_in_it() -> None:
    sample, picture = PairsSource(asks=("count",))(0, 0, 4), scene(4)
    (fact,) = sample.facts
    assert all(each.color in fact and each.shape in fact for each in picture.objects)
    assert fact not in sample.conversation[0].text
    assert all(ScenesSource(kind=kind)(0, 0, 4).facts == (fact,) for kind in ("questions", "plain", "captions"))


def test_answers_that_say_the_same_are_rated_once() -> None:
    heard: list[str] = []
    found = scored(ask("what?"), said("a", "b", "a"), lambda talk: heard.append(talk[-1].text) or len(heard))  # type: ignore[func-returns-value]
    assert heard == ["a", "b"] and [pair(sample) for sample in found] == [("b", "a")]


def test_the_prompt_of_a_conversation_is_what_its_last_answer_answers() -> None:
    talk = (*ask("one?", answer="1"), *ask("two?", answer="2"))
    later, beside = Sample(talk).prompt, Sample(talk, branches=True).prompt
    assert (later.conversation, later.chosen) == (talk[:3], talk[3])
    assert (beside.conversation, beside.chosen, beside.branches) == (talk[:1], talk[1], False)
    assert Sample(talk[:1], chosen=talk[1]).prompt == Sample(talk[:1], chosen=talk[1])
    for empty in (Sample(talk[:3]), Sample(talk[:1], branches=True), Sample()):
        with pytest.raises(DataError, match="no answer to a question"):
            empty.prompt  # noqa: B018


def test_an_unknown_kind_of_pair_is_told() -> None:
    with pytest.raises(ConfigError, match="asks is cuont, expected some of count, color, existence, caption"):
        PairsSource(asks=("cuont",))
