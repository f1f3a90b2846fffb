"""What a group makes of lies: of peers outside, of members, and of what was true once."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mycel.compute.collective.epoch import (
    Accept,
    Accepted,
    Arrive,
    Epoch,
    Hello,
    Member,
    Message,
    News,
    Outbid,
    Place,
    Prepare,
    Promise,
    Report,
    Suspect,
    Terms,
    Verdict,
    Vote,
    place_of,
)
from mycel.compute.collective.policy import Policy
from mycel.protocol.mesh import PeerId


def members_of(bottle: Any, script: Any, count: int = 3) -> list[Any]:
    script.play(f"""
        start {" ".join("abcde"[:count])}
        run 3
        together {" ".join("abcde"[:count])}
    """)
    return [bottle.nodes[PeerId(name)] for name in "abcde"[:count]]


def test_outsiders_cannot_vote_propose_or_announce_an_epoch(bottle_of: Any, script_of: Any) -> None:
    bottle = bottle_of(Policy())
    script = script_of(bottle)
    a, *_ = members_of(bottle, script)
    epoch, place = a.core.epoch, place_of(a.core.epoch)
    mine = Epoch(epoch.number + 1, place.lineage, (Member(PeerId("z"), 1),))
    longer = Epoch(epoch.number + 9, bytes(8), (Member(PeerId("y"), 1),))
    bottle.run(0.3)
    a.core.take()
    for lie in (
        Prepare(place, (99, PeerId("z"))),
        Accept(place, (99, PeerId("z")), mine),
        Vote(place, Verdict("x", 0, "refused", "z says so")),
        Arrive(place, "x", 0, Terms("barrier")),
        News((longer,)),
        News((Epoch(epoch.number + 9, bytes(8), (Member(PeerId("z"), 1),)),)),
        News((mine,)),
    ):
        a.core.receive(bottle.now, PeerId("z"), lie)
        assert a.core.take() == []
    assert a.core.epoch is epoch
    script.play("""
        call x a b c
        run 1
        ended x kept a b c
    """)


def test_members_lies_about_numbers_and_ballots_change_nothing(bottle_of: Any, script_of: Any) -> None:
    bottle = bottle_of(Policy())
    script = script_of(bottle)
    a, b, _ = members_of(bottle, script)
    epoch, place = a.core.epoch, place_of(a.core.epoch)
    skipping = Epoch(epoch.number + 2, place.lineage, epoch.members)
    elsewhere = Epoch(epoch.number + 1, bytes(8), epoch.members)
    twice = Epoch(epoch.number + 1, place.lineage, epoch.members + epoch.members[:1])
    for lie in (
        Prepare(place, (99, PeerId("c"))),  # in another's name
        Accept(place, (99, b.name), skipping),
        Accept(place, (99, b.name), elsewhere),
        Accept(place, (99, b.name), twice),
        Vote(place, Verdict("x", 7, "kept")),
        Arrive(place, "x", 7, Terms("barrier")),
        Arrive(Place(place.number, place.size, bytes(8)), "x", 0, Terms("barrier")),
    ):
        a.core.receive(bottle.now, b.name, lie)
        bottle.act(a)
    bottle.run(3)
    assert a.core.epoch == epoch
    script.play("""
        call x a b c
        run 1
        ended x kept a b c
    """)


def test_old_news_brings_nobody_back_who_was_left_out(bottle_of: Any, script_of: Any) -> None:
    bottle = bottle_of(Policy())
    a, _, c = members_of(bottle, script_of(bottle))
    before = c.core.epoch
    bottle.part(["c"])
    bottle.run(3)
    c.core.receive(bottle.now, a.name, News((a.core.epoch,)))  # it hears that it is out, and nothing else
    bottle.act(c)
    assert c.core.epoch is None
    c.core.receive(bottle.now, a.name, News((before,)))
    bottle.act(c)
    assert c.core.epoch is None


def any_words(chance: random.Random, epoch: Epoch, liar: str) -> Message:
    """Something that can be said in a group, with numbers, names and places that are sometimes true."""
    place = place_of(epoch)
    names = [PeerId(name) for name in ("", "a", "b", "c", "d", "z", liar)]

    def number() -> int:
        return chance.choice([0, 1, epoch.number, epoch.number + 1, epoch.number + 2, (1 << 62) - 1])

    def lineage() -> bytes:
        return chance.choice([place.lineage, epoch.parent, bytes(8)])

    def somewhere() -> Place:
        return chance.choice([place, place, Place(number(), chance.choice([0, 3, 256]), lineage())])

    def members() -> tuple[Member, ...]:
        strange = Member(chance.choice(names), number())
        return tuple(chance.choice([*epoch.members, strange]) for _ in range(chance.choice([1, 2, 3, 5])))

    def verdict() -> Verdict:
        return Verdict(chance.choice(["x", "y"]), number(), chance.choice(["kept", "refused"]), "so it is")

    def some_epoch() -> Epoch:
        verdicts = tuple(verdict() for _ in range(chance.choice([0, 0, 1, 3])))
        return chance.choice([epoch, Epoch(number(), lineage(), members(), verdicts)])

    def ballot() -> tuple[int, PeerId]:
        return (number(), chance.choice(names))

    def report() -> Report:
        return Report("x", number(), chance.choice([None, verdict()]), chance.choice([None, verdict()]))

    terms = Terms(
        chance.choice(["all_reduce", "border", "broadcast"]), "float32", number(), "avg", "", names[-1]
    )
    say: list[Any] = [
        lambda: Arrive(somewhere(), "x", number(), terms),
        lambda: Vote(somewhere(), verdict()),
        lambda: Suspect(somewhere(), chance.choice(names), "it is odd"),
        lambda: Prepare(somewhere(), ballot()),
        lambda: Promise(
            somewhere(), ballot(), chance.choice([None, (ballot(), some_epoch())]), (report(), report()),
            tuple(names[:3]),
        ),
        lambda: Outbid(somewhere(), ballot()),
        lambda: Accept(somewhere(), ballot(), some_epoch()),
        lambda: Accepted(somewhere(), ballot()),
        lambda: News(tuple(some_epoch() for _ in range(chance.choice([1, 2])))),
        lambda: Hello(
            number(), chance.choice([None, somewhere()]), chance.random() < 0.5, chance.random() < 0.5, True,
            tuple(names),
        ),
    ]  # fmt: skip
    words: Message = chance.choice(say)()
    return words


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
@pytest.mark.parametrize("liar", ["c", "z"])
def test_no_words_make_a_member_fall_over_and_a_strangers_change_nothing(
    bottle_of: Any, script_of: Any, liar: str, seed: int
) -> None:
    bottle, chance = bottle_of(Policy()), random.Random(seed)
    script = script_of(bottle)
    a, b, _ = members_of(bottle, script)
    if liar == "z":
        for node in (a, b):
            node.core.up(bottle.now, PeerId("z"))
            bottle.act(node)
    epoch = a.core.epoch
    for node in [chance.choice([a, b]) for _ in range(60)]:
        node.core.receive(bottle.now, PeerId(liar), any_words(chance, epoch, liar))
        bottle.now += chance.choice([0.0, 0.0, 0.3])
        if bottle.now >= node.core.next_at:
            node.core.tick(bottle.now)
        if liar == "z":
            bottle.act(node)
        else:
            node.core.take()
    if liar == "z":
        for node in (a, b):
            node.core.down(bottle.now, PeerId("z"))
        script.play("""
            run 5
            call x a b c
            run 5
            ended x kept a b c
        """)
        assert {member.peer for member in a.core.epoch.members} == {"a", "b", "c"}
