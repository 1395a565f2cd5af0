"""Files of questions to files of answers: exact rows, errors row by row, and nothing lost or doubled by a kill."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

import sightline
from sightline import Assistant, CapacityError, DataError, Sampling
from sightline.serving.answers import WINDOW, Summary, answer_file

SHORT = Sampling(max_new_tokens=4)
RESULT = {"answer", "boxes", "points", "confidence", "usage", "model"}


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Assistant:
    return sightline.load(tiny_folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("red", "blue", "green"):
        PIL.Image.new("RGB", (40, 30), name).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    return tmp_path


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def many(count: int) -> list[dict[str, Any]]:
    """Questions whose pictures come in no order; some are asked twice."""
    rng = random.Random(0)
    names = ("red", "blue", "green")
    return [
        {"image": f"{rng.choice(names)}.png", "question": f"how many? {i // 2}", "id": i // 2} for i in range(count)
    ]


def test_rows_keep_their_fields_and_order(model: Assistant, folder: Path) -> None:
    asked = many(2 * WINDOW + 5)
    out = folder / "out" / "answers.jsonl"
    seen: list[tuple[int, int]] = []
    questions = write(folder / "q.jsonl", asked)
    done = answer_file(model, questions, out, SHORT, lambda done, rows: seen.append((done, rows)))
    assert done == Summary(rows=len(asked), skipped=0, errors=0)
    rows = read(out)
    assert [{k: v for k, v in row.items() if k not in RESULT} for row in rows] == asked
    assert all(set(row) >= RESULT for row in rows)
    assert seen == [(0, len(asked)), (WINDOW, len(asked)), (2 * WINDOW, len(asked)), (len(asked), len(asked))]


def test_answers_are_those_of_ask(model: Assistant, folder: Path) -> None:
    answer_file(model, write(folder / "q.jsonl", many(9)), folder / "a.jsonl", SHORT)
    for row in read(folder / "a.jsonl"):
        alone = model.ask(folder / row["image"], row["question"], max_new_tokens=4).to_dict()
        assert row["answer"] == alone["text"]
        assert row["usage"] == alone["usage"]
        assert row["confidence"] == pytest.approx(alone["confidence"], abs=2e-4)


def test_a_row_that_fails_says_why_and_the_others_are_answered(model: Assistant, folder: Path) -> None:
    good = {"image": "red.png", "question": "how many?"}
    bad: dict[str, Any] = {
        "missing.png: no such file": {"image": "missing.png", "question": "how many?", "id": 7},
        "broken.png: the PNG data is damaged or cut off": {"image": "broken.png", "question": "how many?"},
        "question is ' ', expected some words": {"image": "red.png", "question": " "},
        "question is None, expected some words": {"image": "red.png"},
        "image is None, expected a path or a list of paths": {"question": "how many?"},
        "image is [], expected a path or a list of paths": {"image": [], "question": "how many?"},
        "image is ['red.png', 3], expected a path or a list of paths": {"image": ["red.png", 3], "question": "x"},
        "tokens (16 of images) for a context of 256": {"image": "red.png", "question": "circles " * 400},
        "line 10 is not JSON": '{"image": ',
        "line 11 is list, expected an object": "[1, 2]",
    }
    rows = [good, *bad.values(), good]
    done = answer_file(model, write(folder / "q.jsonl", rows), folder / "a.jsonl", SHORT)
    assert done == Summary(rows=len(rows), skipped=0, errors=len(bad))
    first, *failed, last = read(folder / "a.jsonl")
    assert first == last
    assert "error" not in first
    for row, (message, given) in zip(failed, bad.items(), strict=True):
        assert message in row["error"]
        assert "answer" not in row
        if isinstance(given, dict):
            assert {k: v for k, v in row.items() if k not in ("error", "model")} == given
    again = answer_file(model, folder / "q.jsonl", folder / "a.jsonl", SHORT)
    assert again == Summary(rows=len(rows), skipped=len(rows), errors=0)


def test_the_truth_of_a_row_is_not_overwritten(model: Assistant, folder: Path) -> None:
    row = {"image": "red.png", "question": "where?", "boxes": [[1, 2, 3, 4]], "answer": "truth", "answers": ["a"]}
    out = folder / "a.jsonl"
    answer_file(model, write(folder / "q.jsonl", [row]), out, SHORT)
    found = read(out)[0]
    assert (found["given_boxes"], found["given_answer"], found["answers"]) == ([[1, 2, 3, 4]], "truth", ["a"])
    assert found["answer"] != "truth"
    assert answer_file(model, folder / "q.jsonl", out, SHORT).skipped == 1


def test_several_pictures_in_a_row(model: Assistant, folder: Path) -> None:
    rows = [{"image": ["red.png", "blue.png"], "question": "which?"}, {"image": "red.png", "question": "which?"}]
    answer_file(model, write(folder / "q.jsonl", rows), folder / "a.jsonl", SHORT)
    assert [row["usage"]["image_tokens"] for row in read(folder / "a.jsonl")] == [32, 16]


@pytest.mark.parametrize("torn", [1, 20, 150])
def test_a_torn_last_line_is_done_again(model: Assistant, folder: Path, torn: int) -> None:
    questions, out = write(folder / "q.jsonl", many(12)), folder / "a.jsonl"
    answer_file(model, questions, out, SHORT)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:5]) + lines[5][:torn])
    assert answer_file(model, questions, out, SHORT) == Summary(rows=12, skipped=5, errors=0)
    assert [untimed(row) for row in read(out)] == [untimed(json.loads(line)) for line in lines]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what the size of a batch may move in the last digits."""
    return {k: v for k, v in row.items() if k != "confidence"}


def test_rows_that_were_taken_out_are_answered_again(model: Assistant, folder: Path) -> None:
    questions, out = write(folder / "q.jsonl", many(10)), folder / "a.jsonl"
    answer_file(model, questions, out, SHORT)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2] + lines[5:]))
    assert answer_file(model, questions, out, SHORT) == Summary(rows=10, skipped=7, errors=0)
    assert sorted(row["id"] for row in read(out)) == sorted(row["id"] for row in many(10))


def test_a_file_of_other_answers_is_not_touched(model: Assistant, folder: Path) -> None:
    questions, out = write(folder / "q.jsonl", many(3)), folder / "a.jsonl"
    for rows, message in (
        (
            [{"image": "x.png", "question": "other", "answer": "1", "model": "tiny"}],
            "1 of its rows answer what is not asked",
        ),
        ([{**many(1)[0], "answer": "1", "model": "tiny in int8"}], "answered by 'tiny in int8', not 'tiny'"),
        ([{"image": "x.png", "question": "other"}], "line 1: not a row of answers"),
        (["notes"], "line 1: not a row of answers"),
        (["{", '"pretty": "json"', "}"], "line 1: not a row of answers"),
        (b"my diary, without a line break", "does not end as a file of answers"),
        (b'{"a": "setting"}', "does not end as a file of answers"),
    ):
        before = rows if isinstance(rows, bytes) else write(out, rows).read_bytes()
        out.write_bytes(before)
        with pytest.raises(DataError, match=message):
            answer_file(model, questions, out, SHORT)
        assert out.read_bytes() == before


def test_two_runs_do_not_write_one_file(model: Assistant, folder: Path) -> None:
    out = folder / "a.jsonl"
    with out.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CapacityError, match="another run is writing it"):
            answer_file(model, write(folder / "q.jsonl", many(3)), out, SHORT)


def test_files_that_cannot_be_read_or_written_are_told(model: Assistant, folder: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file or directory, expected a file of questions"):
        answer_file(model, folder / "none.jsonl", folder / "a.jsonl", SHORT)
    with pytest.raises(DataError, match="cannot be written"):
        answer_file(model, write(folder / "q.jsonl", many(1)), folder / "red.png" / "a.jsonl", SHORT)


def test_a_killed_run_goes_on_to_the_same_rows(tiny_folder: Path, folder: Path, model: Assistant) -> None:
    """Killed at whatever moment, again and again, then left to finish: every row once, in order."""
    questions, out = write(folder / "q.jsonl", many(8 * WINDOW)), folder / "a.jsonl"
    command = [sys.executable, "-m", "sightline", "answer", str(questions), "--out", str(out)]
    command += ["--model", str(tiny_folder), "--max-tokens", "4"]
    rng, kills = random.Random(1), 0
    for _ in range(3):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = out.stat().st_size if out.exists() else 0
        while run.poll() is None and (not out.exists() or out.stat().st_size == before):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
            kills += 1
        run.wait()
    assert kills
    answer_file(model, questions, out, SHORT)
    answer_file(model, questions, folder / "whole.jsonl", SHORT)
    assert [untimed(row) for row in read(out)] == [untimed(row) for row in read(folder / "whole.jsonl")]
