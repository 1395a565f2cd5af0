"""Preferences from AI feedback: a model answers prompts several times, a judge scores the answers, pairs are written.

A judge is a function of a whole conversation, its last message the answer, and of what is known of its picture: that of
a reward model (`training.judging.Judge.score`), of a model that is asked for a number, here or behind an API (`rated`),
or anybody's.
"""

import base64
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import DataError, SightlineError
from ..core.sequence import Conversation, Image, Message, Text, images_of
from ..serving.sampling import Sampling
from ..serving.talker import Talker
from ..training.preferences import scored
from ..training.sources import Sample

Judge = Callable[[Conversation, Sequence[str]], float]

RATE = "Rate the answer from 1 (wrong, no help) to 10 (right, helpful) by what is in the picture. Say only the number."


@dataclass(frozen=True)
class Summary:
    """What a run did: pairs that were written, prompts that were done before, prompts that could not be done."""

    pairs: int = 0
    skipped: int = 0
    errors: int = 0


def rated(model: Talker, asks: str = RATE) -> Judge:
    """A judge that shows a model pictures, question and answer and asks for a number; DataError where none comes."""

    def judge(conversation: Conversation, facts: Sequence[str] = ()) -> float:
        told = [f"{message.role}: {message.text}" for message in conversation]
        told += [f"Known of the picture: {'; '.join(facts)}"] if facts else []
        said = model.chat((Message("user", (*images_of(conversation), Text("\n".join((*told, asks))))),)).text
        if (found := re.search(r"-?\d+(\.\d+)?", said)) is None:
            raise DataError(f"{model.name} rates an answer with {said!r:.60}, expected a number")
        return float(found[0])

    return judge


def write_pairs(
    model: Talker,
    samples: Iterable[Sample],
    judge: Judge,
    path: Path,
    answers: int = 4,
    sampling: Sampling = Sampling(temperature=1.0),
    images: Path | None = None,
) -> Summary:
    """Add to a file, in the format `openai-pairs`, every two answers of a model to a prompt that a judge tells apart.

    Of a sample that has an answer the question before it is asked; words of answers are kept, not places. A run that
    was stopped goes on: prompts whose names are in the file are not asked again. images: the folder that the pictures'
    paths begin from; others are written into the row itself.
    """
    done, found = _done(path), Summary()
    with path.open("a", encoding="utf-8") as file:
        for sample in samples:
            if sample.name in done:
                found = replace(found, skipped=found.skipped + 1)
                continue
            try:
                rows = list(_pairs(model, sample, judge, answers, sampling, images))
            except SightlineError:
                found = replace(found, errors=found.errors + 1)
                continue
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            found = replace(found, pairs=found.pairs + len(rows))
    return found


def _pairs(
    model: Talker, sample: Sample, judge: Judge, count: int, sampling: Sampling, images: Path | None
) -> Iterable[dict[str, Any]]:
    talk = sample.conversation
    if not talk or talk[-1].role != "user":
        talk = sample.prompt.conversation
    replies = model.answer([talk] * count, [replace(sampling, seed=sampling.seed + k) for k in range(count)])
    for reply in replies:
        if reply.error is not None:
            raise reply.error
    said = [Message("assistant", (Text(reply.text),)) for reply in replies if reply.text.strip()]
    prompt = [{"role": message.role, "content": _content(message, images)} for message in talk]
    for pair in scored(talk, said, lambda conversation: judge(conversation, sample.facts), sample.name):
        assert pair.chosen is not None and pair.rejected is not None
        yield {
            "name": sample.name,
            "input": {"messages": prompt},
            "preferred_output": [{"role": "assistant", "content": pair.chosen.text}],
            "non_preferred_output": [{"role": "assistant", "content": pair.rejected.text}],
        }


def _content(message: Message, images: Path | None) -> list[dict[str, Any]]:
    """The parts of a message as OpenAI's API has them; DataError for what has no form there."""
    parts: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, Text):
            parts.append({"type": "text", "text": part.text})
        elif isinstance(part, Image):
            parts.append({"type": "image_url", "image_url": {"url": _address(part, images)}})
        else:
            raise DataError(f"a {type(part).__name__.lower()} in a prompt, expected text and pictures")
    return parts


def _address(image: Image, images: Path | None) -> str:
    """A picture's path in a folder, or the picture itself as a data URL."""
    if images is not None and (images / image.source).is_file():
        return image.source
    out = io.BytesIO()
    image.picture.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _done(path: Path) -> set[str]:
    """The names of the prompts in a file, whose last line is taken out where a kill has cut it short."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    return {json.loads(line)["name"] for line in whole.splitlines()}
