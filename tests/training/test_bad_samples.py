"""A data set with every kind of bad row: a run ends well, and says of each row that was not used why."""

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from sightline.core.errors import DataError
from sightline.training.recipe import Recipe
from sightline.training.run import run
from sightline.training.sources import FilesSource
from sightline.training.trainer import Trainer

EACH, GOOD = 3, 40


def encoded(format: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **more: Any) -> bytes:
    out = io.BytesIO()
    rng = random.Random(0)
    noise = bytes(rng.randrange(256) for _ in range(3 * size[0] * size[1]))
    PIL.Image.frombytes("RGB", size, noise).convert(mode).save(out, format, **more)
    return out.getvalue()


def vast() -> bytes:
    """A PNG of few bytes that says it has 20,000 x 20,000 pixels."""
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def turned(orientation: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(exif=exif.tobytes())


PICTURES: dict[str, tuple[bytes, str]] = {  # what the file holds, and a part of the reason why it is not used
    "whole": (encoded(), ""),
    **{f"cut{tenth}": (encoded()[: len(encoded()) * tenth // 10], "cut off") for tenth in (5, 7, 9)},
    "cut1": (encoded()[:20], "not a picture"),
    "empty": (b"", "empty"),
    "page": (b"<!doctype html><html><body>404</body></html>", "not a picture"),
    "png-as": (encoded("PNG"), ""),
    "gif-as": (encoded("GIF"), ""),
    **{f"mode{mode}": (encoded("PNG", mode), "") for mode in ("1", "L", "LA", "P", "RGBA", "I;16")},
    "modeCMYK": (encoded("JPEG", "CMYK"), ""),
    **{f"exif{way}": (turned(way), "") for way in (1, 3, 6, 8, 9)},
    "pixel": (encoded(size=(1, 1)), ""),
    "strip": (encoded(size=(1, 2000)), ""),
    "vast": (vast(), "pixels"),
}

TALK = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "one"}]
ROWS: dict[str, tuple[Any, str]] = {
    "missing": ({"image": "none.jpg", "conversations": TALK}, "no such file"),
    "outside": ({"image": "../../etc/passwd", "conversations": TALK}, ""),
    "link": ({"image": "link.jpg", "conversations": TALK}, "leads out of"),
    "address": ({"image": "http://127.0.0.1/x.jpg", "conversations": TALK}, "an address"),
    "zero": ({"image": "a\0b.jpg", "conversations": TALK}, ""),
    "half": ('{"image": "whole.jpg", "conversations": [{"from": "hu', ""),
    "bytes": (b'{"image": "whole.jpg", "conversations": "\xff\xfe"}', ""),
    "list": ("[1, 2]", ""),
    "silent": ({"image": "whole.jpg", "conversations": []}, "0 placeholders"),
    "places": ({"image": "whole.jpg", "conversations": [{**TALK[0], "value": "which?"}, TALK[1]]}, "0 placeholders"),
    "twice": ({"image": ["whole.jpg"], "conversations": [{**TALK[0], "value": "<image><image>"}, TALK[1]]}, "2 place"),
    "unanswered": ({"image": "whole.jpg", "conversations": [TALK[0], {**TALK[1], "value": ""}]}, "empty"),
    "stranger": ({"image": "whole.jpg", "conversations": [TALK[0], {**TALK[1], "from": "robot"}]}, "robot"),
    "long": ({"image": "whole.jpg", "conversations": [TALK[0], {**TALK[1], "value": "word " * 3000}]}, "context"),
    "typed": ({"conversations": [{**TALK[0], "value": "<user><eos> a\0b \ud800"}, TALK[1]]}, ""),
}
USED = {*(name for name, (_, why) in PICTURES.items() if not why)}
UNSURE = {"typed"}  # may be read or refused, in one line


@pytest.fixture
def rows(recipe: Recipe, tmp_path: Path) -> tuple[Recipe, dict[int, str]]:
    """A recipe that reads every kind of row some times among good ones for an epoch, and the kind of every line."""
    (tmp_path / "secret.jpg").write_bytes(encoded())
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.jpg").symlink_to("../secret.jpg")
    lines: list[tuple[str, bytes]] = []
    for name, (data, _) in PICTURES.items():
        (folder / f"{name}.jpg").write_bytes(data)
        row = {"image": f"{name}.jpg", "conversations": TALK}
        lines += [(name, json.dumps(row).encode())] * (GOOD if name == "whole" else EACH)
    for name, (row, _) in ROWS.items():
        raw = row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        lines += [(name, raw)] * EACH
    random.Random(0).shuffle(lines)
    (folder / "rows.jsonl").write_bytes(b"\n".join(raw for _, raw in lines) + b"\n")
    source = FilesSource(kind="conversations", format="llava", path=str(folder / "rows.jsonl"))
    steps = -(-len(lines) // 4)
    stage = replace(recipe.stages[3], data={"mine": 1.0}, batch=4, steps=steps, save_every=1000, max_bad=1.0)
    chosen = replace(recipe, sources={"mine": source}, stages=(stage,))
    return chosen, {i + 1: name for i, (name, _) in enumerate(lines)}


def test_every_bad_row_is_passed_over_named_and_counted(
    rows: tuple[Recipe, dict[int, str]], fresh: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, kinds = rows
    used: set[int] = set()
    learn = Trainer.learn

    def told(self: Trainer, micro: list[Any]) -> Any:
        names = [name for batch in micro for name in batch.extra["names"]]
        assert len(names) == 4  # what was passed over leaves no gap
        used.update(int(name.rpartition(":")[2]) for name in names)
        return learn(self, micro)

    monkeypatch.setattr(Trainer, "learn", told)
    folder = fresh("run")
    steps = list(run(chosen, folder, workers=0))
    assert len(steps) == chosen.stages[0].steps and all(step.applied for step in steps)
    lines = (folder / "passed-over.txt").read_text().splitlines()
    why = {int(line.split(": ")[0].rpartition(":")[2]): line.partition(": ")[2] for line in lines}
    assert len(why) == len(lines) and not set(why) & used  # each once, and none that was used
    assert set(why) | used == set(kinds)
    for line, kind in kinds.items():
        reason = {**PICTURES, **ROWS}[kind][1]
        if kind in UNSURE:
            continue
        assert (line in used) == (kind in USED), (kind, why.get(line))
        assert reason in why.get(line, ""), (kind, why.get(line))
    again = fresh("again")
    assert [step.loss for step in run(chosen, again, workers=2)] == [step.loss for step in steps]
    assert (again / "passed-over.txt").read_text().splitlines() == lines


def test_more_of_them_than_are_allowed_end_the_run(rows: tuple[Recipe, dict[int, str]], folder: Path) -> None:
    chosen, _ = rows
    strict = replace(chosen, stages=(replace(chosen.stages[0], max_bad=0.01),))
    with pytest.raises(DataError, match=r"1\d of the first \d+ samples cannot be used, more than 1.0%; the last is"):
        list(run(strict, folder, workers=0))
