"""Mycel: a peer-to-peer compute network.

The public Python API is what this module names:

    join(ticket)          be a member of a swarm, from a script
    DiLoCo, DataParallel  train a torch module with the peers of a group
    BorderOptions, OuterOptions
    App                   an application for federated jobs

The rooms below it (`mycel.protocol`, `mycel.dht`, `mycel.compute`, `mycel.node`, `mycel.simnet`) are
described in docs/architecture.md. What needs torch is imported when it is first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mycel.compute.train.app import App
    from mycel.compute.train.border import BorderOptions
    from mycel.compute.train.diloco import DataParallel, DiLoCo
    from mycel.compute.train.outer import OuterOptions
    from mycel.node.embed import join

__version__ = "0.1.0"
__all__ = ["App", "BorderOptions", "DataParallel", "DiLoCo", "OuterOptions", "join"]

_HOMES = {
    "App": "mycel.compute.train.app",
    "BorderOptions": "mycel.compute.train.border",
    "DataParallel": "mycel.compute.train.diloco",
    "DiLoCo": "mycel.compute.train.diloco",
    "OuterOptions": "mycel.compute.train.outer",
    "join": "mycel.node.embed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mycel' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
