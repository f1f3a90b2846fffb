"""The command line's end of the control API: plain blocking HTTP to the node of a home.

A running node writes its address and token to `api.json` in its home; whoever can read that may control it.
Standard library only, so that a command answers in a blink.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mycel.protocol.errors import MycelError

API_FILE = "api.json"


class NotRunning(MycelError):
    """No node runs in this home."""


class ControlError(MycelError):
    """The node said no; the text is its own."""


class Client:
    """Calls to the node whose home is `home`. Raises `NotRunning` and `ControlError`."""

    def __init__(self, home: Path, *, timeout_s: float | None = 30.0) -> None:
        self._home = home
        self._timeout_s = timeout_s

    def get(self, path: str) -> Any:
        """The JSON answer of GET /control/`path`."""
        return self._call("GET", path, None)

    def post(self, path: str, content: object) -> Any:
        """The JSON answer of POST /control/`path`."""
        return self._call("POST", path, content)

    def lines(self, path: str, content: object) -> Iterator[dict[str, Any]]:
        """The JSON lines that POST /control/`path` answers with, as they come."""
        with self._answer("POST", path, content) as answer:
            for line in answer:
                if line.strip():
                    yield json.loads(line)

    def pieces(self, path: str, content: object) -> Iterator[bytes]:
        """The bytes that POST /control/`path` answers with, as they come."""
        with self._answer("POST", path, content) as answer:
            while piece := answer.read(1 << 20):
                yield piece

    def _call(self, method: str, path: str, content: object) -> Any:
        with self._answer(method, path, content) as answer:
            return json.loads(answer.read())

    @contextmanager
    def _answer(self, method: str, path: str, content: object) -> Iterator[http.client.HTTPResponse]:
        try:
            where = json.loads((self._home / API_FILE).read_text("utf-8"))
            url, token = urlsplit(str(where["url"])), str(where["token"])
            host, port = url.hostname or "", url.port or 80
        except FileNotFoundError:
            raise self._not_running() from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ControlError(f"{self._home / API_FILE} cannot be used: {error}") from None
        connection = http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        with closing(connection):
            body = None if content is None else json.dumps(content).encode()
            headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
            try:
                connection.request(method, f"/control/{path}", body, headers)
                answer = connection.getresponse()
            except ConnectionError:
                raise self._not_running() from None
            except (OSError, http.client.HTTPException) as error:
                raise ControlError(f"the node at {where['url']} does not answer: {error}") from None
            try:
                if answer.status != 200:
                    raise ControlError(_problem(answer))
                yield answer
            except (OSError, http.client.HTTPException) as error:
                raise ControlError(f"the node at {where['url']} ended while it answered: {error}") from None

    def _not_running(self) -> NotRunning:
        return NotRunning(
            f"no node is running in {self._home}: start one with `mycel up`, or name its home with --home"
        )


def _problem(answer: http.client.HTTPResponse) -> str:
    content = answer.read()
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status}: {content[:200].decode('utf-8', 'replace')}"
