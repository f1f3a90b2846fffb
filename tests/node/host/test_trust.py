"""Whole hosts and their chains: who gets in, who is turned away and knows why, and what strangers may do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import trio

from mycel.node.host import Host
from mycel.node.lapse import LOOK_S, end_lapsed
from mycel.protocol.chain import Chain, Link
from mycel.protocol.errors import Refused, StreamReset
from mycel.protocol.identity import SigningKey
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import DEFAULT_LIMITS
from mycel.protocol.membership import Credentials, Membership, found_swarm
from mycel.protocol.mesh import Access, PeerId, Stream
from mycel.protocol.ticket import issue_ticket

NOW = 1_800_000_000
ROOT = SigningKey(bytes([1]) * 32)
OTHER_ROOT = SigningKey(bytes([2]) * 32)
SECRET = "/test/secret/1"


def id_of(name: str) -> PeerId:
    """The peer id that the world gives a host of this name."""
    return OwnKey(hashlib.sha256(name.encode()).digest()).peer_id


def chain_by_ticket(
    peer: PeerId, *, root: SigningKey = ROOT, access: Access = Access.MEMBER, age_s: int = 0
) -> Chain:
    ticket = issue_ticket(root, access=access, now=NOW - age_s, entropy=lambda n: bytes([3]) * n, life_s=3600)
    return ticket.chain_for(peer)


def joined(name: str, chain: Chain | None = None, *, root: SigningKey = ROOT) -> Membership:
    peer = id_of(name)
    credentials = Credentials(peer, root.public, chain or chain_by_ticket(peer, root=root))
    return Membership(credentials, lambda: NOW)


def founder(name: str) -> Membership:
    return Membership(found_swarm(id_of(name), ROOT, NOW), lambda: NOW)


def serve_secret(host: Host) -> list[PeerId]:
    """Serve `SECRET` to members; who got it."""
    served: list[PeerId] = []

    async def handler(stream: Stream) -> None:
        served.append(stream.peer)
        await stream.send(b"secret")

    host.serve_stream(SECRET, handler)
    return served


async def ask_secret(host: Host, peer: PeerId) -> bytes:
    stream = await host.open_stream(peer, SECRET)
    await stream.send(b"?")
    return await stream.receive_exactly(6)


def test_members_get_in_and_see_each_others_role(play: Callable[..., None]) -> None:
    async def scenario(world):
        a = await world.host("a", membership=joined("a", chain_by_ticket(id_of("a"), access=Access.SUBMIT)))
        b = await world.host("b", membership=founder("b"))
        serve_secret(a)
        peer = await a.connect(b.listen_addrs)
        await world.up(b, a.peer_id)
        assert a.peers[peer].access is Access.ADMIN
        assert b.peers[a.peer_id].access is Access.SUBMIT
        assert await ask_secret(b, a.peer_id) == b"secret"

    play(scenario)


def test_newcomer_leaves_with_a_certificate_of_its_own(play: Callable[..., None]) -> None:
    async def scenario(world):
        new = joined("a")
        a, b = await world.host("a", membership=new), await world.host("b", membership=founder("b"))
        assert new.own_grant().by_ticket
        await a.connect(b.listen_addrs)
        assert not new.own_grant().by_ticket
        assert new.own_grant().not_after > NOW + 300 * 86400

    play(scenario)


def forged(peer: PeerId) -> Chain:
    first, last = chain_by_ticket(peer).links
    return Chain((first, Link(last.body, last.signature[::-1])))


BAD_CHAINS: dict[str, Callable[[PeerId], Chain]] = {
    "expired": lambda peer: chain_by_ticket(peer, age_s=7200),
    "foreign_chain": lambda _: chain_by_ticket(id_of("somebody else")),
    "forged": forged,
}


@pytest.mark.parametrize("reason", ["wrong_swarm", "expired", "foreign_chain", "forged"])
@pytest.mark.parametrize("bad_dials", [True, False])
def test_who_does_not_belong_is_turned_away_and_knows_why(
    play: Callable[..., None], reason: str, bad_dials: bool
) -> None:
    async def scenario(world):
        if reason == "wrong_swarm":
            bad = joined("bad", root=OTHER_ROOT)
        else:
            bad = joined("bad", BAD_CHAINS[reason](id_of("bad")))
        wrong, right = (
            await world.host("bad", membership=bad),
            await world.host("good", membership=joined("good")),
        )
        served = serve_secret(right)
        dialer, listener = (wrong, right) if bad_dials else (right, wrong)
        with pytest.raises(Refused) as caught:
            await dialer.connect(listener.listen_addrs)
        assert caught.value.reason == reason
        await trio.sleep(2)
        assert wrong.peer_id not in right.peers
        assert right.peer_id not in wrong.peers
        assert served == []

    play(scenario)


def test_chain_replayed_by_another_key_opens_nothing(play: Callable[..., None]) -> None:
    """A member's chain is no secret: whoever saw it and shows it on a connection of their own is refused."""

    async def scenario(world):
        member = joined("member")
        thief = Membership(Credentials(id_of("thief"), ROOT.public, member.credentials.chain), lambda: NOW)
        a, b = await world.host("thief", membership=thief), await world.host("b", membership=founder("b"))
        served = serve_secret(b)
        with pytest.raises(Refused) as caught:
            await a.connect(b.listen_addrs)
        assert caught.value.reason == "foreign_chain"
        assert served == []

    play(scenario)


@pytest.mark.parametrize("stranger_dials", [True, False])
def test_stranger_gets_ping_and_identify_and_nothing_else(
    play: Callable[..., None], stranger_dials: bool
) -> None:
    async def scenario(world):
        stranger = await world.host("stranger", default_access=Access.STRANGER)
        member = await world.host("member", membership=joined("member"))
        served = serve_secret(member)
        dialer, listener = (stranger, member) if stranger_dials else (member, stranger)
        await dialer.connect(listener.listen_addrs)
        await world.up(member, stranger.peer_id)
        await world.up(stranger, member.peer_id)
        assert member.peers[stranger.peer_id].access is Access.STRANGER
        with pytest.raises((StreamReset, Refused)):
            await ask_secret(stranger, member.peer_id)
        assert served == []
        await trio.sleep(2)  # a keep-alive or two
        assert stranger.peers[member.peer_id].agent.startswith("mycel/")
        assert member.rtt(stranger.peer_id) is not None

    play(scenario)


def test_stream_that_came_before_the_proof_waits_for_it(play: Callable[..., None]) -> None:
    async def scenario(world):
        a, b = await world.host("a", membership=joined("a")), await world.host("b", membership=joined("b"))
        served = serve_secret(b)
        connected = trio.Event()

        async def connect() -> None:
            await a.connect(b.listen_addrs)
            connected.set()

        world.nursery.start_soon(connect)
        with trio.fail_after(5):
            await connected.wait()
            assert await ask_secret(a, b.peer_id) == b"secret"
        assert served == [a.peer_id]

    play(scenario)


def test_a_connection_ends_with_the_chain_that_was_shown_on_it(play: Callable[..., None]) -> None:
    async def scenario(world):
        began = trio.current_time()

        def wall() -> float:
            return NOW + trio.current_time() - began

        def member(name: str) -> Membership:
            peer = id_of(name)
            return Membership(Credentials(peer, ROOT.public, chain_by_ticket(peer)), wall)

        keeps = member("keeps")
        a, b = await world.host("a", membership=member("a")), await world.host("keeps", membership=keeps)
        world.nursery.start_soon(end_lapsed, keeps, b)
        await a.connect(b.listen_addrs)
        await world.up(b, a.peer_id)
        await trio.sleep(3600 + DEFAULT_LIMITS.clock_skew_s - 30)
        assert a.peer_id in b.peers
        with trio.fail_after(30 + 2 * LOOK_S):
            down = await world.down(a, b.peer_id)
        assert "the membership that you showed has ended" in down.text
        with pytest.raises(Refused) as caught:
            await a.connect(b.listen_addrs)
        assert caught.value.reason == "expired"

    play(scenario)


def test_a_certificate_of_the_root_lengthens_a_membership_where_it_was_handed_out(
    play: Callable[..., None],
) -> None:
    """The founder gave it on this very connection, which therefore need not end with the ticket."""
    now = [float(NOW)]
    root = Membership(found_swarm(id_of("founder"), ROOT, NOW), lambda: now[0])
    new = Membership(Credentials(id_of("a"), ROOT.public, chain_by_ticket(id_of("a"))), lambda: now[0])
    ends = []

    async def scenario(world):
        a, b = await world.host("a", membership=new), await world.host("founder", membership=root)
        await a.connect(b.listen_addrs)
        await world.up(b, a.peer_id)
        now[0] += 3600 + 2 * DEFAULT_LIMITS.clock_skew_s
        ends.append(root.expired(b.peers))
        now[0] += DEFAULT_LIMITS.certificate_s
        ends.append(root.expired(b.peers))
        ends.append(root.expired(b.peers))

    play(scenario)
    assert ends == [[], [id_of("a")], []]
