"""A run as a page that stands alone: `report.html` with its curves; and as scalars, where TensorBoard is installed."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from .charts import Points, curves

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:760px;margin:2em auto;padding:0 1em;color:#222;background:#fff}}
table{{border-collapse:collapse;width:100%}}td,th{{padding:.25em .6em;text-align:right;border-bottom:1px solid #ddd}}
td:first-child,th:first-child{{text-align:left}}svg{{max-width:100%;height:auto;margin:.6em 0}}
.bad{{color:#b3261e;font-weight:600}}
@media(prefers-color-scheme:dark){{body{{color:#ddd;background:#1b1b1b}}td,th{{border-color:#333}}.bad{{color:#ff8a80}}}}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that can be read."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a kill may have cut it short
        if isinstance(row, dict) and "stage" in row and "step" in row:
            found.append(row)
    return found


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line of metrics under names such as `align/loss` or `align/guard/real`."""

    def inside(name: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from inside(f"{name}/{key}", item)
        elif isinstance(value, int | float):
            yield name, float(value)

    for key, value in row.items():
        if key not in ("stage", "step"):
            yield from inside(f"{row['stage']}/{key}", value)


class Board:
    """TensorBoard's files in the folder `tensorboard` of a run; without the package nothing is written."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(folder / "tensorboard"))  # type: ignore[no-untyped-call]

    def write(self, row: Mapping[str, Any]) -> None:
        """Add the numbers of a line of metrics."""
        if self.writer is not None:
            for name, value in scalars(row):
                self.writer.add_scalar(name, value, row["step"])  # type: ignore[no-untyped-call]


def report(folder: Path, name: str) -> str:
    """The page of the run in a folder; steps that were done again after a kill are there once."""
    rows = rows_of(folder / "metrics.jsonl")
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    parts = [_overview({stage: [row for row in rows if row["stage"] == stage] for stage in stages})]
    for stage in stages:
        parts.append(f"<h2>{escape(stage)}</h2>")
        parts += _stage([row for row in rows if row["stage"] == stage])
    return PAGE.format(title=escape(name), body="\n".join(part for part in parts if part))


def write_report(folder: Path, name: str) -> Path:
    """Write `report.html` beside the metrics of a run."""
    path, temporary = folder / "report.html", folder / ".report.html.new"
    temporary.write_text(report(folder, name), encoding="utf-8")
    temporary.replace(path)
    return path


def _overview(stages: Mapping[str, list[dict[str, Any]]]) -> str:
    """A table with a line for each stage."""
    lines = ["<table><tr><th>stage</th><th>steps</th><th>first loss</th><th>last loss</th><th>samples a second</th>"]
    for stage, rows in stages.items():
        losses, speeds = _series(rows, "loss"), _series(rows, "samples_per_second")
        if not losses:
            continue
        few = max(1, len(losses) // 20)
        first, last = (sum(y for _, y in part) / few for part in (losses[:few], losses[-few:]))
        speed = sorted(y for _, y in speeds)[len(speeds) // 2] if speeds else 0.0
        cells = (escape(stage), f"{losses[-1][0]:,.0f}", f"{first:.3f}", f"{last:.3f}", f"{speed:,.1f}")
        lines.append("</tr><tr>" + "".join(f"<td>{cell}</td>" for cell in cells))
    return "".join(lines) + "</tr></table>"


def _stage(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The charts of one stage."""
    terms = {name for row in rows for name in row.get("terms", ())}
    lines = {"loss": _series(rows, "loss")}
    if len(terms) > 1:
        lines |= {name: _series(rows, "terms", name) for name in sorted(terms)}
    if evaluated := _series(rows, "eval", "loss"):
        lines["on eval_data"] = evaluated
    yield curves("loss", lines)
    refused = sum(row.get("applied") is False for row in rows)
    if refused:
        yield f'<p class="bad">{refused} steps were not made of numbers and not applied.</p>'
    looks = [row for row in rows if "guard" in row]
    if looks:
        names = {"real": "its picture", "blank": "a blank one", "shuffled": "another's"}
        yield curves("loss on held samples", {said: _series(looks, "guard", key) for key, said in names.items()})
        if not looks[-1]["guard"]["sees"]:
            yield '<p class="bad">At the last look pictures made no clear difference.</p>'
    for scored in [[row for row in rows if "scores" in row]]:
        keys = dict.fromkeys(key for row in scored for key in row["scores"])
        yield curves("scores", {key: _series(scored, "scores", key) for key in keys})
    notes = sorted({name for row in rows for name in row.get("notes", ())})
    for name in notes:
        yield curves(name, {name: _series(rows, "notes", name)})
    yield curves("gradient norm", {"norm": _series(rows, "norm")}, height=200)
    yield curves("tokens a second", {"tokens": _series(rows, "tokens_per_second")}, height=200)


def _series(rows: list[dict[str, Any]], *path: str) -> Points:
    """One number by step; of a step that was done twice the later one, and none where it is not a number."""
    found: dict[float, float] = {}
    for row in rows:
        value: Any = row
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            found[float(row["step"])] = float(value)
    return sorted(found.items())
