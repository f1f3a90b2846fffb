"""TLS as a pipe, the outer coat of secure WebSocket (RFC 8446).

It is there to look like the web to what stands in between. Who the peer is, is proved by Noise inside it; so
a dialer does not ask who signed the server's certificate, and a proxy that opens the coat finds sealed bytes.
"""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

from mycel.node.layer import READ_BYTES, LayeredPipe
from mycel.protocol.errors import AddressError, PipeBroken
from mycel.protocol.network import Pipe


def client_context() -> ssl.SSLContext:
    """What a dialer uses: no certificate is looked at."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """What a listener uses: its PEM certificate chain and key. Raises `AddressError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise AddressError(
            f"cannot listen for wss with certificate {certificate} and key {key}: {error}; "
            "both must be PEM files that belong together"
        ) from None
    return context


class TlsPipe(LayeredPipe):
    """TLS over a pipe. `host` is the server's name (SNI) on the side that dials."""

    def __init__(self, below: Pipe, context: ssl.SSLContext, *, host: str | None = None) -> None:
        super().__init__(below, "/tls")
        self._sealed_in, self._sealed_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._sealed_in, self._sealed_out, server_side=host is None, server_hostname=host
        )
        if host is not None:
            self._unwrap_ready()
            self._put(b"")

    def _wrap(self, data: bytes) -> bytes:
        self._tls.write(data)
        return self._sealed_out.read()

    def _unwrap(self, data: bytes) -> None:
        if data:
            self._sealed_in.write(data)
        else:
            self._sealed_in.write_eof()
        self._unwrap_ready()

    def _unwrap_ready(self) -> None:
        """Go as far as what came allows: through the handshake, then through the records."""
        try:
            if not self.is_ready:
                self._tls.do_handshake()
                self.is_ready = True
            while piece := self._tls.read(READ_BYTES):
                self._arrived += piece
            self._ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLEOFError:
            self._ended = True
        except ssl.SSLError as error:
            raise PipeBroken(f"{self.remote} does not speak TLS with us: {error.reason}") from None
        finally:
            self._held += self._sealed_out.read()

    def _goodbye(self) -> bytes:
        with contextlib.suppress(ssl.SSLError):  # the peer's half of the goodbye is not waited for
            self._tls.unwrap()
        return self._sealed_out.read()
