"""`mycel config`: the settings, their defaults, and what this home's node would use."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import click

from mycel.commands.common import home_option, json_option, print_json, print_table


@click.command()
@home_option
@json_option
def config(home: Path | None, as_json: bool) -> None:
    """Every setting, what it is for this home, and its default.

    A setting comes from a flag of `mycel up`, else the environment (MYCEL_ and its name in capitals), else
    config.toml in the home, else the preset, else the default.
    """
    from mycel.node.settings import describe, resolve

    chosen = resolve({"home": str(home)} if home else {}, os.environ)
    values = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
    if values["api_token"]:
        values["api_token"] = "(set)"
    if as_json:
        print_json({**values, "home": str(chosen.home)})
        return
    rows = [(name, str(values[name]), default) for name, default in describe()]
    print_table(("setting", "value", "default"), rows)
