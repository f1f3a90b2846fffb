"""How a cost grows with the number of nodes, as a picture: what was measured, and the line through it to a
million.

    python -m mycel.simnet.curves bench/results/dht.json docs

writes one SVG for each figure into docs: dots are measured, the dashed line is the least-squares line against
log2 of the nodes. The pictures read on light and dark pages alike.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 300, 64, 44, 24, 48
SMALLEST, LARGEST = 32, 1_000_000
COLOURS = ("#2e7fb8", "#c98a1b", "#2e9e6b")


@dataclass(frozen=True, slots=True)
class Series:
    """A figure at each size."""

    name: str
    points: Sequence[tuple[int, float]]
    """(nodes, figure)."""
    has_law: bool = True
    """Whether the line through it is drawn."""


def law(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Base and slope of the least-squares line through the figures against log2 of the nodes."""
    logs = [math.log2(nodes) for nodes, _ in points]
    middle, mean = sum(logs) / len(logs), sum(value for _, value in points) / len(points)
    spread = sum((log - middle) ** 2 for log in logs)
    across = sum((log - middle) * (value - mean) for log, (_, value) in zip(logs, points, strict=True))
    slope = across / spread if spread else 0.0
    return mean - slope * middle, slope


def draw(title: str, series: Sequence[Series]) -> str:
    """The SVG of figures against the number of nodes, from some dozens to a million."""
    laws = [law(one.points) for one in series]
    ends = [base + slope * math.log2(LARGEST) for base, slope in laws]
    drawn = [end for one, end in zip(series, ends, strict=True) if one.has_law]
    top = _round_up(max([value for one in series for _, value in one.points] + drawn))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="12" role="img" '
        f'aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="14" fill="#222">{escape(title)}</text>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share * top, top)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end" fill="#555">{share * top:g}</text>')
    for nodes, text in ((100, "100"), (1000, "1 000"), (10_000, "10 000"), (100_000, "100 000")):
        parts.append(_tick(nodes, text))
    parts.append(_tick(LARGEST, "a million"))
    for number, one in enumerate(series):
        parts += _series(one, laws[number], COLOURS[number % len(COLOURS)], (number, top))
    return "\n".join([*parts, "</svg>", ""])


def _series(one: Series, line: tuple[float, float], colour: str, place: tuple[int, float]) -> list[str]:
    (base, slope), (number, top) = line, place
    x, y = LEFT + 10, TOP + 8 + 18 * number
    text = f"{one.name}: {base:.3g} {'-' if slope < 0 else '+'} {abs(slope):.3g} log2 N"
    parts = [
        f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/>',
        f'<text x="{x + 10}" y="{y}" fill="#222">{escape(text if one.has_law else one.name)}</text>',
    ]
    if one.has_law:
        first = one.points[0][0]
        ends = [(nodes, base + slope * math.log2(nodes)) for nodes in (first, LARGEST)]
        (x1, y1), (x2, y2) = [(_x(nodes), _y(value, top)) for nodes, value in ends]
        parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-dasharray="5 4"/>'
        )
    for nodes, value in one.points:
        parts.append(f'<circle cx="{_x(nodes)}" cy="{_y(value, top)}" r="4" fill="{colour}"/>')
    return parts


def _tick(nodes: int, text: str) -> str:
    return f'<text x="{_x(nodes)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#555">{text}</text>'


def _x(nodes: int) -> float:
    share = math.log(nodes / SMALLEST) / math.log(LARGEST / SMALLEST)
    return round(LEFT + share * (WIDTH - LEFT - RIGHT - 20), 1)


def _y(value: float, top: float) -> float:
    return round(HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM), 1)


def _round_up(value: float) -> float:
    """A round number that leaves room for the words above the curves."""
    unit: float = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    return next(unit * times for times in (1.2, 2, 4, 6, 8, 12) if unit * times >= 1.15 * value)


def pictures(result: dict[str, object]) -> dict[str, str]:
    """File names and SVGs of a result of `bench/dht.py`. Raises `KeyError` for one without curves."""
    columns, rows = result["curves_of"], result["curves"]
    assert isinstance(columns, list)
    assert isinstance(rows, list)

    def points(column: str, scale: float = 1.0) -> list[tuple[int, float]]:
        place = columns.index(column)
        return [(int(row[0]), row[place] * scale) for row in rows]

    hops = [Series("mean", points("hops_mean")), Series("99 of 100 reads", points("hops_p99"), has_law=False)]
    asked = [Series("to join and settle", points("questions_per_join"))]
    asked.append(Series("for a read", points("questions_per_read")))
    sizes = [Series("to join and settle", points("bytes_per_join", 1e-3))]
    sizes.append(Series("for a read", points("bytes_per_read", 1e-3)))
    return {
        "scale-hops.svg": draw("Hops of a read: questions one after the other until a peer had it", hops),
        "scale-messages.svg": draw("Questions that a node asks", asked),
        "scale-bytes.svg": draw("Kilobytes that a node sends and receives for its questions", sizes),
    }


def main(arguments: Sequence[str]) -> None:
    """Write the pictures of a result file into a folder."""
    if len(arguments) != 2:
        raise SystemExit("say which result and where to: python -m mycel.simnet.curves RESULT.json FOLDER")
    for name, picture in pictures(json.loads(Path(arguments[0]).read_text())).items():
        (Path(arguments[1]) / name).write_text(picture)


if __name__ == "__main__":
    main(sys.argv[1:])
