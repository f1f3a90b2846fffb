"""What the demo looks like in a terminal; plain lines where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from train import Progress as OnStep

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


@contextmanager
def training() -> Iterator[OnStep]:
    """A progress bar with the loss; a line now and then where there is no terminal."""
    columns = (
        TextColumn("  training"),
        BarColumn(48),
        TextColumn("{task.percentage:3.0f} %  {task.fields[loss]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=None, loss="")

        def on_step(done: int, total: int, loss: float) -> None:
            if console.is_terminal:
                progress.update(task, completed=done, total=total, loss=f"loss {loss:.2f}")
            elif done % (total // 10) == 0:
                console.print(f"  training {done * 100 // total} %, loss {loss:.2f}")
            if not console.is_terminal:
                sys.stdout.flush()

        yield on_step


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
