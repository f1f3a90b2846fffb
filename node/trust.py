"""What a node keeps on disk about trust, and how it comes up with it.

In the node's home directory:

    identity.key     this node's own key (made on first use)
    swarm.key        the root key, only on the node that founded its swarm
    membership       this node's chain in its swarm: no secret, but as good as the swarm it names

`open_trust` gives identity and credentials: those of the swarm this home belongs to, else those of a swarm
of one, founded on the spot. `join_swarm` makes the home belong to a ticket's swarm. A home belongs to one
swarm; joining another needs `leave=True`, which is the user's word, since it gives up the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mycel.node.keyfile import (
    IDENTITY,
    SWARM_ROOT,
    load_or_create_seed,
    load_seed,
    write_private,
)
from mycel.protocol.chain import Chain, decode_chain, encode_chain, read_certificate, swarm_id, verify_chain
from mycel.protocol.errors import MycelError, Refused
from mycel.protocol.identity import SigningKey
from mycel.protocol.keys import OwnKey
from mycel.protocol.membership import Credentials, found_swarm
from mycel.protocol.ticket import Ticket, check_ticket

IDENTITY_FILE = "identity.key"
ROOT_FILE = "swarm.key"
CHAIN_FILE = "membership"


class TrustError(MycelError):
    """This home's trust files do not fit what was asked; the text says which and what to do."""


@dataclass(frozen=True, slots=True)
class Trust:
    """A node's identity and how it belongs to its swarm."""

    home: Path
    identity: OwnKey
    credentials: Credentials

    @property
    def swarm(self) -> str:
        """The swarm's name: its root public key in base58."""
        return swarm_id(self.credentials.root)

    @property
    def is_founder(self) -> bool:
        """Whether the root key is here, so that this node can issue tickets."""
        return self.credentials.signer is not None

    def keep(self, chain: Chain) -> None:
        """Store a newer chain of this node: `Membership`'s `on_certificate`. Raises `TrustError`."""
        _write_chain(self.home, chain)


def open_trust(home: Path, *, now: float, entropy: Callable[[int], bytes]) -> Trust:
    """Identity and credentials of the node whose files are in `home`.

    Without a swarm yet it founds one of its own. `now` is calendar time (seconds since 1970). Raises
    `KeyFileError`, `TrustError`; `Refused` (expired) when the membership ran out: join again by ticket.
    """
    identity = OwnKey(load_or_create_seed(home / IDENTITY_FILE, IDENTITY, entropy))
    chain = _read_chain(home)
    if chain is None:
        root = SigningKey(load_or_create_seed(home / ROOT_FILE, SWARM_ROOT, entropy))
        return Trust(home, identity, found_swarm(identity.peer_id, root, now))
    public = read_certificate(chain.links[0]).swarm
    try:
        verify_chain(chain, identity.peer_id, public, now)
    except Refused as refused:
        raise Refused(
            f"the membership in {home / CHAIN_FILE} does not hold: {refused}", reason=refused.reason
        ) from None
    return Trust(home, identity, Credentials(identity.peer_id, public, chain))


def join_swarm(
    home: Path, ticket: Ticket, *, now: float, entropy: Callable[[int], bytes], leave: bool = False
) -> Trust:
    """Make the node in `home` a member of the ticket's swarm, and open it.

    Raises `Refused` (expired, not_yet), `KeyFileError`, and `TrustError` when the home already belongs to
    another swarm and `leave` was not said.
    """
    check_ticket(ticket, now)
    held = _read_chain(home)
    other = read_certificate(held.links[0]).swarm if held is not None else None
    if other is not None and other != ticket.root and not leave:
        raise TrustError(
            f"this node belongs to swarm {swarm_id(other)} already: use another home directory for a second "
            "swarm, or leave the first with --leave"
        )
    root = load_root(home)
    if root is not None and root.public == ticket.root:  # the founder needs no ticket of its own
        (home / CHAIN_FILE).unlink(missing_ok=True)
        return open_trust(home, now=now, entropy=entropy)
    identity = OwnKey(load_or_create_seed(home / IDENTITY_FILE, IDENTITY, entropy))
    chain = ticket.chain_for(identity.peer_id)
    _write_chain(home, chain)
    return Trust(home, identity, Credentials(identity.peer_id, ticket.root, chain))


def load_root(home: Path) -> SigningKey | None:
    """The root key in `home`, None where there is none. Raises `KeyFileError`."""
    try:
        return SigningKey(load_seed(home / ROOT_FILE, SWARM_ROOT))
    except FileNotFoundError:
        return None


def _read_chain(home: Path) -> Chain | None:
    path = home / CHAIN_FILE
    try:
        return decode_chain(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrustError(f"cannot read {path}: {error.strerror}") from None
    except Refused as refused:
        raise TrustError(f"{path} is broken ({refused}): delete it and join again by ticket") from None


def _write_chain(home: Path, chain: Chain) -> None:
    try:
        write_private(home / CHAIN_FILE, encode_chain(chain), replace=True)
    except OSError as error:
        raise TrustError(f"cannot write {home / CHAIN_FILE}: {error.strerror}") from None
