"""A world written to a folder: what is in the files is what the world says, and the seed decides it all."""

import json
import random
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from sightline.core.errors import ConfigError, InputError
from sightline.worlds.render import QUESTIONS, render_scenes, world_named
from sightline.worlds.scene_questions import questions
from sightline.worlds.scenes import scene


def test_files_say_what_the_world_says(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = render_scenes(tmp_path, 4, seed=100, progress=lambda done, count: seen.append((done, count)))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for seed in range(100, 104):
        made, rng = scene(seed), random.Random(seed)
        mine = [row for row in rows if row["seed"] == seed]
        assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / mine[0]["image"])), np.asarray(made.picture()))
        assert {row["caption"] for row in mine} == {made.caption(rng)}
        asked = questions(made, rng, QUESTIONS)
        assert [(row["question"], row["answers"]) for row in mine] == [(each.text, [each.answer]) for each in asked]
        for row, each in zip(mine, asked, strict=True):
            assert [(box["label"], tuple(box["xyxy"])) for box in row.get("boxes", [])] == list(each.boxes)
            assert [(p["label"], tuple(p["xy"])) for p in row.get("points", [])] == list(each.points)
    assert any("boxes" in row for row in rows)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = (render_scenes(tmp_path / name, 2, seed=7) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    for picture in (tmp_path / "a" / "images").iterdir():
        assert picture.read_bytes() == (tmp_path / "b" / "images" / picture.name).read_bytes()


def test_what_makes_no_sense_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="count is 0, expected at least 1"):
        render_scenes(tmp_path, 0)
    with pytest.raises(ConfigError, match="unknown world 'scens'; did you mean 'scenes'"):
        world_named("scens")
