"""What a node counts, in Prometheus' text format (version 0.0.4), made when asked.

Every figure is read from the service that owns it; nothing is counted twice and no registry is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import trio

import mycel
from mycel.dht.kad.service import Kademlia
from mycel.node.reach.verdict import Kind
from mycel.node.running import Node


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name, what it says, and its values by labels."""

    name: str
    kind: str
    """counter or gauge."""
    text: str
    values: Mapping[tuple[tuple[str, str], ...], float] = field(default_factory=dict)


def render(node: Node) -> str:
    """All of the node's metrics."""
    lines: list[str] = []
    for family in families(node):
        lines.append(f"# HELP {family.name} {family.text}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for labels, value in sorted(family.values.items()):
            told = ",".join(f'{name}="{_escape(text)}"' for name, text in labels)
            lines.append(f"{family.name}{'{' + told + '}' if told else ''} {value:g}")
    return "\n".join(lines) + "\n"


def families(node: Node) -> Iterator[Family]:
    """The metrics of `node`."""
    host, totals, tally = node.host.counters, node.stages.totals, node.tally
    who = {_labels(peer=node.host.peer_id, version=mycel.__version__): 1}
    yield Family("mycel_info", "gauge", "Version and peer id.", who)
    yield _gauge("mycel_up_seconds", "Seconds since the node came up.", trio.current_time() - node.began)
    yield Family("mycel_peers", "gauge", "Connected peers by role.", _count_roles(node))
    yield _counter("mycel_connections_opened_total", "Connections that came up.", host.opened)
    yield _counter("mycel_dials_failed_total", "Dials that failed.", host.dials_failed)
    yield _by("reason", "mycel_connections_lost_total", "Connections that ended.", host.lost)
    yield _by("reason", "mycel_refused_total", "Connections and streams turned away.", host.refused)
    sides = {"in": host.streams_inbound, "out": host.streams_outbound}
    yield _by("side", "mycel_streams_total", "Streams opened.", sides)
    yield _by("protocol", "mycel_handler_errors_total", "Handlers that raised.", host.handler_errors)
    yield _by("method", "mycel_calls_total", "Calls let in.", node.rpc.calls)
    yield _by("reason", "mycel_calls_refused_total", "Calls not let in.", node.rpc.refused)
    phases = {_labels(phase=phase): float(count) for phase, count in node.jobs.phases.items()}
    yield Family("mycel_jobs", "gauge", "Jobs that are known.", phases)
    yield _by("reason", "mycel_jobs_refused_total", "Words about jobs not taken.", node.jobs.book.refused)
    reach = node.reach
    verdicts = {_labels(verdict=kind.value): float(kind is reach.verdict.kind) for kind in Kind}
    yield Family("mycel_reach", "gauge", "What this node is to others: 1 at the verdict.", verdicts)
    yield _gauge("mycel_relays", "Relays through which others reach this node.", len(reach.circuits.relays))
    yield _gauge("mycel_relay_reservations", "Peers reached through this node.", reach.relay.reservations)
    yield _gauge("mycel_relay_circuits", "Connections that go through this node.", reach.relay.circuits)
    yield _counter("mycel_relay_bytes_total", "Bytes relayed for others.", reach.relay.forwarded)
    yield _counter("mycel_upgrades_total", "Relayed connections that became direct.", reach.upgrade.upgraded)
    sheets = node.board.sheets
    yield _gauge("mycel_hearsay_authors", "Members known through others only.", len(sheets.known))
    yield _by("reason", "mycel_hearsay_refused_total", "Sheets of facts not taken.", sheets.refused)
    library = node.documents.library
    yield _gauge("mycel_documents", "Authors whose documents are here.", len(library.authors))
    yield _gauge("mycel_document_bytes", "Bytes of all documents here.", library.size)
    yield _by("reason", "mycel_documents_refused_total", "Documents not taken.", library.refused)
    yield _counter("mycel_rows_computed_total", "Rows through this node's layers.", totals.rows_computed)
    yield _counter("mycel_rows_resent_total", "Rows sent from the log after a loss.", totals.rows_resent)
    yield _counter("mycel_rows_duplicate_total", "Rows that came twice.", totals.rows_duplicate)
    yield _counter("mycel_steps_total", "Steps of the engines.", totals.steps)
    yield _counter("mycel_worker_losses_total", "Workers that died.", node.lender.losses)
    yield _counter("mycel_generations_total", "Generations owned that ended.", tally.generations)
    yield _counter("mycel_tokens_total", "Tokens generated for this node's clients.", tally.tokens)
    yield _counter("mycel_failovers_total", "Recoveries of those generations.", tally.failovers)
    yield from _kademlia(node.discovery.kad)
    yield from _blocks(node)


def _kademlia(kad: Kademlia) -> Iterator[Family]:
    """What is found and kept beyond those in sight."""
    yield _gauge("mycel_kad_answering", "Whether this node answers questions.", kad.is_serving)
    yield _gauge("mycel_kad_peers", "Peers in the table.", len(kad.table))
    yield _gauge("mycel_kad_records", "Records kept for others.", len(kad.answerer.records))
    yield _gauge("mycel_kad_record_bytes", "Bytes of those records.", kad.answerer.records.size)
    yield _gauge("mycel_kad_providers", "Who provides what, told by others.", len(kad.answerer.providers))
    for start, label, text in (
        ("question_", "kind", "Questions answered."),
        ("refused_", "reason", "What peers sent and was refused."),
    ):
        found = {key.removeprefix(start): n for key, n in kad.counts.items() if key.startswith(start)}
        yield _by(label, f"mycel_kad_{start.replace('question_', 'questions_')}total", text, found)
    own = {key: kad.counts.get(key, 0) for key in ("puts", "puts_short", "gets", "gets_missed", "repaired")}
    yield _by("what", "mycel_kad_own_total", "Puts and gets of this node, and what came of them.", own)
    yield _counter("mycel_kad_asked_total", "Questions to others.", kad.asker.asked)
    yield _counter("mycel_kad_unanswered_total", "Those without an answer.", kad.asker.unanswered)
    yield _counter("mycel_kad_bytes_total", "Bytes of questions and answers.", kad.asker.bytes)


def _blocks(node: Node) -> Iterator[Family]:
    """What is kept and exchanged as blocks; nothing while the store is being opened."""
    exchange = node.blocks.exchange_now
    if exchange is None:
        return
    store, uploads = exchange.store, exchange.uploads
    yield _gauge("mycel_block_store_bytes", "Bytes of blocks here.", store.used_bytes)
    yield _gauge("mycel_block_store_quota_bytes", "What they may take.", store.quota_bytes)
    yield _counter("mycel_blocks_received_total", "Blocks that came and were kept.", exchange.blocks_received)
    yield _counter("mycel_block_bytes_received_total", "Their bytes.", exchange.bytes_received)
    yield _counter("mycel_blocks_sent_total", "Blocks sent to others.", uploads.blocks_sent)
    yield _counter("mycel_block_bytes_sent_total", "Their bytes.", uploads.bytes_sent)
    yield _counter(
        "mycel_blocks_corrupt_total", "Blocks that were not what they were named.", exchange.corrupt
    )
    broken = {"rules": exchange.broken, "too_many": uploads.refused}
    yield _by("reason", "mycel_block_streams_refused_total", "Streams of blocks cut off.", broken)


def _gauge(name: str, text: str, value: float) -> Family:
    return Family(name, "gauge", text, {(): value})


def _counter(name: str, text: str, value: float) -> Family:
    return Family(name, "counter", text, {(): value})


def _by(label: str, name: str, text: str, values: Mapping[str, int]) -> Family:
    return Family(name, "counter", text, {((label, key),): value for key, value in values.items()})


def _labels(**labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(labels.items())


def _count_roles(node: Node) -> dict[tuple[tuple[str, str], ...], float]:
    counts: dict[tuple[tuple[str, str], ...], float] = {}
    for info in node.host.peers.values():
        key = (("role", info.access.name.lower()),)
        counts[key] = counts.get(key, 0) + 1
    return counts


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
