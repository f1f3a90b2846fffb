"""Rows on their way through the layers: a step's worth of one session's positions."""

from __future__ import annotations

from typing import NamedTuple

from mycel.protocol.errors import LocalProtocolError
from mycel.protocol.tensor import Tensor


class Rows(NamedTuple):
    """Rows [position : position + rows): either token ids or hidden states ([rows, hidden_size])."""

    position: int
    rows: int
    tokens: tuple[int, ...] | None
    hidden: Tensor | None

    @property
    def end(self) -> int:
        """The row after the last."""
        return self.position + self.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return 0 if self.hidden is None else self.hidden.nbytes


def part_of(whole: Rows, start: int, end: int) -> Rows:
    """Rows [start : end) of `whole`, counted as positions."""
    first, last = start - whole.position, end - whole.position
    tokens = None if whole.tokens is None else whole.tokens[first:last]
    hidden = whole.hidden
    if hidden is not None:
        row = hidden.nbytes // whole.rows
        data = bytes(memoryview(hidden.data).cast("B")[first * row : last * row])
        hidden = Tensor(hidden.dtype, (last - first, *hidden.shape[1:]), data)
    return Rows(start, end - start, tokens, hidden)


def joined(one: Rows, other: Rows) -> Rows:
    """Two that follow each other, as one."""
    rows = one.rows + other.rows
    if one.tokens is not None and other.tokens is not None:
        return Rows(one.position, rows, one.tokens + other.tokens, None)
    if one.hidden is None or other.hidden is None:
        raise LocalProtocolError("token ids and hidden states do not join")
    data = b"".join((one.hidden.data, other.hidden.data))
    return Rows(one.position, rows, None, Tensor(one.hidden.dtype, (rows, *one.hidden.shape[1:]), data))
