"""Plots as SVG that stand alone: no scripts, nothing from elsewhere, readable on light and dark pages."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

COLORS = ("#2a78d6", "#d9711c", "#2f9e5b", "#8a5cc7", "#c2417a", "#6b7280")
STYLE = """<style>text{font:12px system-ui,sans-serif;fill:#333}.title{font-size:14px;font-weight:600}.grid{stroke:#ddd}
.axis{stroke:#999}.page{fill:#fff}@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#333}.axis{stroke:#777}
.page{fill:#1b1b1b}}</style>"""
LEFT, RIGHT, TOP, BOTTOM = 64, 32, 34, 40  # room around the plot, in pixels
LETTER, LINE = 7.0, 18  # a letter's width, at most and on average, and a line of names
MOST = 600  # points of a line; of more, neighbours are averaged
SMOOTH = 60  # points from which on a line that is alone is drawn with its mean over neighbours

Points = Sequence[tuple[float, float]]


def curves(title: str, lines: Mapping[str, Points], across: str = "step", width: int = 720, height: int = 300) -> str:
    """Lines over one pair of axes, named in a legend where there are several; what is not a number leaves a gap."""
    lines = {name: thinned([p for p in points if all(map(math.isfinite, p))]) for name, points in lines.items()}
    every = [point for points in lines.values() for point in points]
    if not every:
        return ""
    span = min(x for x, _ in every), max(x for x, _ in every)
    columns = ticks(*span)
    if span[0] < span[1]:  # along the way no room is left that nothing is drawn in
        columns = [value for value in columns if span[0] <= value <= span[1]]
    else:
        span = columns[0], columns[-1]
    rows = ticks(min(y for _, y in every), max(y for _, y in every))
    if len(lines) == 1 and len(every) >= SMOOTH:
        (name,) = lines
        lines = {"each": lines[name], f"mean of {len(every) // 20}": smoothed(lines[name], len(every) // 20)}
    names, high = _legend(list(lines) if len(lines) > 1 else [], LEFT, width - RIGHT)
    height += high
    x = _scale(span, (LEFT, width - RIGHT))
    y = _scale((rows[0], rows[-1]), (height - BOTTOM, TOP + high))
    parts = [
        _text(LEFT, 20, title, "title"),
        *names,
        _text((LEFT + width - RIGHT) / 2, height - 6, across, anchor="middle"),
    ]
    for value in rows:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(_text(LEFT - 8, y(value) + 4, _number(value), anchor="end"))
    for value in columns:
        parts.append(_text(x(value), height - BOTTOM + 18, _number(value), anchor="middle"))
    base = height - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{base}" y2="{base}"/>')
    for i, points in enumerate(lines.values()):
        way = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{way}" fill="none" {_stroke(i)}/>')
    return _svg(parts, width, height, title)


Interval = tuple[float, float, float]  # the middle and both ends


def intervals(title: str, rows: Mapping[str, Sequence[Interval | None]], names: Sequence[str], width: int = 720) -> str:
    """Shares from 0 to 1 as points with their intervals: a row for each thing, in it a point for each of `names`."""
    left, each = 140, 20 * len(names) + 12
    known, high = _legend(names, 16, width - 16)
    begin = TOP + high
    height = begin + 12 + each * len(rows) + BOTTOM
    x = _scale((0, 1), (left, width - 64))
    parts = [_text(16, 20, title, "title"), *known]
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{x(value)}" x2="{x(value)}" y1="{begin + 8}" y2="{height - BOTTOM}"/>')
        parts.append(_text(x(value), height - BOTTOM + 18, f"{value:.0%}", anchor="middle"))
    for i, (label, found) in enumerate(rows.items()):
        top = begin + 12 + i * each
        parts.append(_text(left - 12, top + each / 2 + 4, label, anchor="end"))
        for j, interval in enumerate(found):
            if interval is None:
                continue
            middle, low, high = interval
            y = top + 16 + 20 * j
            line = f'x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}"'
            parts.append(f"<line {line} {_stroke(j)}/>")
            parts.append(f'<circle cx="{x(middle):.1f}" cy="{y}" r="5" fill="{_color(j)}"/>')
            parts.append(_text(x(high) + 10, y + 4, f"{middle:.1%}"))
    return _svg(parts, width, height, title)


def thinned(points: Points) -> Points:
    """At most `MOST` points, each the mean of its neighbours."""
    size = -(-len(points) // MOST) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smoothed(points: Points, count: int) -> Points:
    """Each point as the mean of so many up to it, of fewer at the beginning."""
    parts = [points[max(0, i + 1 - count) : i + 1] for i in range(len(points))]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers around a span, about so many."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    return [step * k for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _scale(span: tuple[float, float], room: tuple[float, float]) -> Callable[[float], float]:
    return lambda value: room[0] + (value - span[0]) / (span[1] - span[0]) * (room[1] - room[0])


def _number(value: float) -> str:
    if abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) < 1e6 else f"{value / 1e6:.4g} M"


def _text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _stroke(i: int) -> str:
    """How line i is drawn; where all colours are taken, in dashes."""
    dashes = i // len(COLORS)
    style = f' stroke-dasharray="{8 / dashes:g} 4"' if dashes else ""
    return f'stroke="{_color(i)}" stroke-width="2"{style}'


def _legend(names: Sequence[str], left: float, right: float) -> tuple[list[str], int]:
    """Names below the title, each after a piece of its line, in as many lines as they need; and how high these are."""
    parts, at, line = [], left, 0
    for i, name in enumerate(names):
        wide = 24 + LETTER * len(name)
        if at > left and at + wide > right:
            at, line = left, line + 1
        y = TOP + 6 + LINE * line
        parts.append(f'<line x1="{at:.1f}" x2="{at + 18:.1f}" y1="{y - 4}" y2="{y - 4}" {_stroke(i)}/>')
        parts.append(_text(at + 24, y, name))
        at += wide + 20
    return parts, LINE * (line + 1) if names else 0


def _svg(parts: Sequence[str], width: int, height: int, title: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    page = f'<rect class="page" width="{width}" height="{height}"/>'
    return f'{head} role="img" aria-label="{escape(title)}">{STYLE}{page}{"".join(parts)}</svg>\n'
