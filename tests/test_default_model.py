"""The model that ships in the package: it is there, small, knows its own story, and looks at the picture."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import sightline
from sightline.core.sequence import Conversation
from sightline.evaluation.scenes import Control, evaluate
from sightline.grounding.codecs import Grounded
from sightline.recipes import sightline_mini
from sightline.serving.assistant import Assistant
from sightline.zoo import own
from sightline.zoo.names import locate

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "assets" / "shapes.png"


@pytest.fixture(scope="module")
def model() -> Assistant:
    return sightline.load()


def overall(model: Assistant, control: Control, count: int = 300) -> float:
    """Right answers on scenes of their own, away from those whose scores are told."""

    def answers(talks: Sequence[Conversation]) -> list[Grounded]:
        return [reply.grounded for reply in model.engine.answer(talks)]

    return evaluate(answers, count, control, first=910_000_000).overall


def test_it_is_small_and_whole() -> None:
    folder = locate()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16 << 20
    assert {"config.json", "processor.json", "tokenizer.json", "README.md"} <= {path.name for path in folder.iterdir()}


def test_it_is_what_its_recipe_says() -> None:
    card, recipe = own.read_card(locate()), sightline_mini()
    assert card.model == recipe.model
    assert card.stages == {stage.name: tuple(stage.learn) for stage in recipe.stages}


def test_its_card_tells_the_scores_that_were_measured() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("scenes-*.json"))
    measured = json.loads(results[-1].read_text())["rows"]
    card = (locate() / "README.md").read_text()
    for name in measured["real"]:
        row = " | ".join(f"{measured[control].get(name, 0):.1%}" for control in ("real", "blank", "shuffled", "talk"))
        assert f"| {name} | {row} |" in card


def test_it_answers_later_questions_as_well_as_first_ones(model: Assistant) -> None:
    assert overall(model, "talk") > 0.85


def test_it_looks(model: Assistant) -> None:
    seen, blank = overall(model, "real"), overall(model, "blank")
    assert seen > 0.85
    assert blank < seen - 0.4


def test_it_answers_in_boxes(model: Assistant) -> None:
    answer = model.ask(PICTURE, "Where is the red circle?")
    assert len(answer.boxes) == 1
    assert answer.boxes[0].label == "red circle"


def test_it_needs_no_network_and_no_home(tmp_path: Path) -> None:
    """A first question in a bare environment: no caches, no proxy, nothing but the package."""
    code = (
        "import socket\n"
        "def refuse(*_, **__): raise AssertionError('the network was asked for')\n"
        "socket.socket.connect = refuse\n"
        f"import sightline; print(sightline.load().ask({str(PICTURE)!r}, 'Is there a red circle?').text)"
    )
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("yes", "no")
    assert list(tmp_path.iterdir()) == []
