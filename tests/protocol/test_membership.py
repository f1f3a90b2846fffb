"""The membership exchange over simulated streams: honest pairs, every refusal, and peers that misbehave."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from mycel.protocol.chain import Chain, Grant, certify_peer, encode_chain, verify_chain
from mycel.protocol.errors import (
    DeadlineExceeded,
    LocalProtocolError,
    Refused,
    RemoteProtocolError,
    StreamReset,
)
from mycel.protocol.identity import SigningKey
from mycel.protocol.limits import DEFAULT_LIMITS
from mycel.protocol.membership import (
    PROTOCOL,
    Credentials,
    Membership,
    Refusal,
    Settled,
    Show,
    found_swarm,
)
from mycel.protocol.mesh import Access, PeerId, Stream
from mycel.protocol.ticket import Ticket, issue_ticket
from mycel.simnet.clock import run
from mycel.simnet.mesh import MeshOptions, SimMesh, mesh_world

NOW = int(MeshOptions().epoch)
ROOT = SigningKey(bytes([1]) * 32)
OTHER_ROOT = SigningKey(bytes([2]) * 32)
YEAR = DEFAULT_LIMITS.certificate_s

Outcome = Access | Exception
Side = Callable[[Stream], Awaitable[Access]]


@dataclass
class Pair:
    asker: SimMesh
    answerer: SimMesh

    async def meet(self, prove: Side, answer: Side) -> tuple[Outcome, Outcome]:
        """Run both sides on one stream; what each returned or raised."""
        send, receive = trio.open_memory_channel[Outcome](1)

        async def handler(stream: Stream) -> None:
            await send.send(await outcome(answer, stream))

        self.answerer.serve_stream(PROTOCOL, handler, access=Access.STRANGER)
        asked = await outcome(prove, await self.asker.open_stream(self.answerer.peer_id, PROTOCOL))
        with trio.fail_after(60):
            return asked, await receive.receive()


async def outcome(side: Side, stream: Stream) -> Outcome:
    try:
        return await side(stream)
    except Exception as error:  # boundary: the test looks at what was raised
        return error


@asynccontextmanager
async def a_pair() -> AsyncIterator[Pair]:
    async with mesh_world(MeshOptions(seed=5)) as world:
        asker, answerer = world.add("asker"), world.add("answerer")
        await asker.connect(answerer.listen_addrs)
        yield Pair(asker, answerer)


def a_ticket(root: SigningKey = ROOT, access: Access = Access.MEMBER, life_s: float = 3600.0) -> Ticket:
    return issue_ticket(
        root, access=access, now=NOW, entropy=lambda n: bytes([3]) * n, life_s=life_s, label="lab"
    )


def joined(peer: PeerId, ticket: Ticket) -> Credentials:
    return Credentials(peer, ticket.root, ticket.chain_for(peer))


def member(node: SimMesh, ticket: Ticket | None = None) -> Membership:
    return Membership(joined(node.peer_id, ticket or a_ticket()), node.wall)


def founder(node: SimMesh) -> Membership:
    return Membership(found_swarm(node.peer_id, ROOT, NOW), node.wall)


def by_root(peer: PeerId, access: Access = Access.MEMBER, life_s: float = YEAR) -> Chain:
    grant = Grant(access, NOW, int(NOW + life_s), "lab", by_ticket=False)
    return Chain((certify_peer(ROOT, ROOT.public, peer, grant),))


def framed(*messages: Show | Settled | Refusal) -> bytes:
    return b"".join(len(m).to_bytes(4, "big") + m for m in map(msgspec.msgpack.encode, messages))


async def test_two_members_by_ticket_learn_each_others_role(autojump_clock: MockClock) -> None:
    async with a_pair() as pair:
        submitter = member(pair.asker, a_ticket(access=Access.SUBMIT))
        assert await pair.meet(submitter.prove, member(pair.answerer).answer) == (
            Access.MEMBER,
            Access.SUBMIT,
        )


async def test_exchange_takes_one_round_trip_for_the_side_that_proves(autojump_clock: MockClock) -> None:
    async with a_pair() as pair:
        began = trio.current_time()
        latency = pair.asker.world.latency(pair.asker.peer_id, pair.answerer.peer_id)

        async def timed(stream: Stream) -> Access:
            access = await member(pair.asker).prove(stream)
            assert trio.current_time() - began < 3 * latency
            return access

        assert await pair.meet(timed, member(pair.answerer).answer) == (Access.MEMBER, Access.MEMBER)


@pytest.mark.parametrize("founder_asks", [False, True])
async def test_root_holder_hands_a_peer_by_ticket_its_own_certificate(
    founder_asks: bool, autojump_clock: MockClock
) -> None:
    async with a_pair() as pair:
        kept: list[Chain] = []
        newcomer = pair.answerer if founder_asks else pair.asker
        new = Membership(joined(newcomer.peer_id, a_ticket()), newcomer.wall, on_certificate=kept.append)
        old = founder(pair.asker if founder_asks else pair.answerer)
        if founder_asks:
            assert await pair.meet(old.prove, new.answer) == (Access.MEMBER, Access.ADMIN)
        else:
            assert await pair.meet(new.prove, old.answer) == (Access.ADMIN, Access.MEMBER)
        assert kept == [new.credentials.chain]
        grant = verify_chain(kept[0], newcomer.peer_id, ROOT.public, NOW + YEAR - 3600)
        assert grant.access is Access.MEMBER
        assert not grant.by_ticket
        assert grant.label == "lab"


@pytest.mark.parametrize(("left_s", "renewed"), [(YEAR * 0.4, True), (YEAR * 0.6, False)])
async def test_certificate_is_renewed_when_half_its_life_is_gone(
    left_s: float, renewed: bool, autojump_clock: MockClock
) -> None:
    async with a_pair() as pair:
        kept: list[Chain] = []
        credentials = Credentials(pair.asker.peer_id, ROOT.public, by_root(pair.asker.peer_id, life_s=left_s))
        asker = Membership(credentials, pair.asker.wall, on_certificate=kept.append)
        assert await pair.meet(asker.prove, founder(pair.answerer).answer) == (Access.ADMIN, Access.MEMBER)
        assert bool(kept) is renewed


async def test_root_holder_renews_itself(autojump_clock: MockClock) -> None:
    async with a_pair() as pair:
        credentials = found_swarm(pair.answerer.peer_id, ROOT, NOW - 2 * YEAR)
        answerer = Membership(credentials, pair.answerer.wall)
        assert await pair.meet(member(pair.asker).prove, answerer.answer) == (Access.ADMIN, Access.MEMBER)
        assert answerer.own_grant().not_after > NOW + YEAR - 3600


def expect_refusal(outcomes: tuple[Outcome, Outcome], reason: str) -> None:
    for result in outcomes:
        assert isinstance(result, Refused)
        assert result.reason == reason


@pytest.mark.parametrize("wrong_side", ["asker", "answerer"])
@pytest.mark.parametrize(
    "reason", ["wrong_swarm", "expired", "forged", "foreign_chain", "not_yet", "malformed"]
)
async def test_both_sides_learn_why_one_is_refused(
    wrong_side: str, reason: str, autojump_clock: MockClock
) -> None:
    async with a_pair() as pair:
        wrong = pair.asker if wrong_side == "asker" else pair.answerer
        other = pair.answerer if wrong_side == "asker" else pair.asker
        bad = Membership(bad_credentials(wrong.peer_id, other.peer_id, reason), wrong.wall)
        if wrong_side == "asker":
            outcomes = await pair.meet(bad.prove, member(pair.answerer).answer)
        else:
            # A side with another root would itself refuse first, so it is made to accept anybody.
            bad._judge = accept_anybody  # type: ignore[method-assign]
            outcomes = await pair.meet(member(pair.asker).prove, bad.answer)
        expect_refusal(outcomes, reason)


async def accept_anybody(exchange: object, shown: Show) -> Grant:
    return Grant(Access.MEMBER, NOW, NOW + 1, "", by_ticket=False)


def bad_credentials(peer: PeerId, other: PeerId, reason: str) -> Credentials:
    good = joined(peer, a_ticket())
    match reason:
        case "wrong_swarm":
            return joined(peer, a_ticket(OTHER_ROOT))
        case "expired":
            return joined(
                peer, issue_ticket(ROOT, access=Access.MEMBER, now=NOW - 7200, entropy=bytes, life_s=60)
            )
        case "not_yet":
            return joined(
                peer, issue_ticket(ROOT, access=Access.MEMBER, now=NOW + 7200, entropy=bytes, life_s=60)
            )
        case "forged":
            first, last = good.chain.links
            flipped = bytes([last.signature[0] ^ 1]) + last.signature[1:]
            return replace(good, chain=Chain((first, msgspec.structs.replace(last, signature=flipped))))
        case "foreign_chain":
            return replace(good, chain=a_ticket().chain_for(other))
        case _:
            return replace(good, chain=Chain(good.chain.links[:1]))


async def test_revoked_peer_is_refused_whatever_it_shows(autojump_clock: MockClock) -> None:
    async with a_pair() as pair:
        keeper = Membership(
            found_swarm(pair.answerer.peer_id, ROOT, NOW), pair.answerer.wall, revoked=[pair.asker.peer_id]
        )
        expect_refusal(await pair.meet(member(pair.asker).prove, keeper.answer), "revoked")


async def test_stranger_learns_nothing_of_the_swarm(autojump_clock: MockClock) -> None:
    async with a_pair() as pair:
        heard = bytearray()

        async def listen(stream: Stream) -> Access:
            await stream.send(framed(Show(encode_chain(a_ticket(OTHER_ROOT).chain_for(pair.asker.peer_id)))))
            while data := await stream.receive_some():
                heard.extend(data)
            return Access.STRANGER

        _, answered = await pair.meet(listen, member(pair.answerer).answer)
        assert isinstance(answered, Refused)
        message = msgspec.msgpack.decode(heard[4:], type=Refusal)
        assert message.reason == "wrong_swarm"
        assert len(heard) == 4 + int.from_bytes(heard[:4], "big")
        assert b"delegate" not in heard


async def test_root_holder_gives_no_certificate_to_whom_it_refuses(autojump_clock: MockClock) -> None:
    async with a_pair() as pair:
        kept: list[Chain] = []
        copied = Credentials(pair.asker.peer_id, ROOT.public, a_ticket().chain_for(pair.answerer.peer_id))
        thief = Membership(copied, pair.asker.wall, on_certificate=kept.append)
        expect_refusal(await pair.meet(thief.prove, founder(pair.answerer).answer), "foreign_chain")
        assert kept == []


@pytest.mark.parametrize(
    "chain",
    [
        encode_chain(by_root(PeerId("12D3KooWDU45KWVznP3JbRNgR38ZPFS4U9rYjD5NTJboByDKWqBh"))),
        encode_chain(by_root(PeerId("12D3KooWDU45KWVznP3JbRNgR38ZPFS4U9rYjD5NTJboByDKWqBh")))[:-1],
        b"",
    ],
)
async def test_certificate_that_is_not_for_us_ends_the_exchange(
    chain: bytes, autojump_clock: MockClock
) -> None:
    async with a_pair() as pair:
        asker = member(pair.asker)
        before = asker.credentials

        async def answer(stream: Stream) -> Access:
            shown = encode_chain(a_ticket().chain_for(pair.answerer.peer_id))
            await stream.send(framed(Show(shown), Settled(chain)))
            await stream.receive_some()
            return Access.STRANGER

        asked, _ = await pair.meet(asker.prove, answer)
        assert isinstance(asked, RemoteProtocolError)
        assert asker.credentials is before


@pytest.mark.parametrize(("access", "life_s"), [(Access.SUBMIT, 2 * YEAR), (Access.ADMIN, YEAR / 2)])
async def test_lesser_certificate_does_not_replace_a_better_one(
    access: Access, life_s: float, autojump_clock: MockClock
) -> None:
    async with a_pair() as pair:
        admin = Credentials(pair.asker.peer_id, ROOT.public, by_root(pair.asker.peer_id, Access.ADMIN))
        asker = Membership(admin, pair.asker.wall)

        async def answer(stream: Stream) -> Access:
            shown = encode_chain(by_root(pair.answerer.peer_id))
            lesser = encode_chain(by_root(pair.asker.peer_id, access, life_s))
            return await say(stream, framed(Show(shown), Settled(lesser)))

        asked, _ = await pair.meet(asker.prove, answer)
        assert asked is Access.MEMBER
        assert asker.credentials is admin


async def say(stream: Stream, data: bytes) -> Access:
    await stream.send(data)
    while await stream.receive_some():
        pass
    return Access.STRANGER


@pytest.mark.parametrize("silent_side", ["asker", "answerer"])
@pytest.mark.parametrize("data", [b"", b"\0\0", b"\0\0\0\x10half"])
async def test_silence_ends_at_the_deadline(silent_side: str, data: bytes, autojump_clock: MockClock) -> None:
    async with a_pair() as pair:
        began = trio.current_time()

        silent = partial(say, data=data)
        if silent_side == "asker":
            _, result = await pair.meet(silent, member(pair.answerer).answer)
        else:
            result, _ = await pair.meet(member(pair.asker).prove, silent)
        assert isinstance(result, DeadlineExceeded)
        assert trio.current_time() - began < DEFAULT_LIMITS.membership_s + 1


@pytest.mark.parametrize(
    ("data", "words"),
    [((1 << 31).to_bytes(4, "big") + bytes(1 << 16), "at most 4096"), (framed(Settled()), "Show is due")],
)
async def test_oversized_or_untimely_message_is_a_protocol_error(
    data: bytes, words: str, autojump_clock: MockClock
) -> None:
    async with a_pair() as pair:
        asked, answered = await pair.meet(partial(say, data=data), member(pair.answerer).answer)
        assert isinstance(answered, RemoteProtocolError)
        assert words in str(answered)
        assert isinstance(asked, StreamReset)


async def test_refusal_text_from_the_wire_is_made_printable(autojump_clock: MockClock) -> None:
    async with a_pair() as pair:

        async def rude(stream: Stream) -> Access:
            return await say(stream, framed(Refusal("because", "no\x1b[2J")))

        asked, _ = await pair.meet(member(pair.asker).prove, rude)
        assert isinstance(asked, Refused)
        assert asked.reason == "refused"
        assert "\x1b" not in str(asked)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=6000), as_frame=st.booleans(), asks=st.booleans())
def test_any_bytes_end_in_a_named_error(data: bytes, as_frame: bool, asks: bool) -> None:
    if as_frame:
        data = len(data).to_bytes(4, "big") + data

    async def main() -> None:
        async with a_pair() as pair:

            async def garbage(stream: Stream) -> Access:
                return await say(stream, data)

            if asks:
                _, result = await pair.meet(garbage, member(pair.answerer).answer)
            else:
                result, _ = await pair.meet(member(pair.asker).prove, garbage)
            assert isinstance(result, RemoteProtocolError | DeadlineExceeded | Refused)

    run(main, seed=1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_in_the_exchange_ends_it(data: st.DataObject) -> None:
    async def main() -> None:
        async with a_pair() as pair:
            shown = bytearray(framed(Show(encode_chain(a_ticket().chain_for(pair.asker.peer_id)))))
            bit = data.draw(st.integers(0, 8 * len(shown) - 1))
            shown[bit // 8] ^= 1 << bit % 8

            async def flipped(stream: Stream) -> Access:
                return await say(stream, bytes(shown))

            _, answered = await pair.meet(flipped, member(pair.answerer).answer)
            assert isinstance(answered, RemoteProtocolError | DeadlineExceeded | Refused)

    run(main, seed=1)


def test_only_the_root_key_signs_for_the_swarm() -> None:
    peer = PeerId("12D3KooWDU45KWVznP3JbRNgR38ZPFS4U9rYjD5NTJboByDKWqBh")
    credentials = replace(found_swarm(peer, ROOT, NOW), signer=OTHER_ROOT)
    with pytest.raises(LocalProtocolError):
        Membership(credentials, lambda: NOW)
    assert "seed" not in repr(credentials)
