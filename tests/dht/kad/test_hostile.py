"""Peers that lie, flood, or send garbage: refused with a reason, counted, and bounded."""

from __future__ import annotations

import pytest
import trio

from mycel.dht.kad.message import KAD_PROTOCOL, Kind, Message, read, write
from mycel.dht.kad.record import name_of, seal
from mycel.dht.kad.table import Contact
from mycel.protocol import varint
from mycel.protocol.errors import Refused, StreamReset
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import Access

LIMITS = KadLimits(author_records=5, provider_keys=5, providers=3, questions_per_s=100)


class Stranger:
    """A member that speaks the protocol by hand, to the first node of the town."""

    def __init__(self, town, mesh):
        self.mesh = mesh
        self.victim, self.kad = town.nodes[0]

    async def ask(self, message):
        """The answer; raises `StreamReset` where there is none."""
        stream = await self.mesh.open_stream(self.victim.peer_id, KAD_PROTOCOL)
        await stream.send(message if isinstance(message, bytes) else write(message), end=True)
        data = b""
        while (cut := varint.split_prefixed(data, 1 << 20)) is None:
            piece = await stream.receive_some()
            if not piece:
                raise StreamReset("no answer")
            data += piece
        return read(cut[0], LIMITS)

    def record(self, name="n", sequence=1, expires=60.0, value=b"v", author=None):
        """A record whose author is this peer, or is said to be another one."""
        wall = self.mesh.wall()
        raw_name = name_of(author or self.mesh.peer_id, name, LIMITS)
        return seal(self.mesh.peer_id, raw_name, (sequence, wall + expires, value), self.mesh.sign)

    async def put(self, record):
        """What the victim holds after it."""
        return (await self.ask(Message(Kind.PUT_VALUE, record.name, record.raw))).record


@pytest.fixture
def attack(town):
    """`attack(scenario)`: run `scenario(stranger)` against a node of a town of six."""

    def run(scenario):
        async def main(town):
            mesh = town.world.add("stranger")
            await mesh.connect(town.nodes[0][0].listen_addrs)
            await scenario(Stranger(town, mesh))

        town(main, nodes=6, limits=LIMITS)

    return run


def test_a_good_record_is_kept_and_an_older_one_does_not_replace_it(attack):
    async def scenario(stranger):
        new, old = stranger.record(sequence=2), stranger.record(sequence=1)
        assert await stranger.put(new) == new.raw
        assert await stranger.put(old) == new.raw
        assert (await stranger.ask(Message(Kind.GET_VALUE, new.name))).record == new.raw

    attack(scenario)


def test_poisoned_records_are_refused_and_counted_by_reason(attack):
    async def scenario(stranger):
        forged = stranger.record(author=stranger.victim.peer_id)
        assert await stranger.put(forged) is None
        assert await stranger.put(stranger.record(expires=-1)) is None
        assert await stranger.put(stranger.record(expires=LIMITS.life_s + LIMITS.skew_s + 60)) is None
        assert await stranger.put(stranger.record(value=bytes(LIMITS.value_bytes + 1))) is None
        answer = await stranger.ask(Message(Kind.PUT_VALUE, b"/other/name", b"x"))
        assert answer.record is None
        counts = stranger.kad.counts
        for reason in ("signature", "expired", "future", "size", "name"):
            assert counts[f"refused_{reason}"] == 1, reason
        assert len(stranger.kad.answerer.records) == 0

    attack(scenario)


def test_an_author_has_a_quota(attack):
    async def scenario(stranger):
        kept = [await stranger.put(stranger.record(name=f"n{n}")) for n in range(20)]
        assert sum(raw is not None for raw in kept) == len(stranger.kad.answerer.records) == 5
        assert stranger.kad.counts["refused_quota"] == 15

    attack(scenario)


def test_a_flood_of_provider_records_is_bounded(attack):
    async def scenario(stranger):
        own = Contact(stranger.mesh.peer_id, (b"a",))
        for number in range(30):
            await stranger.ask(Message(Kind.ADD_PROVIDER, b"key %d" % number, providers=(own,)))
            await trio.sleep(0.05)
        assert len(stranger.kad.answerer.providers) == 5
        assert stranger.kad.counts["refused_provider_quota"] == 25

    attack(scenario)


def test_nobody_says_for_another_what_it_provides(attack, contact):
    async def scenario(stranger):
        answer = await stranger.ask(Message(Kind.ADD_PROVIDER, b"key", providers=(contact(1), contact(2))))
        assert answer.providers == ()
        assert stranger.kad.counts["refused_provider_other"] == 2
        assert len(stranger.kad.answerer.providers) == 0

    attack(scenario)


def test_who_asks_too_much_is_not_answered_for_a_while(attack):
    async def scenario(stranger):
        answered = refused = 0
        for _ in range(3):
            stream = await stranger.mesh.open_stream(stranger.victim.peer_id, KAD_PROTOCOL)
            await stream.send(write(Message(Kind.PING)) * 200, end=True)
            try:
                while piece := await stream.receive_some():
                    answered += len(piece) // len(write(Message(Kind.PING)))
            except StreamReset:
                refused += 1
        assert refused == 3
        assert answered < 60
        assert stranger.kad.counts["refused_flood"] == 3
        await trio.sleep(2)
        assert (await stranger.ask(Message(Kind.PING))).kind is Kind.PING

    attack(scenario)


@pytest.mark.parametrize(
    "garbage", [b"\x05hello", b"\xff" * 12, varint.encode(1 << 30), varint.prefixed(b"\x08\x09")]
)
def test_garbage_resets_its_stream_and_nothing_else(attack, garbage):
    async def scenario(stranger):
        with pytest.raises(StreamReset):
            await stranger.ask(garbage)
        assert stranger.kad.counts["refused_message"] == 1
        assert (await stranger.ask(Message(Kind.PING))).kind is Kind.PING
        assert stranger.victim.handler_errors == 0

    attack(scenario)


def test_strangers_are_not_answered(town):
    async def scenario(town):
        outsider = town.world.add("outsider", access=Access.STRANGER)
        await outsider.connect(town.nodes[0][0].listen_addrs)
        with pytest.raises(Refused):
            await Stranger(town, outsider).ask(Message(Kind.PING))

    town(scenario, nodes=2)


def test_peers_that_name_only_peers_that_do_not_exist_do_not_keep_a_record_from_its_reader(town, contact):
    """Every sixth node lies: whatever is asked, it knows twenty peers right beside the key."""

    async def scenario(town):
        author, kad = town.nodes[0]
        await kad.put("name", b"value")
        wanted = kad.own_record("name").name
        fakes = tuple(contact(number) for number in range(1000, 1020))
        liars = town.nodes[5::6]
        for _, liar in liars:
            liar.answerer.answer = lambda asker, question, wall, now: Message(
                question.kind, question.name, b"poison", fakes
            )
        honest = [pair for pair in town.nodes if pair not in liars]
        for _, reader in honest[1:]:
            found = await reader.get(author.peer_id, "name")
            assert found.record.value == b"value"
        assert found.record.name == wanted

    town(scenario, nodes=24)
