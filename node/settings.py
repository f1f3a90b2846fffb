"""The one order in which a node is told its settings.

A value comes from the first of these that names it: a flag of the command line, the environment
(`MYCEL_` and the field's name in capitals), the file `config.toml` in the node's home, the preset, the
default in `mycel.node.config`. `resolve` is that order and nothing else; it reads what it is given, so a
test or a simulation builds a `Config` directly.

A key that does not exist is an error that names the nearest one that does: a typo must not run for a week
as a default.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mycel.node.config import DEFAULT_HOME, PRESETS, Config, ConfigError

ENVIRONMENT_PREFIX = "MYCEL_"
CONFIG_FILE = "config.toml"


def resolve(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Config:
    """The config by its one precedence. `flags` holds only what was given; `home` comes from flags or
    environment, for the config file lies in it. Raises `ConfigError`."""
    from_environment = {
        key.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for key, value in environ.items()
        if key.startswith(ENVIRONMENT_PREFIX)
    }
    given = _read(flags, "the command line")
    named = _read(from_environment, "the environment")
    home = Path(given.get("home") or named.get("home") or DEFAULT_HOME).expanduser().absolute()
    path = home / CONFIG_FILE
    filed = _read(_read_file(path), str(path))
    if "home" in filed:
        raise ConfigError(f"{path}: home cannot be set in the file that lies in it; use --home or MYCEL_HOME")
    chosen = {**filed, **named, **given, "home": home}
    preset = chosen.get("preset", Config.__dataclass_fields__["preset"].default)
    return Config(**{**PRESETS.get(preset, {}), **chosen}).validate()


def describe() -> Sequence[tuple[str, str]]:
    """(field, default as text) of every setting, in order."""
    return [
        (item.name, repr(item.default) if item.default is not MISSING else DEFAULT_HOME)
        for item in fields(Config)
    ]


def parse_size(text: str) -> int:
    """Bytes of "1024", "512MiB", "8GiB" or "2GB". Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(text)
    step = 1024 if match[3] else 1000
    return int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _read(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    known = {item.name: item for item in fields(Config)}
    out = {}
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{source} sets {name!r}, which is no setting. The nearest is {near!r}")
        out[name] = _convert(name, str(known[name].type), value, source)
    return out


def _convert(name: str, kind: str, value: Any, source: str) -> Any:
    try:
        if kind == "tuple[str, ...]":
            items = re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else value
            if not all(isinstance(item, str) for item in items):
                raise ValueError(value)
            return tuple(item for item in items if item)
        if kind == "bool":
            return value if isinstance(value, bool) else _BOOLS[value.lower()]
        if kind == "Path":
            return Path(value)
        if kind == "int" and isinstance(value, str):
            return parse_size(value)
        if kind in ("int", "float"):
            if isinstance(value, bool) or (kind == "int" and not isinstance(value, int)):
                raise ValueError(value)
            return float(value) if kind == "float" else value
        if not isinstance(value, str):
            raise ValueError(value)
        return value
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source}: {name} = {value!r} is not {_KINDS[kind]}") from error


_BOOLS = {"1": True, "true": True, "yes": True, "on": True,
          "0": False, "false": False, "no": False, "off": False}  # fmt: skip
_KINDS = {
    "tuple[str, ...]": "a list of texts",
    "bool": "true or false",
    "Path": "a path",
    "int": "a whole number (sizes may be written 8GiB)",
    "float": "a number",
    "str": "a text",
}
