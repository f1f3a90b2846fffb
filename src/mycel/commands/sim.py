"""`mycel sim`: whole swarms on the simulated internet."""

from __future__ import annotations

import click


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def sim(arguments: tuple[str, ...]) -> None:
    """Run a simulated swarm; `mycel sim --help` says what can be simulated."""
    from mycel.simnet.__main__ import main

    raise SystemExit(main(list(arguments)))
