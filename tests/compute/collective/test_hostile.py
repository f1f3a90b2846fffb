"""What a group makes of lies: of peers outside, of members, and of what was true once."""

from __future__ import annotations

from typing import Any

from mycel.compute.collective.epoch import (
    Accept,
    Arrive,
    Epoch,
    Member,
    News,
    Place,
    Prepare,
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
