"""Sampling: the answers that full passes without a cache would give, each by a chance of its own."""

import copy

import pytest
import torch

from sightline.core.errors import CapacityError
from sightline.data.batch import IGNORE, Batch, collate
from sightline.data.processor import Processor
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM
from sightline.training.answers import answers_of, extended
from sightline.training.chance import drawn, luck
from sightline.training.preferences import preferred
from sightline.training.recipe import Recipe
from sightline.training.rollouts import Rollouts, sample
from sightline.training.run import initial_model, processor_of


@pytest.fixture(scope="module")
def setup(recipe: Recipe, tokenizer: Tokenizer) -> tuple[VLM, Processor]:
    model = initial_model(recipe)
    return model, processor_of(recipe, tokenizer, model)


def prompts(recipe: Recipe, processor: Processor, *index: int) -> Batch:
    return preferred([recipe.sources["pairs"](0, 0, k) for k in index], processor, "prompts")


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.0, 2.0, -50.0, 1.0, -1e4])
    even = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    shares = torch.bincount(drawn(logits.expand(1000, -1), even), minlength=5) / 1000
    assert torch.allclose(shares, logits.softmax(-1), atol=1.1e-3) and shares[4] == 0
    assert torch.equal(luck("a", 5), luck("a", 5)) and not torch.equal(luck("a", 5), luck("b", 5))


def test_a_cache_changes_nothing(recipe: Recipe, setup: tuple[VLM, Processor]) -> None:
    """Token by token with the whole sequence read anew, by the same luck; prompts of different lengths."""
    model, processor = setup
    batch = prompts(recipe, processor, 0, 1, 2)
    end = processor.tokenizer.control("<eos>")
    chance = [f"x {k}" for k in range(6)]
    found = sample(model, batch, 2, 5, end, chance)
    assert len({example.length for example in batch.extra["prompts"]}) > 1
    for k, ids in enumerate(found):
        prompt, own = batch.extra["prompts"][k // 2], luck(chance[k], 5)
        wanted: list[int] = []
        for t in range(5):
            example = extended(prompt, wanted) if wanted else prompt
            single = collate([example], processor.patch, 0)
            with torch.no_grad():
                scores = model.logits(model(single)[0, -1:])
            wanted.append(int(drawn(scores, own[t : t + 1])))
            if wanted[-1] == end:
                break
        assert ids == wanted


def test_an_answer_does_not_hang_on_its_company(recipe: Recipe, setup: tuple[VLM, Processor]) -> None:
    model, processor = setup
    rollouts = Rollouts(processor, 3, 6, rewards=lambda batch: torch.zeros(len(batch.extra["answers"])))
    both = rollouts(model, prompts(recipe, processor, 0, 1), "0 0 0")
    halves = [rollouts(model, prompts(recipe, processor, k), "0 0 0", first=k) for k in (0, 1)]
    assert both.extra["answers"] == [answer for half in halves for answer in half.extra["answers"]]
    again, other = (rollouts(model, prompts(recipe, processor, 0, 1), key) for key in ("0 0 0", "0 0 1"))
    assert again.extra["answers"] == both.extra["answers"] != other.extra["answers"]


def test_what_was_sampled_is_what_is_learned(recipe: Recipe, setup: tuple[VLM, Processor]) -> None:
    model, processor = setup
    batch = prompts(recipe, processor, 0, 1)
    heard: list[Batch] = []

    def rewards(made: Batch) -> torch.Tensor:
        heard.append(made)
        return torch.arange(8)

    made = Rollouts(processor, 4, 6, rewards)(model, batch, "k")
    end = processor.tokenizer.control("<eos>")
    said = sample(model, batch, 4, 6, end, [f"k {k // 4} {k % 4}" for k in range(8)])
    answers = answers_of(made)
    assert [part.tolist() for part in answers.ids.split(answers.lengths.tolist())] == said
    assert made.patches is not None and len(made.patches.grids) == 2  # each picture is seen once for four answers
    assert made.extra["rewards"].tolist() == list(range(8)) and made.extra["rewards"].dtype == torch.float32
    truths = [truth.text for truth in made.extra["truths"]]
    chosen = [recipe.sources["pairs"](0, 0, k).chosen for k in (0, 1)]
    assert truths == [message.text for message in chosen for _ in range(4) if message]
    assert len(heard[0].extra["answers"]) == 8 and made.extra["names"] == batch.extra["names"]
    assert batch.labels is not None and bool((batch.labels == IGNORE).all())


def test_an_answer_ends_where_the_processor_says(recipe: Recipe, setup: tuple[VLM, Processor]) -> None:
    """Some models end an answer with a word, such as a line break, and not with a control token."""
    model, processor = setup
    (word,) = processor.tokenizer.encode("e")
    processor = copy.copy(processor)
    processor.tokenizer = copy.copy(processor.tokenizer)
    processor.tokenizer.eos = "e"
    assert processor.end == word
    made = Rollouts(processor, 30, 40, lambda batch: torch.zeros(30))(model, prompts(recipe, processor, 0), "k")
    answers = answers_of(made)
    said = [part.tolist() for part in answers.ids.split(answers.lengths.tolist())]
    assert any(ids[-1] == word for ids in said) and all(word not in ids[:-1] for ids in said)
    assert made.extra["cut"] == [ids[-1] != word for ids in said]


def test_a_prompt_without_room_is_told(recipe: Recipe, setup: tuple[VLM, Processor]) -> None:
    model, processor = setup
    batch = prompts(recipe, processor, 0)
    long = extended(batch.extra["prompts"][0], [5] * (512 - batch.extra["prompts"][0].length))
    with pytest.raises(CapacityError, match="a prompt of 512 tokens leaves the model no room"):
        sample(model, collate([long], processor.patch, 0), 1, 4, 0, ["x"])
