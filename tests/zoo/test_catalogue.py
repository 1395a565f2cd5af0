"""The list of models: a file that says what the rows say, read without torch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sightline.zoo import catalogue
from sightline.zoo.catalogue import COLUMNS, counted, listed
from sightline.zoo.describe import count
from sightline.zoo.families import ROWS
from sightline.zoo.pull import pullable
from sightline.zoo.revisions import REVISIONS

ANEW = "the list is not what the rows say; write it anew: make catalogue"
FACTS = ("name", "family", "encoder", "fusion", "llm", "licence", "source", "revision", "proof")


def test_the_list_says_what_the_rows_say() -> None:
    entries = {entry.name: entry for entry in listed()}
    assert list(entries) == [*catalogue.shipped(), *ROWS], ANEW
    for row in ROWS.values():
        entry = entries[row.name]
        assert {fact: getattr(entry, fact) for fact in FACTS} == {fact: getattr(row, fact) for fact in FACTS}, ANEW
        assert row.licence and row.source and row.proof


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llama-4-scout", "qwen2.5-vl-3b-instruct", "chameleon-7b"])
def test_parameters_are_counted(name: str) -> None:
    assert next(entry.parameters for entry in listed() if entry.name == name) == count(ROWS[name].model), ANEW


@pytest.mark.slow
def test_the_list_is_what_is_written_anew() -> None:
    assert listed() == counted(), ANEW


def test_the_list_is_read_in_a_hundred_columns() -> None:
    rows = listed()
    room = max(len(row.name) for row in rows)
    for row in rows:
        lines = row.lines(room)
        assert max(map(len, lines)) <= COLUMNS == 100
        told = " ".join(" ".join(lines).split())
        parts = (row.name, row.family, row.encoder, row.fusion, row.llm, row.licence, row.source, row.proof)
        assert all(" ".join(part.split()) in told for part in parts)
        assert ("; here" in told) == row.here == (row.name == "sightline-mini")


def test_what_is_pinned_is_told_and_what_is_not() -> None:
    for row in listed():
        pinned = f"{row.source} at {row.revision[:12]}" if row.revision else f"{row.source}, not pinned"
        assert row.origin == (pinned if "/" in row.source and " " not in row.source else row.source)
    some = next(row for row in listed() if row.name == "llava-1.5-7b")
    assert some.origin == "llava-hf/llava-1.5-7b-hf at b234b804b114"
    assert replace(some, revision="").origin == "llava-hf/llava-1.5-7b-hf, not pinned"


def test_commits_are_of_repositories_that_rows_come_from() -> None:
    assert set(REVISIONS) <= {row.source for row in ROWS.values() if pullable(row)}
    assert all(len(commit) == 40 and int(commit, 16) for commit in REVISIONS.values())
    assert len(set(REVISIONS.values())) == len(REVISIONS)


def test_models_are_listed_without_torch(tmp_path: Path) -> None:
    code = """
import sys
sys.argv = ["sightline", "models", "--json"]
from sightline.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert not {"torch", "numpy"} & set(sys.modules), "what takes long was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "llava-1.6-34b" in done.stdout
