"""What a host counts, for metrics and for tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Totals since the host began; `refused`, `lost` and `handler_errors` by one word for the cause."""

    accepted: int = 0
    dialed: int = 0
    dials_failed: int = 0
    opened: int = 0
    """Connections whose handshake succeeded."""
    streams_inbound: int = 0
    streams_outbound: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Connections and streams turned away: connections, per_ip, handshakes, streams, access, ..."""
    lost: Counter[str] = field(default_factory=Counter)
    """Ended connections by reason, as in `ConnectionLost`."""
    handler_errors: Counter[str] = field(default_factory=Counter)
    """Handlers that raised, by protocol."""
