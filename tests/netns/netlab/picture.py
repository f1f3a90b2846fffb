"""The table of kinds as a picture: an SVG that reads on light and dark pages alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

CELL_W, CELL_H, LEFT, TOP = 64, 30, 132, 112
COLOURS = {"direct": "#2e9e6b", "relayed": "#c98a1b", "failed": "#c0392b"}
WORDS = {"direct": "direct", "relayed": "over a relay", "failed": "failed, or less than was possible"}


@dataclass(frozen=True, slots=True)
class Cell:
    """What came of one pair: a key of `COLOURS`, and what to write."""

    fate: str
    text: str


def draw(names: Sequence[str], cells: Mapping[tuple[str, str], Cell], caption: str) -> str:
    """The SVG of a triangular table: every unordered pair of `names` once, whichever way round its key is."""
    width = LEFT + CELL_W * len(names) + 16
    height = TOP + CELL_H * len(names) + 84
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12" role="img" '
        f'aria-label="{escape(caption)}">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for place, name in enumerate(names):
        x, y = LEFT + CELL_W * place + CELL_W / 2, TOP + CELL_H * place + CELL_H / 2
        turn = f'transform="rotate(-40 {x} {TOP - 10})"'
        parts.append(f'<text x="{x}" y="{TOP - 10}" {turn} fill="#222">{escape(name)}</text>')
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end" fill="#222">{escape(name)}</text>')
    for row, one in enumerate(names):
        for column in range(row, len(names)):
            cell = cells.get((one, names[column])) or cells.get((names[column], one))
            if cell is not None:
                parts += _cell(LEFT + CELL_W * column, TOP + CELL_H * row, cell)
    y = TOP + CELL_H * len(names) + 28
    x = LEFT
    for fate, colour in COLOURS.items():
        parts.append(f'<rect x="{x}" y="{y - 11}" width="14" height="14" rx="3" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{y + 1}" fill="#222">{WORDS[fate]}</text>')
        x += 46 + 7 * len(WORDS[fate])
    for number, line in enumerate(caption.split("\n")):
        parts.append(f'<text x="{LEFT}" y="{y + 24 + 16 * number}" fill="#555">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _cell(x: float, y: float, cell: Cell) -> list[str]:
    return [
        f'<rect x="{x + 1.5}" y="{y + 1.5}" width="{CELL_W - 3}" height="{CELL_H - 3}" rx="4" '
        f'fill="{COLOURS[cell.fate]}"/>',
        f'<text x="{x + CELL_W / 2}" y="{y + CELL_H / 2 + 4}" text-anchor="middle" '
        f'fill="#fff">{escape(cell.text)}</text>',
    ]
