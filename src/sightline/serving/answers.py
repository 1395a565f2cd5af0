"""Files of questions to files of answers, which a run that was killed goes on with.

A row of questions names a picture (or several) and a question; its row of answers is the same row with `answer`,
`boxes`, `points`, `confidence` and `usage`, or with `error`, and with the `model` that was asked. A field of the
question that has one of these names is kept as `given_` and that name.
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import CapacityError, DataError, SightlineError
from ..core.sequence import Conversation, Image, ask
from ..data.media import open_image
from .sampling import Sampling
from .talker import Answer, Talker

WINDOW = 64  # questions that are answered together and written at once; a kill costs at most these
ADDED = ("answer", "boxes", "points", "confidence", "usage", "error", "model")
GIVEN = {name: f"given_{name}" for name in ADDED}

Row = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """What a run did: rows of the file of questions, those done before, those that got an error now."""

    rows: int
    skipped: int
    errors: int


@dataclass(frozen=True)
class _Question:
    """A line of the file of questions: its row, or what is wrong with the line."""

    row: Row
    problem: str = ""


def answer_file(
    model: Talker,
    questions: Path,
    out: Path,
    sampling: Sampling,
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> Summary:
    """Answer every question of a file; rows that `out` already answers are skipped, a torn last line is redone.

    Answers come in the order of the questions. `progress` is told how many rows of how many are done.
    Raises DataError when `out` answers questions that the file does not ask or holds another model's answers,
    CapacityError while another run writes it.
    """
    asked = read_questions(questions)
    with _opened(out) as file:
        done, whole = _read_answers(file, out, model.label)
        left = _left(asked, Counter(done), out)
        file.truncate(whole)
        skipped, errors = len(asked) - len(left), 0
        progress(skipped, len(asked))
        for start in range(0, len(left), WINDOW):
            window = left[start : start + WINDOW]
            rows = answer_rows(model, window, questions.parent, sampling)
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
            errors += sum("error" in row for row in rows)
            progress(skipped + start + len(window), len(asked))
    return Summary(len(asked), skipped, errors)


def read_questions(path: Path) -> list[_Question]:
    """The rows of a JSONL file, blank lines left out; a line that is no row carries its problem.

    Raises DataError for a file that cannot be read or in which no line is a row.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: {(error.strerror or 'cannot be read').lower()}, expected a file of questions"
        ) from None
    found = [_question(number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
    if found and all(question.problem for question in found):
        raise DataError(f"{path}: no line is a row of questions, expected JSON objects, one a line")
    return found


def _question(number: int, line: bytes) -> _Question:
    try:
        row = json.loads(line)
    except ValueError:
        return _Question({"line": number}, f"line {number} is not JSON")
    if not isinstance(row, dict):
        return _Question({"line": number}, f"line {number} is {type(row).__name__}, expected an object")
    return _Question(row)


def answer_rows(model: Talker, asked: Sequence[_Question], folder: Path, sampling: Sampling) -> list[Row]:
    """One row per question, in order; paths of pictures are relative to `folder`."""
    pictures: dict[str, Image | SightlineError] = {}
    talks: list[tuple[int, Conversation]] = []
    rows: list[Row] = []
    for question in asked:
        rows.append({GIVEN.get(name, name): value for name, value in question.row.items()})
        try:
            if question.problem:
                raise DataError(question.problem)
            talks.append((len(rows) - 1, _conversation(question.row, folder, pictures)))
        except SightlineError as error:
            rows[-1]["error"] = str(error)
        rows[-1]["model"] = model.label
    for (i, _), answer in zip(talks, model.answer([talk for _, talk in talks], sampling), strict=True):
        rows[i] |= _outcome(answer)
    return rows


def _outcome(answer: Answer) -> Row:
    """What an answer adds to its row."""
    if answer.error is not None:
        return {"error": str(answer.error)}
    found = answer.to_dict()
    return {"answer": found["text"], **{name: found[name] for name in ("boxes", "points", "confidence", "usage")}}


def _conversation(row: Row, folder: Path, pictures: dict[str, Image | SightlineError]) -> Conversation:
    """The question of a row about its pictures, each of which is read once per window."""
    question, named = row.get("question"), row.get("image")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"question is {question!r}, expected some words")
    paths = [path for path in (named if isinstance(named, list) else [named]) if isinstance(path, str) and path]
    if not paths or (isinstance(named, list) and len(paths) < len(named)):
        raise DataError(f"image is {named!r}, expected a path or a list of paths")
    return ask(question, *(_picture(path, folder, pictures) for path in paths))


def _picture(path: str, folder: Path, pictures: dict[str, Image | SightlineError]) -> Image:
    if path not in pictures:
        try:
            pictures[path] = open_image(folder / path, path)
        except SightlineError as error:
            pictures[path] = error
    found = pictures[path]
    if isinstance(found, SightlineError):
        raise found
    return found


# ---------------------------------------------------------------------------------------------------------- resuming


@contextmanager
def _opened(out: Path) -> Iterator[BinaryIO]:
    """The file of answers, held for one run."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("a+b")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({(error.strerror or '').lower()})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CapacityError(f"{out}: another run is writing it") from None
        yield file


def _read_answers(file: BinaryIO, out: Path, model: str) -> tuple[list[str], int]:
    """Which questions `model` answered, and how long the file's whole lines are; a kill may have torn what follows."""
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    answered = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        row = _parsed(line)
        if row is None or not ("answer" in row or "error" in row):
            raise DataError(f"{out} line {number}: not a row of answers; choose another file to write")
        if (other := row.get("model")) != model:
            raise DataError(f"{out} line {number}: answered by {other!r}, not {model!r}; choose another file to write")
        answered.append(_identity(_asked(row)))
    if torn := data[whole:]:
        row = _parsed(torn)
        if not torn.startswith(b"{") or (row is not None and not ("answer" in row or "error" in row)):
            raise DataError(f"{out}: does not end as a file of answers; choose another file to write")
    return answered, whole


def _parsed(line: bytes) -> Row | None:
    """A line as a row, or None where it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _asked(row: Row) -> Row:
    """The question that a row of answers was made from."""
    named = {given: name for name, given in GIVEN.items()}
    return {named.get(name, name): value for name, value in row.items() if name not in ADDED}


def _left(asked: Sequence[_Question], done: Counter[str], out: Path) -> list[_Question]:
    """The questions without an answer; the same question asked twice is answered twice."""
    unmatched = done.copy()
    left = []
    for question in asked:
        key = _identity(question.row)
        if unmatched[key]:
            unmatched[key] -= 1
        else:
            left.append(question)
    if foreign := unmatched.total():
        raise DataError(f"{out}: {foreign} of its rows answer what is not asked; choose another file to write")
    return left


def _identity(row: Mapping[str, Any]) -> str:
    """What makes two rows the same question: every field, whatever their order."""
    return json.dumps(row, sort_keys=True)
