"""BLIP-2 and InstructBLIP from folders: they answer, learn from answers, and one question never changes another's."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from blip_folders import KINDS, QUERIES, blip_folder

import sightline
from sightline.core.errors import CheckpointError, InputError
from sightline.core.sequence import Conversation, Image, Message, Text, ask
from sightline.data.batch import IGNORE, Example, collate
from sightline.language.tokenizer import Tokenizer
from sightline.serving.assistant import Assistant
from sightline.serving.sampling import Sampling
from sightline.zoo.describe import describe
from sightline.zoo.families import ROWS

QUESTIONS = ["how many red circles are there?", "What is in the picture?", "how many?", "a blue square"]
ALL = pytest.mark.parametrize("kind", KINDS)
SHORT = Sampling(max_new_tokens=8)


def noise(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("blip")
    return {kind: blip_folder(root / kind.replace(" ", "-"), kind) for kind in KINDS}


@pytest.fixture
def model(folders: dict[str, Path], kind: str) -> Assistant:
    return sightline.load(folders[kind])


@ALL
def test_it_answers(model: Assistant, kind: str) -> None:
    answer = model.ask(noise(0), QUESTIONS[0], max_new_tokens=8)
    assert answer.usage["image_tokens"] == QUERIES
    assert 0 < answer.usage["completion_tokens"] <= 8
    assert answer.usage["prompt_tokens"] > QUERIES + 5
    other = model.ask(noise(1), QUESTIONS[0], max_new_tokens=8)
    assert (other.text, other.confidence) != (answer.text, answer.confidence)  # the picture is seen
    assert "".join(model.stream(noise(0), QUESTIONS[0], max_new_tokens=8)).strip() == answer.text


@ALL
def test_questions_about_one_picture_are_answered_as_one_by_one(model: Assistant, kind: str) -> None:
    """Also beside a question about nothing and one about two pictures."""
    talks = [ask(question, Image(noise(0))) for question in QUESTIONS]
    talks += [ask(QUESTIONS[0]), ask(QUESTIONS[1], Image(noise(0)), Image(noise(1)))]
    together = model.engine.answer(talks, SHORT)
    for talk, reply in zip(talks, together, strict=True):
        (alone,) = model.engine.answer([talk], SHORT)
        assert reply.error is None and reply.ids == alone.ids
        assert reply.confidence == pytest.approx(alone.confidence, abs=1e-5)
    assert len({(reply.ids, round(reply.confidence, 6)) for reply in together}) == len(talks)


@pytest.mark.parametrize("kind", ["instructblip llama", "instructblip t5"])
def test_the_question_changes_what_is_seen(model: Assistant, kind: str) -> None:
    """Each picture comes with the words of its own question, shorter ones filled up."""
    examples = [model.engine.processor(ask(question, Image(noise(0)))) for question in QUESTIONS[:2]]
    batch = collate(examples, 7, 0)
    read = batch.source or batch
    assert read.instruction is not None and len(read.instruction) == 2
    assert read.patches is not None
    tokens = model.published.model.see(read.patches, read.instruction).tokens.unflatten(0, (2, QUERIES))
    assert bool(((tokens[0] - tokens[1]).abs() > 1e-3).any())


def learned(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([i for i in example.labels.tolist() if i != IGNORE], skip_control=False)


@ALL
def test_an_answer_is_learned_where_it_is_written(model: Assistant, kind: str) -> None:
    processor = model.engine.processor
    example, prompt = (processor(ask(QUESTIONS[2], Image(noise(0)), answer=answer)) for answer in ("two", None))
    said = processor.tokenizer.decode(example.read.ids.tolist(), skip_control=False).removeprefix("<image>" * QUERIES)
    assert example.read.slots.tolist() == list(range(QUERIES)) and len(example.read.pixels) == 1
    wanted = {
        "blip-2 opt": ("</s>Question: how many? Answer: two\n", " two\n"),
        "blip-2 t5": ("Question: how many? Answer:</s>", "two</s>"),
        "instructblip llama": ("</s>how many?two</s>", "two</s>"),
        "instructblip t5": ("how many?</s>", "two</s>"),
    }
    assert (said, learned(example, processor.tokenizer)) == wanted[kind]
    if kind.endswith("t5"):  # from the start token on, and what is read is the same with and without an answer
        assert example.ids.tolist() == [0, *processor.tokenizer.encode("two"), 1]
        assert example.labels.tolist() == [*example.ids[1:].tolist(), IGNORE]
        assert prompt.ids.tolist() == [0] and prompt.read.ids.tolist() == example.read.ids.tolist()
        assert (example.read.labels == IGNORE).all() and example.pixels == ()
    else:
        assert example.source is None and prompt.ids.tolist() == example.ids[: prompt.length].tolist()


@pytest.mark.parametrize("kind", ["blip-2 opt", "blip-2 t5"])
def test_turns_of_blip_2(model: Assistant, kind: str) -> None:
    first = ask("how many?", Image(noise(0)), answer="two")
    talk: Conversation = (*first, Message("user", (Text("red?"),)))
    read = model.engine.processor(talk).read
    text = model.engine.processor.tokenizer.decode(read.ids.tolist())
    assert text == "Question: how many? Answer: two. Question: red? Answer:"


@pytest.mark.parametrize("kind", ["instructblip llama", "instructblip t5"])
def test_what_an_instructblip_does_not_read_is_told(model: Assistant, kind: str, tmp_path: Path) -> None:
    talk = (*ask("how many?", answer="two"), Message("user", (Text("red?"),)))
    with pytest.raises(InputError, match="answers one question, the conversation has 3 messages"):
        model.chat(talk)
    long, short = model.engine.answer([ask("red " * 50, Image(noise(0))), ask("red?", Image(noise(0)))], SHORT)
    assert "a question of 52 tokens, what reads it with the picture takes 40" in str(long.error)
    assert short.error is None
    folder = tmp_path / "without"
    shutil.copytree(model.published.folder, folder)
    shutil.rmtree(folder / "qformer_tokenizer")
    with pytest.raises(CheckpointError, match=r"qformer_tokenizer/tokenizer\.json: cannot be read"):
        sightline.load(folder)


def test_a_line_break_ends_what_opt_writes(folders: dict[str, Path]) -> None:
    engine = sightline.load(folders["blip-2 opt"]).engine
    assert engine.processor.tokenizer.encode("\n") == [engine.end]
    assert sightline.load(folders["blip-2 t5"]).engine.end == 1


@pytest.mark.parametrize(("size", "billions"), [("xl", 2.85), ("xxl", 11.1)])
@pytest.mark.parametrize("family", ["blip2", "instructblip"])
def test_sizes_with_flan_t5(family: str, size: str, billions: float) -> None:
    """The language model is as large as the published one, the rest is that of the other rows."""
    row, other = (
        ROWS[f"{family}-flan-t5-{size}"],
        ROWS["blip2-opt-2.7b" if family == "blip2" else "instructblip-vicuna-7b"],
    )
    assert row.source == f"Salesforce/{row.name}"
    told, beside = (describe(each.name, each.model).parameters for each in (row, other))
    assert told["decoder"] / 1e9 == pytest.approx(billions, rel=0.005)
    assert told["encoder"] == beside["encoder"]
    wide = row.model.decoder.width - other.model.decoder.width  # of the last map, which has a bias
    assert told["fusion"] - beside["fusion"] == 769 * wide
