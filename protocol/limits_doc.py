"""Bounds of replicated documents (`mycel.dht.doc`)."""

from __future__ import annotations

from dataclasses import dataclass

from mycel.protocol.limits import KIB, MIB


@dataclass(frozen=True, slots=True)
class DocumentLimits:
    """Bounds of replicated documents (`mycel.dht.doc`)."""

    key_chars: int = 256
    """A key is a few words with slashes."""

    value_bytes: int = 16 * KIB
    """One value: a job's description with its settings; larger things are blocks."""

    content_bytes: int = 128 * KIB
    """What is live in one author's document, as a snapshot: some hundred models or jobs of 500 bytes."""

    log_bytes: int = 16 * KIB
    """A log that is longer than this, and than its snapshot, is compacted: history costs no more than
    what is live, and small documents are not compacted at every write..."""

    log_updates: int = 4096
    """...nor do they have more updates than this since the last compaction."""

    document_bytes: int = 384 * KIB
    """Snapshot and log of one author together, as others accept them: twice the content (the log may be
    as long as the snapshot) and one more write of that size."""

    authors: int = 4096
    """Documents kept; with each at its largest..."""

    total_bytes: int = 256 * MIB
    """...they are bounded by this. Both full, an author who is not known yet is refused."""

    chain_bytes: int = 4 * KIB
    """What shows that an author may write; a membership chain takes under 1 KiB."""

    skew_s: float = 86400.0
    """How far in the future an edition may begin: a calendar that is wrong by more is refused, for what it
    signs could not be replaced before that day."""

    push_peers: int = 8
    """Neighbours that news is pushed to, chosen at random: log 1000 / log 8 = 3.3, so a thousand nodes are a
    few hops wide; whoever is missed finds out by comparing."""

    quiet_s: float = 30.0
    """How long a neighbour that knew an author's news already is not pushed more of that author. Where peers
    come or go it ends at once."""

    compare_s: float = 2.0
    """How often a node compares what it holds with one neighbour: half a kilobyte when nothing differs."""

    call_s: float = 10.0
    """Deadline of one exchange: a megabyte over a line of 1 Mbit/s."""

    retry_s: float = 1.0
    """Before a neighbour that failed to answer is told again."""

    reply_bytes: int = 1 * MIB
    """Content in one message; a newcomer asks again until it has all. One document always fits."""

    refusals: int = 32
    """Parts that were forged or broken by which a peer loses its connection: honest peers check before
    they pass on, so it sends none."""


DEFAULT_DOCUMENT_LIMITS = DocumentLimits()
