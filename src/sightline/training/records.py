"""What a run writes beside its checkpoints: its recipe, its surroundings, a line of metrics per step."""

import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..core.config import load_yaml, save_yaml, to_dict
from ..core.errors import ConfigError, DataError
from ..data.batch import Batch
from . import checkpoints, distributed
from .recipe import Recipe
from .report import Board, rows_of

WORDS = ("start", "template", "added_tokens", "vocabulary", "sources")  # what a run's tokenizer hangs on
# what may change in a stage that has begun: it does not change what is learned
FREE = ("save_every", "feature_store", "eval_data", "eval_every", "eval_samples")


def tell(line: str) -> None:
    """A line for the person at the terminal, away from results; of several processes the first one tells it."""
    if distributed.first():
        print(line, file=sys.stderr, flush=True)


class Metrics:
    """`metrics.jsonl` of a run, one object per line; what is not a number is written as null.

    It is only added to, by the first process. A step that is done again after a kill is there twice, with the same
    loss. A full disk costs the lines that do not fit and never the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.board = folder / "metrics.jsonl", Board(folder)
        self.full = False
        self.looks: list[dict[str, Any]] = []
        if distributed.first():
            self._end_last_line()
            self.looks = [row for row in rows_of(self.path) if "eval" in row]

    def _end_last_line(self) -> None:
        """A kill may have cut the last line short; the next must not be glued to it."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        with self.path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one line."""
        if not distributed.first():
            return
        self.board.write(row)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(_finite(row)) + "\n")
            self.full = False
        except OSError as error:
            if not self.full:
                tell(f"{self.path}: {error.strerror}; training goes on without its metrics")
            self.full = True

    def write_once(self, row: Mapping[str, Any]) -> None:
        """Add one line about `eval`, unless a run that was killed has left the same."""
        if _finite(row) not in self.looks:
            self.write(row)


class PassedOver:
    """Samples that could not be used: the first are told, each is written into `passed-over.txt` of the run.

    DataError once there are more of them than a share of all samples so far, or of the first 1,000.
    """

    FIRST = 1000
    TOLD = 20  # the others are in the file only

    def __init__(self, folder: Path, share: float) -> None:
        self.path, self.share = folder / "passed-over.txt", share
        self.seen = 0
        self.lines: set[str] = set()

    def count(self, micro: Sequence[Batch]) -> None:
        """Take note of all processes' samples of a step, and of those that their batches were made without."""
        names = sum(len(batch.extra["names"]) for batch in micro)
        told = distributed.gathered([names, [line for batch in micro for line in batch.extra["passed"]]])
        self.seen += sum(seen for seen, _ in told)
        new = [line for line in dict.fromkeys(line for _, lines in told for line in lines) if line not in self.lines]
        self.lines.update(new)
        for line in new[: max(0, self.TOLD - len(self.lines) + len(new))]:
            tell(f"passed over {line}")
        if new and distributed.first():
            with suppress(OSError), self.path.open("a") as file:
                file.write("".join(f"{line}\n" for line in new))
        if len(self.lines) > self.share * max(self.seen, self.FIRST):
            raise DataError(
                f"{len(self.lines)} of the first {self.seen} samples cannot be used, more than {self.share:.1%}; "
                f"the last is {new[-1]}; all are in {self.path}"
            )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prepare(recipe: Recipe, folder: Path) -> None:
    """Write a run's recipe and surroundings; a folder whose run began with other settings is refused.

    Stages that have not begun may be changed between two starts, and so may the rhythm of saving; everything while
    none has begun.
    """
    path = folder / "run.yaml"
    begun = [stage.name for stage in recipe.stages if checkpoints.listed(folder / "checkpoints" / stage.name)]
    if path.exists() and not any(checkpoints.listed(each) for each in (folder / "checkpoints").glob("*")):
        before = load_yaml(Recipe, path)
        if any(getattr(before, name) != getattr(recipe, name) for name in WORDS):
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    elif path.exists():
        before = dict(_leaves(_settled(load_yaml(Recipe, path), begun)))
        now = dict(_leaves(_settled(recipe, begun)))
        for key in before | now:
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"{folder}: the run in it began with {key} = {before.get(key)}, now it is {now.get(key)}; "
                    "a run goes on only as it began, choose another folder"
                )
    whole(path, lambda place: save_yaml(recipe, place))
    surroundings = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    whole(folder / "env.json", lambda place: place.write_text(json.dumps(surroundings, indent=1)))


def whole(path: Path, write: Any) -> None:
    """Let `write` make a file or folder under another name and give it its own only then."""
    temporary = path.with_name(f".{path.name}.new")
    write(temporary)
    temporary.replace(path)


def _settled(recipe: Recipe, begun: list[str]) -> dict[str, Any]:
    """What of a recipe has an effect already."""
    data: dict[str, Any] = to_dict(recipe)
    stages = {str(i): stage for i, stage in enumerate(data["stages"]) if stage["name"] in begun}
    used = {source for stage in stages.values() for source in stage["data"]}
    for stage in stages.values():
        for key in FREE:
            del stage[key]
    return {**data, "stages": stages, "sources": {k: v for k, v in data["sources"].items() if k in used}}


def _leaves(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings under its dotted key."""
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield ".".join(path), data
