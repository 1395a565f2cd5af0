"""The page of a run, its scalars for TensorBoard, and the line beside a progress bar."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sightline.training import pace
from sightline.training.pace import Pace, operations
from sightline.training.recipe import Recipe
from sightline.training.records import Metrics
from sightline.training.report import report, scalars
from sightline.training.run import run
from sightline.training.trainer import Step

Alone = Callable[..., Recipe]


class Tags(HTMLParser):
    """Which tags are opened and closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def test_a_run_ends_with_a_page_that_stands_alone(recipe: Recipe, folder: Path, alone: Alone) -> None:
    chosen = alone(recipe, "instruct", guard_every=3)
    steps = list(run(chosen, folder, workers=0, evaluate=lambda model: {"right": 0.5}))
    assert all(step.tokens_per_second > 0 for step in steps)
    page = (folder / "report.html").read_text()
    tags = Tags(page)
    assert tags.open == [] and tags.seen.count("svg") == 5 and "script" not in tags.seen
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    for said in ("<h2>instruct</h2>", "loss on held samples", "another&#x27;s", "scores", "tokens a second", ">6<"):
        assert said in page, said


def test_a_page_that_cannot_be_written_costs_the_page_only(
    recipe: Recipe, folder: Path, alone: Alone, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "report.html").mkdir()
    assert len(list(run(alone(recipe, "language", steps=2), folder, workers=0))) == 2
    assert "report.html.new: Is a directory; the run goes on without its report" in capsys.readouterr().err


def test_steps_done_twice_are_there_once_and_what_is_broken_is_left_out(tmp_path: Path) -> None:
    done = [(1, 4.0), (2, None), (2, 3.0), (3, 2.0)]
    rows = [{"stage": "a<b", "step": k, "loss": loss, "terms": {}, "applied": loss is not None} for k, loss in done]
    lines = [*map(json.dumps, rows), '{"stage": "a", "st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = report(tmp_path, "mine & yours")
    assert "<h1>mine &amp; yours</h1>" in page and "<h2>a&lt;b</h2>" in page
    assert "1 steps were not made of numbers" in page
    (line,) = re.findall(r'points="([^"]*)"', page)
    assert len(line.split()) == 3


def test_every_number_of_a_line_has_a_name() -> None:
    row = {"stage": "s", "step": 3, "loss": 0.5, "terms": {"x": 1}, "guard": {"real": 2.0, "sees": True}, "n": None}
    assert dict(scalars(row)) == {"s/loss": 0.5, "s/terms/x": 1, "s/guard/real": 2, "s/guard/sees": 1}


def test_tensorboard_is_written_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []
    writer = SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar))
    fake = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    Metrics(tmp_path).write({"stage": "s", "step": 3, "loss": 0.5})
    assert written == [("s/loss", 0.5, 3)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Metrics(tmp_path).write({"stage": "s", "step": 4, "loss": 0.5})
    assert len(written) == 1 and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_pace_is_told_beside_the_loss(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    each = operations(recipe, recipe.stages[-1])
    monkeypatch.setattr(pace, "matmul_rate", lambda precision: 20 * each)
    step = Step("instruct", 7, 1.25, samples_per_second=5.0, tokens_per_second=12_345.0)
    assert Pace(recipe).note(step) == "instruct, loss 1.250, 12.3 k tokens/s, 25% of peak"
    larger = replace(recipe, stages=(replace(recipe.stages[-1], learn={"*": 1e-3}),))
    assert operations(larger, larger.stages[0]) > each
