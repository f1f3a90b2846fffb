"""A node's home: it founds, joins, keeps what it was given, and does not change swarms unasked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mycel.node.keyfile import KeyFileError
from mycel.node.trust import (
    CHAIN_FILE,
    IDENTITY_FILE,
    ROOT_FILE,
    Trust,
    TrustError,
    join_swarm,
    load_root,
    open_trust,
)
from mycel.protocol.chain import Chain, Grant, certify_peer, verify_chain
from mycel.protocol.errors import Refused
from mycel.protocol.limits import DEFAULT_LIMITS
from mycel.protocol.mesh import Access
from mycel.protocol.ticket import Ticket, issue_ticket

NOW = 1_800_000_000.0


def open_(home: Path, now: float = NOW) -> Trust:
    return open_trust(home, now=now, entropy=os.urandom)


def join(home: Path, ticket: Ticket, now: float = NOW, *, leave: bool = False) -> Trust:
    return join_swarm(home, ticket, now=now, entropy=os.urandom, leave=leave)


@pytest.fixture
def founder(tmp_path: Path) -> Trust:
    return open_(tmp_path / "founder")


def ticket_of(founder: Trust, life_s: float = 3600) -> Ticket:
    root = load_root(founder.home)
    assert root is not None
    return issue_ticket(root, access=Access.MEMBER, now=NOW, entropy=os.urandom, life_s=life_s)


def access_of(trust: Trust, now: float = NOW) -> Access:
    own = trust.credentials
    return verify_chain(own.chain, trust.identity.peer_id, own.root, now).access


def test_first_start_founds_a_swarm_of_one(founder: Trust) -> None:
    assert founder.is_founder
    assert access_of(founder) is Access.ADMIN
    again = open_(founder.home)
    assert again.identity.peer_id == founder.identity.peer_id
    assert again.swarm == founder.swarm
    assert sorted(os.listdir(founder.home)) == sorted([IDENTITY_FILE, ROOT_FILE])


def test_two_homes_are_two_swarms(founder: Trust, tmp_path: Path) -> None:
    assert open_(tmp_path / "other").swarm != founder.swarm


def test_joining_by_ticket_lasts_over_restarts(founder: Trust, tmp_path: Path) -> None:
    joined = join(tmp_path / "joiner", ticket_of(founder))
    again = open_(joined.home)
    for trust in (joined, again):
        assert trust.swarm == founder.swarm
        assert not trust.is_founder
        assert access_of(trust) is Access.MEMBER
    assert again.identity.peer_id == joined.identity.peer_id


def test_certificate_of_the_root_is_kept_for_the_time_after_the_ticket(
    founder: Trust, tmp_path: Path
) -> None:
    joined = join(tmp_path / "joiner", ticket_of(founder, life_s=60))
    with pytest.raises(Refused) as caught:
        open_(joined.home, NOW + 3600)
    assert caught.value.reason == "expired"
    root = load_root(founder.home)
    assert root is not None
    grant = Grant(Access.MEMBER, int(NOW), int(NOW + DEFAULT_LIMITS.certificate_s), "", by_ticket=False)
    joined.keep(Chain((certify_peer(root, root.public, joined.identity.peer_id, grant),)))
    assert access_of(open_(joined.home, NOW + 3600), NOW + 3600) is Access.MEMBER


def test_expired_ticket_joins_nothing(founder: Trust, tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        join(tmp_path / "joiner", ticket_of(founder, life_s=60), NOW + 3600)
    assert caught.value.reason == "expired"
    assert not (tmp_path / "joiner").exists()


def test_second_swarm_is_joined_only_on_the_users_word(founder: Trust, tmp_path: Path) -> None:
    joined = join(tmp_path / "joiner", ticket_of(founder))
    other = ticket_of(open_(tmp_path / "other"))
    with pytest.raises(TrustError, match="--leave"):
        join(joined.home, other)
    assert open_(joined.home).swarm == founder.swarm
    assert join(joined.home, other, leave=True).credentials.root == other.root


def test_swarm_of_one_may_be_left_without_a_word(founder: Trust, tmp_path: Path) -> None:
    """A node that was tried out alone has nobody to leave behind; its root key stays in its home."""
    lone = open_(tmp_path / "lone")
    assert join(lone.home, ticket_of(founder)).swarm == founder.swarm
    assert open_(lone.home).swarm == founder.swarm


def test_founder_who_uses_its_own_ticket_stays_founder(founder: Trust) -> None:
    assert join(founder.home, ticket_of(founder)).is_founder


def test_founder_comes_back_to_its_own_swarm_by_a_ticket_of_it(founder: Trust, tmp_path: Path) -> None:
    own = ticket_of(founder)
    join(founder.home, ticket_of(open_(tmp_path / "other")))
    assert not open_(founder.home).is_founder
    with pytest.raises(TrustError, match="--leave"):
        join(founder.home, own)
    assert join(founder.home, own, leave=True).is_founder
    assert open_(founder.home).swarm == founder.swarm


def test_membership_copied_from_another_home_is_refused(founder: Trust, tmp_path: Path) -> None:
    joined = join(tmp_path / "joiner", ticket_of(founder))
    thief = tmp_path / "thief"
    open_(thief)
    (thief / CHAIN_FILE).write_bytes((joined.home / CHAIN_FILE).read_bytes())
    with pytest.raises(Refused) as caught:
        open_(thief)
    assert caught.value.reason == "foreign_chain"


def test_broken_membership_says_what_to_do(founder: Trust, tmp_path: Path) -> None:
    joined = join(tmp_path / "joiner", ticket_of(founder))
    path = joined.home / CHAIN_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrustError, match="join again by ticket"):
        open_(joined.home)


def test_broken_identity_is_not_replaced(founder: Trust) -> None:
    path = founder.home / IDENTITY_FILE
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(KeyFileError, match="broken"):
        open_(founder.home)
    assert len(path.read_bytes()) == 40
