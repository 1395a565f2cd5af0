"""Pairs of answers of which one is the better: RLHF-V's, VLFeedback's, LLaVA-RLHF's and OpenAI's rows."""

import json
from itertools import combinations
from typing import Any

import numpy as np

from ...core.errors import DataError
from ...core.sequence import Conversation, Message, Text
from .base import Files, Record, checked, dialogue, take, text
from .conversations import Llava, OpenAI, RowReader

ASPECTS = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")


class RlhfV(RowReader):
    """RLHF-V (arXiv:2312.00849): `question`, `chosen` and `rejected` in a row, or as JSON in its `text`."""

    def read(self, index: int) -> Record:
        row = self.rows[index]
        said = row
        if isinstance(row.get("text"), str):
            try:
                said = checked(json.loads(row["text"]), dict, "'text'")
            except (ValueError, RecursionError):
                raise DataError("'text' is not JSON") from None
        question = text(said.get("question", said.get("prompt")), "the question")
        return self.pair(row, question, said.get("chosen"), said.get("rejected"))

    def pair(self, row: dict[str, Any], question: str, chosen: Any, rejected: Any) -> Record:
        """A question about a row's picture, and both answers."""
        parts = (self.picture(row.get("image", row.get("img_path"))), self.question(question))
        better, worse = text(chosen, "the chosen answer"), text(rejected, "the rejected answer")
        return paired((Message("user", parts),), better, worse)


class VLFeedback(RlhfV):
    """VLFeedback (arXiv:2312.10665): every two answers to a prompt whose mean ratings differ.

    `completions` is a list of answers with their annotations, or an object of lists, as parquet files give them. A row
    of which no two answers can be told apart is passed by.
    """

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        found = [(i, *pair) for i in range(len(self.rows)) for pair in self._pairs(i)]
        self.pairs = np.array(found, dtype=np.int64).reshape(-1, 3)

    def _pairs(self, row: int) -> list[tuple[int, int]]:
        """(better, worse) of a row's answers; one that is refused when it is read, for a row that is damaged."""
        try:
            ratings = [rating(answer) for answer in answers(self.rows[row])]
        except DataError:
            return [(-1, -1)]
        both = [(a, b) for a, b in combinations(range(len(ratings)), 2) if None not in (ratings[a], ratings[b])]
        return [(a, b) if ratings[a] > ratings[b] else (b, a) for a, b in both if ratings[a] != ratings[b]]  # type: ignore[operator]

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        row, better, worse = self.pairs[index].tolist()
        return f"{self.rows.name(row)} answers {better}, {worse}"

    def read(self, index: int) -> Record:
        number, better, worse = self.pairs[index].tolist()
        row = self.rows[number]
        found = answers(row)
        if better < 0:
            [rating(answer) for answer in found]  # says what is wrong with them
        question = text(take(row, "prompt", str), "the prompt")
        return self.pair(row, question, found[better].get("response"), found[worse].get("response"))


def answers(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's answers, however they are laid out."""
    found = row.get("completions")
    if isinstance(found, dict):
        said, about = take(found, "response", list), take(found, "annotations", list)
        if len(said) != len(about):
            raise DataError(f"{len(said)} answers with {len(about)} annotations")
        return [{"response": a, "annotations": b} for a, b in zip(said, about, strict=True)]
    return [checked(each, dict, "an answer") for each in checked(found, list, "'completions'")]


def rating(answer: dict[str, Any]) -> float | None:
    """The mean of an answer's ratings from 1 to 5 over the aspects; None where one is missing."""
    about = checked(answer.get("annotations"), dict, "'annotations'")
    said = [str(about[name].get("Rating")) if isinstance(about.get(name), dict) else "" for name in ASPECTS]
    if any(each not in ("1", "2", "3", "4", "5") for each in said):
        return None
    return sum(map(int, said)) / len(said)


class LlavaPairs(Llava):
    """LLaVA-RLHF's rows (arXiv:2309.14525): LLaVA's `conversations`, whose last answer is `output_1` or `output_2`.

    `preference` says which of both is the better one, 1 or 2.
    """

    def read(self, index: int) -> Record:
        row = self.rows[index]
        said = [text(take(take(row, name, dict), "value", str), name) for name in ("output_1", "output_2")]
        if not isinstance(better := row.get("preference"), int) or better not in (1, 2):
            raise DataError(f"'preference' is {better!r:.40}, expected 1 or 2")
        return paired(super().read(index).conversation[:-1], said[better - 1], said[2 - better])


class OpenAIPairs(OpenAI):
    """Rows as OpenAI's preference tuning takes them: `messages` of an `input`, a preferred and another output."""

    def read(self, index: int) -> Record:
        row = self.rows[index]
        outputs = [self.messages(take(row, name, list)) for name in ("preferred_output", "non_preferred_output")]
        if any(len(said) != 1 or said[0].role != "assistant" for said in outputs):
            raise DataError("an output is more or less than one answer")
        prompt = self.messages(take(take(row, "input", dict), "messages", list))
        better, worse = (text(said[0].text, "an output") for said in outputs)
        return paired(dialogue([*prompt, *outputs[0]])[:-1], better, worse)


def paired(prompt: Conversation, chosen: str, rejected: str) -> Record:
    """A conversation that ends with a question, and both answers to it."""
    if chosen == rejected:
        raise DataError("both answers are the same")
    return Record(prompt, *(Message("assistant", (Text(said),)) for said in (chosen, rejected)))
