"""Bounds of federated rounds (`mycel.compute.train`), each with its unit and the reason for its size."""

from __future__ import annotations

from dataclasses import dataclass

from mycel.protocol.limits import KIB, MIB


@dataclass(frozen=True, slots=True)
class FederatedLimits:
    """Seconds, bytes, counts."""

    model_bytes: int = 1024 * MIB - 64 * KIB
    """Largest model that a client takes, as float32: what one frame to its trainer carries."""

    chunk_bytes: int = 1 * MIB
    """A model travels in pieces of this size: small against a window, large against a frame's head."""

    stall_s: float = 20.0
    """How long a piece may take to come, or to be taken: a megabyte at half a megabit per second. Whoever is
    slower holds a place that others could use."""

    call_s: float = 5.0
    """Asking a peer whether it takes part."""

    ask_again_s: float = 5.0
    """How often peers that did not take part are asked again: an owner may have offered the data since."""

    jobs: int = 16
    """Federated jobs that a client has a part in at once; each keeps one update, of `model_bytes` at most."""

    branches: int = 1024
    """Clients below one aggregator of a tree."""

    settings: int = 64
    """Settings of an order..."""

    text: int = 512
    """...and characters in one of them, and in a reason that is reported."""

    metrics: int = 64
    """Figures that a client may report in a round."""

    history: int = 64
    """Rounds whose figures a coordinator keeps."""


DEFAULT_FEDERATED_LIMITS = FederatedLimits()
