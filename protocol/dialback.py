"""Dial-back: being called, to find out whether one can be.

Two kinds of it, both asked of a member that is connected (the asked one) over `PROTOCOL`, one request and one
outcome to a stream, each behind its length. A *knock*: the asked one connects to the asker's address from a
fresh port and hangs up. It proves little, for a NAT may let in whom the asker contacted before, but that it
fails says much. A *call through a third peer*: the asked one passes the request on to a witness that the
asker never sent a packet to, and the witness connects as a member does. What counts then is what the asker
sees with its own eyes, a proven inbound connection of the witness from an address that it never contacted; no
asked one can make that up.

Nobody is made to knock elsewhere: the asked one takes only addresses with the IP address that it sees the
asker at itself.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from mycel.protocol.errors import RemoteProtocolError

PROTOCOL = "/mycel/dialback/1"

ADDRS_MAX = 4
TEXT_MAX = 256

_Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
_Addrs = Annotated[tuple[_Text, ...], msgspec.Meta(min_length=1, max_length=ADDRS_MAX)]


class Knock(msgspec.Struct, frozen=True, array_like=True, tag="knock"):
    """Dial me at one of these TCP addresses, from a fresh port, and hang up."""

    addrs: _Addrs


class CallBy(msgspec.Struct, frozen=True, array_like=True, tag="by"):
    """Ask `witness`, a member that you are connected with, to connect to me at one of these."""

    witness: _Text
    addrs: _Addrs


class Call(msgspec.Struct, frozen=True, array_like=True, tag="call"):
    """Connect to the member `peer` at one of these: the request passed on to the witness."""

    peer: _Text
    addrs: _Addrs


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """How it went: the address that answered, or "" and why none did.

    Only a failure of what was `tried` says anything about the asker.
    """

    addr: _Text = ""
    why: _Text = ""
    tried: bool = False


Request = Knock | CallBy | Call

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_outcomes = msgspec.msgpack.Decoder(Outcome)


def write(message: Request | Outcome) -> bytes:
    """`message` without its length."""
    return _encoder.encode(message)


def read_request(raw: bytes) -> Request:
    """A request. Raises `RemoteProtocolError` for anything else."""
    try:
        return _requests.decode(raw)
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"not a request for a dial-back: {error}") from None


def read_outcome(raw: bytes) -> Outcome:
    """An outcome. Raises `RemoteProtocolError` for anything else."""
    try:
        return _outcomes.decode(raw)
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"not the outcome of a dial-back: {error}") from None
