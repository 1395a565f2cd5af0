"""The engine: the same answers however many are asked at once, texts cut where they end, streams that lose nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import sightline
from sightline import CapacityError, InputError, Sampling
from sightline.core.sequence import Conversation, Image, Message, Text, ask
from sightline.serving.engine import Engine, Reply

TALK = ask("how many?")
Writer = Callable[..., Engine]


def noise(seed: int) -> Image:
    return Image(PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 48, 3), dtype=np.uint8)))


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return sightline.load(tiny_folder).engine


@pytest.fixture
def seen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the encoder was given."""
    calls: list[int] = []
    encoder = engine.model.encoder
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda patches: calls.append(len(patches.grids)) or forward(patches))
    return calls


def same(together: Sequence[Reply], alone: Sequence[Reply]) -> None:
    """Equal ids, texts and costs; probabilities up to what the size of a batch may move."""
    for a, b in zip(together, alone, strict=True):
        assert (a.ids, a.grounded, a.usage, a.error) == (b.ids, b.grounded, b.usage, b.error)
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-4)
        assert a.confidence == pytest.approx(b.confidence, abs=1e-4)


QUESTIONS = ("how many?", "where is the blue square? " * 4, "yes", "is there one?", "two")
TALKS: dict[str, tuple[list[Conversation], list[int]]] = {
    "one picture": ([ask(q, noise(0)) for q in QUESTIONS], [1]),
    "equal pictures": ([ask(q, noise(0), noise(1)) for q in QUESTIONS], [2]),
    "other pictures": ([ask(q, noise(i)) for i, q in enumerate(QUESTIONS)], [5]),
    "pictures in another order": ([ask("how?", noise(0), noise(1)), ask("how?", noise(1), noise(0))], [4]),
    "no picture": ([ask(q) for q in QUESTIONS], []),
    "some of each": (
        [ask(q, *pictures) for q in QUESTIONS[:3] for pictures in ((noise(0),), (), (noise(1), noise(2)))],
        [1, 2],
    ),
    "a question that begins another": ([ask("how", noise(0)), ask("how many red", noise(0))], [1]),
    "one question twice": ([ask("how many?", noise(0))] * 2, [1]),
}


@pytest.mark.parametrize("name", TALKS)
def test_many_at_once_are_as_one_by_one(engine: Engine, seen: list[int], name: str) -> None:
    """Greedy tokens are equal in float32, and pictures that questions share are seen once."""
    talks, calls = TALKS[name]
    together = engine.answer(talks, Sampling(max_new_tokens=10))
    assert sorted(seen) == calls
    same(together, [engine.answer([talk], Sampling(max_new_tokens=10))[0] for talk in talks])
    assert len({reply.ids for reply in together}) > 1 or name == "one question twice"


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_small_batches_change_nothing(engine: Engine, batch: int) -> None:
    talks = TALKS["some of each"][0]
    small = Engine(engine.model, engine.processor, batch=batch)
    same(small.answer(talks, Sampling(max_new_tokens=6)), engine.answer(talks, Sampling(max_new_tokens=6)))


def test_every_conversation_may_have_its_own_sampling(engine: Engine) -> None:
    talks = [ask(q, noise(0)) for q in QUESTIONS]
    settings = [Sampling(max_new_tokens=3 + i, temperature=i / 2, seed=i, top_p=1 - i / 10) for i in range(5)]
    same(engine.answer(talks, settings), [engine.answer([t], s)[0] for t, s in zip(talks, settings, strict=True)])


def test_one_that_cannot_be_read_gets_its_error(engine: Engine) -> None:
    good = ask("how many?", noise(0))
    bad = {
        "for a context of 256": ask("circles " * 400, noise(0)),
        "message 1 is from the assistant": (Message("assistant", (Text("two"),)),),
        "the conversation is empty": (Message("system", (Text("be brief"),)),),
    }
    first, *failed, last = engine.answer([good, *bad.values(), good], Sampling(max_new_tokens=4))
    same([first, last], engine.answer([good], Sampling(max_new_tokens=4)) * 2)
    for reply, message in zip(failed, bad, strict=True):
        assert isinstance(reply.error, CapacityError | InputError) and message in str(reply.error)
        assert (reply.ids, reply.grounded.text, reply.usage) == ((), "", {})


def test_nothing_asked_is_nothing_answered(engine: Engine) -> None:
    assert engine.answer([]) == []


def test_a_call_leaves_nothing_behind(engine: Engine) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=1.5, seed=3)
    first = engine.answer([ask("how many?", noise(0))], sampling)
    engine.answer([ask("where?", noise(1)), ask("yes")], Sampling(temperature=1.0))
    same(engine.answer([ask("how many?", noise(0))], sampling), first)


def test_usage_counts_what_was_read_and_written(engine: Engine) -> None:
    talk = ask("how many?", noise(0), noise(1))
    (reply,) = engine.answer([talk], Sampling(max_new_tokens=7))
    assert reply.usage == {
        "image_tokens": 32,
        "prompt_tokens": engine.processor(talk).length,
        "completion_tokens": len(reply.ids),
    }
    assert 0 < reply.timing["first_token"] <= reply.timing["total"]
    assert len(reply.probabilities) == len(reply.ids) and all(0 < p <= 1 for p in reply.probabilities)


# ---------------------------------------------------------------------------------------------------------- where ends


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_max_new_tokens_is_how_many_are_written(writer: Writer, limit: int) -> None:
    engine = writer(" one two three four five")
    (reply,) = engine.answer([TALK], Sampling(max_new_tokens=limit))
    assert reply.usage["completion_tokens"] == len(reply.ids) == limit
    assert reply.grounded.text == " ".join(["one", "two", "three", "four"][:limit])


def test_the_end_token_ends_an_answer_and_is_not_part_of_it(writer: Writer) -> None:
    (reply,) = writer(" one two").answer([TALK])
    assert reply.grounded.text == "one two"
    assert len(reply.ids) == len(reply.probabilities) == 2
    assert reply.confidence == pytest.approx(1.0, abs=1e-3)


def test_rows_that_ended_do_not_disturb_those_that_go_on(engine: Engine) -> None:
    talks = [ask(q, noise(0)) for q in QUESTIONS]
    limits = [Sampling(max_new_tokens=n) for n in (1, 9, 3, 6, 2)]
    replies = engine.answer(talks, limits)
    assert [len(reply.ids) for reply in replies] == [1, 9, 3, 6, 2]
    same(replies, [engine.answer([t], s)[0] for t, s in zip(talks, limits, strict=True)])


@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_full_context_ends_an_answer(writer: Writer, room: int) -> None:
    prompt = writer(" one").processor(TALK).length
    (reply,) = writer(" one two three four five", context=prompt + room).answer([TALK])
    assert reply.grounded.text == " ".join(["one", "two", "three"][:room])


def test_a_prompt_that_fills_the_context_is_refused_only_beyond_it(writer: Writer) -> None:
    prompt = writer(" one").processor(TALK).length
    (reply,) = writer(" one two", context=prompt).answer([TALK])
    assert reply.error is None and reply.grounded.text == "one"
    (reply,) = writer(" one two", context=prompt - 1).answer([TALK])
    assert isinstance(reply.error, CapacityError)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((" three",), "one two"),
        (("three", "five"), "one two"),
        (("five", "three"), "one two"),
        (("two three",), "one"),
        (("three", "two three"), "one"),  # one token completes both
        ((" one",), ""),
        (("nine",), "one two three four five"),
    ],
)
def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(writer: Writer, stop: tuple[str, ...], text: str) -> None:
    (reply,) = writer(" one two three four five").answer([TALK], Sampling(stop=stop))
    assert reply.grounded.text == text
    assert reply.usage["completion_tokens"] == len(reply.ids) == len(text.split())


def test_what_a_token_holds_before_a_stop_text_stays(writer: Writer) -> None:
    (reply,) = writer(" one two three four").answer([TALK], Sampling(stop=("wo thr",)))
    assert reply.grounded.text == "one t"


def test_one_sampling_or_one_for_each(writer: Writer) -> None:
    with pytest.raises(InputError, match="2 samplings for 1 conversations"):
        writer(" one").answer([TALK], [Sampling(), Sampling()])


# -------------------------------------------------------------------------------------------------------------- stream


def test_a_stop_text_is_never_shown_in_parts(writer: Writer) -> None:
    pieces = list(writer(" one two three four").stream(TALK, Sampling(stop=("two three",))))
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == "one"


def test_what_only_begins_like_a_stop_text_is_shown(writer: Writer) -> None:
    pieces = list(writer(" one two three four").stream(TALK, Sampling(stop=("three five",))))
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == "one two three four"


def test_a_stream_is_its_reply_piece_by_piece(writer: Writer) -> None:
    *pieces, reply = writer(" one two three").stream(TALK)
    assert pieces == ["one", " two", " three"]
    assert isinstance(reply, Reply) and reply.grounded.text == "one two three"


def test_half_a_letter_is_not_shown(writer: Writer) -> None:
    """A letter of four bytes is four tokens here; before the last of them there is nothing to read."""
    *pieces, reply = writer(" one🙂 two").stream(TALK)
    assert pieces == ["one", "🙂", " two"]
    assert isinstance(reply, Reply) and len(reply.ids) == 6


def test_a_letter_that_is_never_finished_is_shown_at_the_end(writer: Writer) -> None:
    *pieces, reply = writer(" one🙂").stream(TALK, Sampling(max_new_tokens=3))
    assert isinstance(reply, Reply)
    assert "".join(map(str, pieces)) == reply.grounded.text != "one"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_the_pieces_of_a_stream_join_to_the_answer(engine: Engine, seed: int, temperature: float) -> None:
    """Random text: broken letters, places, spaces at both ends."""
    talk, sampling = ask("how many?", noise(seed)), Sampling(20, temperature, seed=seed)
    *pieces, reply = engine.stream(talk, sampling)
    assert isinstance(reply, Reply)
    assert "".join(map(str, pieces)) == reply.grounded.text
    same([reply], engine.answer([talk], sampling))


def test_a_stream_that_cannot_be_read_raises(engine: Engine) -> None:
    with pytest.raises(CapacityError, match="for a context of 256"):
        list(engine.stream(ask("circles " * 400, noise(0))))
