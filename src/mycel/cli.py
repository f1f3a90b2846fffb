"""The command line, `mycel`: the one place that may import every room.

Commands are loaded when they are called, so that `mycel status` is quick. Failures that Mycel raises on
purpose are one line that says what to do next; exit codes are 2 for a wrong command line or setting, 1 for
everything else that went wrong, 130 for an interruption.
"""

from __future__ import annotations

import importlib
import sys

import click

from mycel import __version__
from mycel.protocol.errors import MycelError, UsageProblem, single_failure

COMMANDS = {
    "up": "mycel.commands.run:up",
    "join": "mycel.commands.run:join",
    "down": "mycel.commands.swarm:down",
    "ticket": "mycel.commands.swarm:ticket",
    "status": "mycel.commands.swarm:status",
    "peers": "mycel.commands.swarm:peers",
    "serve": "mycel.commands.models:serve",
    "models": "mycel.commands.models:models",
    "generate": "mycel.commands.text:generate",
    "chat": "mycel.commands.text:chat",
    "submit": "mycel.commands.jobs:submit",
    "jobs": "mycel.commands.jobs:jobs",
    "logs": "mycel.commands.jobs:logs",
    "stop": "mycel.commands.jobs:stop",
    "pull": "mycel.commands.jobs:pull",
    "config": "mycel.commands.config:config",
    "sim": "mycel.commands.sim:sim",
}


class Commands(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a first acquaintance."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mycel")
def cli() -> None:
    """Mycel: run language models over peers that come and go.

    \b
    mycel up --serve MODEL       be a node, lend layers of a model
    mycel ticket                 print what lets another machine in
    mycel join TICKET            there: be a node of this swarm
    mycel generate -m MODEL ...  ask the swarm
    mycel submit job.toml        let the swarm work through a job
    """


def main() -> int:
    """Run the command line; the process's exit code."""
    try:
        cli(standalone_mode=False, prog_name="mycel")
    except click.exceptions.Exit as left:
        return left.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; nothing is left to say
        return 1
    except (MycelError, BaseExceptionGroup) as error:
        failure = single_failure(error)
        if failure is None:
            raise
        click.echo(f"mycel: {failure}", err=True)
        return 2 if isinstance(failure, UsageProblem) else 1
    return 0
