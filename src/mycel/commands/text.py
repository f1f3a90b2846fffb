"""`mycel generate` and `mycel chat`: ask the swarm from a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mycel.commands.common import client_of, home_option, json_option, print_json, printable
from mycel.node.client import ControlError

F = TypeVar("F", bound=Callable[..., Any])


def _sampling_options(command: F) -> F:
    for option in reversed(
        (
            click.option("-m", "--model", help="A served model. [default: the only one]"),
            click.option("-n", "--max-tokens", type=click.IntRange(1), default=256, show_default=True),
            click.option("-t", "--temperature", type=click.FloatRange(0), default=0.0, show_default=True,
                         help="0 is greedy."),
            click.option("--top-k", type=click.IntRange(0), default=0, help="0: off."),
            click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, show_default=True),
            click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0,
                         show_default=True),
            click.option("--seed", type=int, help="The same seed draws the same text. [default: random]"),
            click.option("--stop", multiple=True, help="End before this text."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.option("-p", "--prompt", help="The text to continue. [default: standard input]")
@_sampling_options
@home_option
@json_option
def generate(prompt: str | None, home: Path | None, as_json: bool, **sampling: Any) -> None:
    """Continue a text. The text streams to standard output, who served it to standard error."""
    if prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("give a text with --prompt, or on standard input")
        prompt = sys.stdin.read()
    ask = {**_ask(home, sampling), "prompt": prompt}
    text, told = _stream(home, ask, quiet=as_json)
    if as_json:
        print_json({"text": text, **told})
        return
    click.echo()
    _print_report(told)


@click.command()
@click.option("--system", help="What the model is told first.")
@_sampling_options
@home_option
def chat(system: str | None, home: Path | None, **sampling: Any) -> None:
    """Talk with a model. An empty line or Ctrl-D ends it."""
    ask = _ask(home, sampling)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = click.prompt(
                click.style("you", fg="green"), prompt_suffix="> ", default="", show_default=False
            )
        except click.Abort:
            break
        if not line.strip():
            break
        messages.append({"role": "user", "content": line})
        text, told = _stream(home, {**ask, "messages": messages}, quiet=False)
        click.echo()
        _print_report(told)
        messages.append({"role": "assistant", "content": text})


def _ask(home: Path | None, sampling: dict[str, Any]) -> dict[str, Any]:
    model = sampling["model"]
    if model is None:
        served = client_of(home).get("status")["models"]
        if len(served) != 1:
            known = ", ".join(served) if served else "none; `mycel models` says what is missing"
            raise click.UsageError(f"name a model with --model (served: {known})")
        model = served[0]
    return {**sampling, "model": model, "stop": list(sampling["stop"])}


def _stream(home: Path | None, ask: dict[str, Any], *, quiet: bool) -> tuple[str, dict[str, Any]]:
    text, told = "", {}
    for event in client_of(home, timeout_s=None).lines("generate", ask):
        if event.get("error"):
            if text and not quiet:
                click.echo()
            raise ControlError(event["error"])
        piece = event.get("text", "")
        text += piece
        if piece and not quiet:
            click.echo(piece, nl=False)
            sys.stdout.flush()
        if "report" in event:
            told = {"report": event["report"], "labels": event.get("labels", {})}
    return text, told


def _print_report(told: dict[str, Any]) -> None:
    report = told.get("report")
    if report is None:
        return
    labels = told["labels"]

    def name(peer: str) -> str:
        return str(labels.get(peer, peer[-6:]))

    def route(stages: list[dict[str, Any]]) -> str:
        return " → ".join(f"{name(one['peer'])} {one['span'][0]}:{one['span'][1]}" for one in stages)

    speed = f"{report['tokens_per_s']:.1f} tokens/s, the first after {report['first_token_s']:.2f} s"
    _say(f"{report['tokens']} tokens, {speed}")
    _say(f"served by {route(report['route'])}")
    for failover in report["failovers"]:
        lost = ", ".join(name(peer) for peer in failover["lost"]) or "a link"
        _say(f"at token {failover['position']} {lost} was lost: {failover['why']}")
        _say(f"went on {failover['stall_s']:.2f} s later over {route(failover['route'])}")


def _say(text: str) -> None:
    click.echo(click.style(printable(text), dim=True), err=True)
