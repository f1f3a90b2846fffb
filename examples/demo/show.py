"""What the demo looks like in a terminal; plain lines where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import plotext
from rich.console import Console
from rich.table import Table
from train import Point

console = Console(highlight=False)


def title(text: str) -> None:
    """A new part of the story."""
    console.print()
    console.rule(f"[bold]{text}", align="left", style="green")


def say(text: str) -> None:
    """A line of the story."""
    console.print(f"  {text}", style="dim", markup=False, soft_wrap=True)


def check(what: str, good: bool, how: str) -> None:
    """A claim, whether it is true, and the figure behind it."""
    mark = "[green]✔[/green]" if good else "[bold red]✘[/bold red]"
    console.print(f"  {mark} {what:<40} [dim]{how}[/dim]", soft_wrap=True)


def fail(text: str) -> None:
    """The demo ends here."""
    console.print(f"\n[bold red]The demo failed:[/bold red] {text}", soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under headings."""
    out = Table(*columns, box=None, padding=(0, 2), header_style="dim")
    for row in rows:
        out.add_row(*row)
    console.print(out)


def border(point: Point, borders: int) -> None:
    """One border of the training; every third one where there is no terminal."""
    if console.is_terminal:
        done = "█" * (40 * point.step // borders)
        console.print(f"  {done:░<40} loss {point.loss:.2f}, {point.peers} peers ", end="\r", style="dim")
    elif point.step % 3 == 0:
        console.print(f"  border {point.step} of {borders}: loss {point.loss:.2f}, {point.peers} peers")
        sys.stdout.flush()


def curve(points: Sequence[Point], marks: Mapping[int, str], path: Path) -> None:
    """The loss over the borders, here and as a PNG at `path`; `marks` say what happened before which."""
    steps, losses = [point.step for point in points], [point.loss for point in points]
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(min(90, console.width), 16)
    plotext.plot(steps, losses, marker="braille")
    heights = [max(losses) * (0.95 - 0.1 * number) for number in range(len(marks))]
    for (step, what), height in zip(marks.items(), heights, strict=True):
        plotext.vline(step, None)
        plotext.text(what, step + len(steps) / 60, height)
    plotext.title("loss, nats a byte")
    print(plotext.build())

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(steps, losses, marker=".", color="seagreen")
    for (step, what), height in zip(marks.items(), heights, strict=True):
        axes.axvline(step, color="firebrick", linestyle=":")
        axes.annotate(what, (step, height), textcoords="offset points", xytext=(4, 0), fontsize=8)
    axes.set_xlabel("border")
    axes.set_ylabel("loss, nats a byte")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Something takes a while."""
    if not console.is_terminal:
        console.print(f"  {text} ...")
        yield
        return
    with console.status(f"  {text}", spinner="dots"):
        yield


class Page:
    """Text as it streams in."""

    def __init__(self) -> None:
        self.is_marked = False
        self._style = "white"

    def add(self, text: str) -> None:
        """The next piece."""
        console.print(text.replace("\n", "\n  "), end="", style=self._style, markup=False, soft_wrap=True)

    def mark(self, text: str) -> None:
        """Something happened here; what follows looks different."""
        self.is_marked = True
        console.print(text, end="", style="bold white on red", markup=False)
        self._style = "green"


@contextmanager
def streaming(prompt: str) -> Iterator[Page]:
    """A page that begins with the prompt."""
    console.print(f"\n  {prompt}", end="", style="bold", markup=False)
    yield Page()
    console.print("\n")
