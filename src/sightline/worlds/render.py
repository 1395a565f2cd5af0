"""A world's pictures with their questions, answers and places, written as files that anyone can read."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.config import nearest
from ..core.errors import ConfigError, InputError
from .scene_questions import Question, questions
from .scenes import SceneConfig, scene

QUESTIONS = 6  # a picture


def render_scenes(
    folder: Path,
    count: int,
    seed: int = 0,
    config: SceneConfig | None = None,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Path:
    """Write pictures of the seeds from `seed` on into `folder`/images, and `folder`/data.jsonl; return the latter.

    A row is one question: image, question, answers, kind, the picture's caption and seed; where places are asked for,
    also boxes [{label, xyxy}] or points [{label, xy}] in pixels. Rows exist only once all pictures do.
    """
    if count < 1:
        raise InputError(f"count is {count}, expected at least 1")
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows: list[str] = []
    for i in range(count):
        made = scene(seed + i, config or SceneConfig())
        rng = random.Random(seed + i)
        name = f"images/{seed + i:08d}.png"
        made.picture().save(folder / name)
        more = {"caption": made.caption(rng), "seed": seed + i}
        rows += [json.dumps({"image": name, **_row(each), **more}) for each in questions(made, rng, QUESTIONS)]
        progress(i + 1, count)
    path = folder / "data.jsonl"
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return path


def _row(question: Question) -> dict[str, Any]:
    row: dict[str, Any] = {"question": question.text, "answers": [question.answer], "kind": question.kind}
    if question.boxes:
        row["boxes"] = [{"label": label, "xyxy": list(box)} for label, box in question.boxes]
    if question.points:
        row["points"] = [{"label": label, "xy": list(place)} for label, place in question.points]
    return row


WORLDS = {"scenes": render_scenes}


def world_named(name: str) -> Callable[..., Path]:
    """What renders the world of that name; ConfigError tells the nearest one."""
    if name not in WORLDS:
        raise ConfigError(f"unknown world {name!r}{nearest(name, WORLDS)}")
    return WORLDS[name]
