"""Answers in batches: where they are, how likely they are, and that branches are as good as rows of their own."""

from dataclasses import replace

import PIL.Image
import pytest
import torch

from sightline.core.errors import CapacityError
from sightline.core.sequence import Conversation, Image, Message, Text, ask
from sightline.data.batch import COLUMNS, IGNORE, Batch, Example, collate
from sightline.data.processor import Processor
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM
from sightline.training.answers import Answers, alternatives, answers_of, extended, log_probabilities, written
from sightline.training.recipe import Recipe
from sightline.training.run import initial_model, processor_of

ANSWERS = [Message("assistant", (Text(text),)) for text in ("red circles", "no", "two large blue squares")]


@pytest.fixture(scope="module", params=["causal", "prefix"])
def setup(request: pytest.FixtureRequest, recipe: Recipe, tokenizer: Tokenizer) -> tuple[VLM, Processor]:
    chosen = replace(recipe, model=replace(recipe.model, look=request.param))
    model = initial_model(chosen)
    return model, processor_of(chosen, tokenizer, model)


def prompt(color: tuple[int, int, int] = (200, 40, 90)) -> Conversation:
    return ask("what is there?", Image(PIL.Image.new("RGB", (32, 32), color)))


def batch_of(examples: list[Example], processor: Processor) -> Batch:
    return collate(examples, processor.patch, processor.tokenizer.control("<pad>"))


def test_answers_are_the_runs_of_what_is_learned() -> None:
    x = IGNORE
    labels = torch.tensor([[x, 5, 6, x, 7, x, x], [8, 9, 4, x, x, x, x], [x, x, x, x, x, x, x], [x, x, x, 3, x, 2, x]])
    found = answers_of(Batch(torch.zeros_like(labels), None, labels, labels=labels))  # type: ignore[arg-type]
    assert found.places.tolist() == [1, 2, 4, 7, 8, 9, 24, 26]
    assert found.ids.tolist() == [5, 6, 7, 8, 9, 4, 3, 2]
    assert found.which.tolist() == [0, 0, 1, 2, 2, 2, 3, 4] and found.count == 5
    assert found.lengths.tolist() == [2, 1, 3, 1, 1] and found.ends.tolist() == [3, 5, 10, 25, 27]
    values = torch.arange(8.0)
    assert found.sums(values).tolist() == [1, 2, 12, 6, 7]
    rows = found.rows(values)
    assert rows.tolist() == [[0, 1, 0], [2, 0, 0], [3, 4, 5], [6, 0, 0], [7, 0, 0]]
    assert torch.equal(found.flat(rows), values)


def test_log_probabilities_are_those_of_all_logits(setup: tuple[VLM, Processor]) -> None:
    model, processor = setup
    batch = batch_of(alternatives(prompt(), ANSWERS, processor), processor)
    answers = answers_of(batch)
    every = model.logits(model(batch)).flatten(0, 1).log_softmax(-1)
    wanted = every[answers.places, answers.ids]
    torch.testing.assert_close(log_probabilities(model, batch, answers), wanted, rtol=1e-5, atol=1e-5)
    hidden = model(batch, rows=answers.places)
    torch.testing.assert_close(written(model, hidden, answers.ids, chunk=2), wanted, rtol=1e-5, atol=1e-5)


def test_answers_side_by_side_are_as_likely_as_each_alone(setup: tuple[VLM, Processor]) -> None:
    model, processor = setup
    examples = alternatives(prompt(), ANSWERS, processor)
    batch = batch_of([*examples, *alternatives(prompt((9, 9, 9)), ANSWERS[:2], processor)], processor)
    answers = answers_of(batch)
    likely = answers.sums(log_probabilities(model, batch, answers))
    alone = []
    for color, said in [((200, 40, 90), ANSWERS), ((9, 9, 9), ANSWERS[:2])]:
        for answer in said:
            single = batch_of([processor((*prompt(color), answer))], processor)
            alone.append(log_probabilities(model, single, answers_of(single)).sum())
    torch.testing.assert_close(likely, torch.stack(alone), rtol=1e-5, atol=1e-4)
    assert batch.patches is not None
    seen = 2 if processor.look == "causal" else 5  # where nothing can branch, each answer has its own picture
    assert len(batch.patches.grids) == seen
    assert not torch.allclose(likely[:2], likely[3:])  # the picture has a say


def test_only_the_last_answer_is_learned(setup: tuple[VLM, Processor]) -> None:
    _, processor = setup
    talk = (
        *ask("what color is it?", Image(PIL.Image.new("RGB", (32, 32))), answer="blue"),
        *ask("how many are there?"),
    )
    batch = batch_of(alternatives(talk, ANSWERS[:2], processor), processor)
    answers = answers_of(batch)
    said = [processor.tokenizer.decode(part.tolist()) for part in answers.ids.split(answers.lengths.tolist())]
    assert said == [" red circles", " no"]
    short = replace_length(processor, processor((*talk, ANSWERS[0])).length - 1)
    with pytest.raises(CapacityError, match="a prompt and its answer are longer than the context"):
        alternatives(talk, ANSWERS[:1], short)


def replace_length(processor: Processor, most: int) -> Processor:
    p = processor
    return Processor(p.tokenizer, p.template, p.pixels, p.num_tokens, p.patch, "<image>", p.codec, p.look, most)


def test_a_prompt_goes_on_as_the_processor_would_write_it(setup: tuple[VLM, Processor]) -> None:
    _, processor = setup
    for answer in ANSWERS:
        wanted = processor((*prompt(), answer))
        begun = processor(prompt())
        found = extended(begun, wanted.ids[begun.length :].tolist())
        for name in ("ids", *COLUMNS):
            if name != "block":
                assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        steps = (wanted.block.diff().sign(), found.block.diff().sign())  # the same tokens see the same others
        assert torch.equal(*steps)


def test_no_answers_are_no_trouble() -> None:
    labels = torch.full((2, 3), IGNORE)
    found = answers_of(Batch(labels, None, labels, labels=labels))  # type: ignore[arg-type]
    assert (found.count, found.ids.tolist(), found.sums(torch.zeros(0)).tolist()) == (0, [], [])
    assert isinstance(found, Answers)
