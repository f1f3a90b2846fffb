"""What goes into a stage's next step.

A decode step costs nearly the same for sixteen sessions as for one, because both read all weights once; so
every session with a single row waiting goes in together. Prefills have many rows of their own and would
hold the decodes up, so they take turns with them: a step of decodes, then a step of prefills bounded in rows,
while both wait. Within a kind, who waited longest goes first; each session has one part in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ROWS_MAX = 512
"""Prefill rows in one step: enough to keep a processor's units full, short enough to let decodes in."""
SESSIONS_MAX = 64
"""Sessions in one step; beyond, a step's cost grows with them as fast as its output does."""


class Candidate(NamedTuple):
    """A session with rows waiting."""

    session: str
    rows: int
    since: float


def plan_step(
    candidates: Sequence[Candidate],
    *,
    decoded_last: bool,
    batchable: bool = True,
    rows_max: int = ROWS_MAX,
    sessions_max: int = SESSIONS_MAX,
) -> list[str]:
    """Names of the sessions whose waiting rows make the next step, in the order of the step.

    `decoded_last`: the step before was one of decodes, so prefills are due if any wait. Never empty
    when there are candidates. A model that is not `batchable` steps one session at a time.
    """
    decodes = sorted((c for c in candidates if c.rows == 1), key=_age)
    prefills = sorted((c for c in candidates if c.rows > 1), key=_age)
    if not batchable:
        first = prefills if prefills and (decoded_last or not decodes) else decodes
        return [first[0].session] if first else []
    if decodes and not (prefills and decoded_last):
        return [candidate.session for candidate in decodes[:sessions_max]]
    chosen: list[str] = []
    rows = 0
    for candidate in prefills[:sessions_max]:
        if chosen and rows + candidate.rows > rows_max:
            break
        chosen.append(candidate.session)
        rows += candidate.rows
    return chosen


def _age(candidate: Candidate) -> tuple[float, str]:
    return candidate.since, candidate.session
