"""`python -m mycel.node`: be a node by environment and config file alone, as services and containers do."""

from __future__ import annotations

import logging
import os
import sys

import trio

from mycel.node import start
from mycel.node.running import Node
from mycel.node.settings import resolve
from mycel.protocol.errors import MycelError, single_failure


def main() -> int:
    """Run until told to stop. Returns the exit code."""
    try:
        config = resolve({}, os.environ)
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(level=config.log.upper(), stream=sys.stderr, format=form)
        logging.getLogger("multiaddr").setLevel(logging.INFO)  # it tells of every address it reads
        trio.run(start.run, config, start.Watcher(_on_up, lambda node: None, lambda: None))
    except (MycelError, BaseExceptionGroup) as error:
        failure = single_failure(error)
        if failure is None:
            raise
        print(f"mycel: {failure}", file=sys.stderr)
        return 1
    return 0


def _on_up(node: Node) -> None:
    print(f"{node.host.peer_id} is up, {node.api}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
