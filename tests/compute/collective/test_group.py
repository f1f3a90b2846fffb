"""Membership by script: who starts, dies, is cut off and comes back, and what its calls come to.

A script has one step a line; indented words are names of peers:

    start a b c            processes start and want in; the first named may begin the group
    call x a b             they call an all-reduce of tag x (barrier..., border... are called so)
    call x/7 a             ...of 7 items
    run 2                  two seconds pass
    kill a / hush a / part a b / heal / leave a / hold / move a x / break a x b / give_up a x
    epoch 3 a b c          these are in one epoch, of this number, and it has no other members
    out a                  it is outside
    ended x kept a b       their latest call of x ended so
    open x a               its call has not ended
"""

from __future__ import annotations

from typing import Any

import pytest

from mycel.compute.collective.policy import Policy

SCRIPTS = {
    "the lowest of those who wait begins, the others come in": """
        start c b a
        run 3
        together a b c
        call x a b
        run 1
        open x a b
        call x c
        run 1
        ended x kept a b c
    """,
    "who may not begin a group waits for one": """
        follow b
        run 5
        out b
        start a
        run 3
        together a b
    """,
    "a member that dies before its vote costs an epoch, and the survivors are done": """
        start a b c
        run 3
        hold
        call x a b c
        run 0.1
        move x a
        kill c
        run 0.4
        together a b
        open x a b
        move x a b
        run 0.1
        ended x kept a b
    """,
    "what all survivors hold is kept, with what the dead one gave": """
        start a b c
        run 3
        hold
        call x a b c
        run 0.1
        move x a b
        kill c
        run 0.4
        together a b
        ended x kept a b
    """,
    "who dies after it gave its voice for the next epoch is not waited for in it": """
        start a b c
        run 3
        cut b c          # they are given time to connect
        run 0.1
        kill c
        run 0.1
        together a b
    """,
    "who is back while the next epoch is made is asked for it again at once": """
        start a b c
        run 3
        cut a c
        run 0.1
        heal
        run 0.2
        epoch 3 a b c
    """,
    "a member that falls silent is waited for a quarter of a second more": """
        start a b c
        run 3
        hold
        call x a b c
        run 0.1
        hush c
        run 0.2
        epoch 2 a b c
        run 0.1
        together a b
        move x a b
        run 0.1
        ended x kept a b
    """,
    "a member that dies after all have voted takes nothing with it": """
        start a b c
        run 3
        hold
        call x a b c
        run 0.1
        move x a b c     # c's vote is on its way
        run 0.02
        ended x kept a b c
        kill c
        run 1
        together a b
    """,
    "what one member saw kept is kept by all": """
        start a b c d e
        run 3
        hold
        call x a b c d e
        run 0.1
        move x a b c d e
        part a           # all have voted, nobody heard of all votes; a hears of nothing any more
        run 2
        together b c d e
        ended x kept b c d e
        open x a
        heal
        run 3
        together a b c d e
    """,
    "a minority goes on with nothing": """
        start a b c d e
        run 3
        part d e
        call x a b c
        call x d e
        run 3
        together a b c
        ended x kept a b c
        open x d e
        heal
        run 3
        together a b c d e
    """,
    "of three proposers that die one after the other the fourth gets through": """
        start a b c d e f g
        run 3
        kill g
        kill a
        run 0.01
        kill b
        run 3
        together c d e f
    """,
    "another tensor under the same tag fails on all, and the next call works": """
        start a b c
        run 3
        call x a b
        call x/9 c
        run 1
        ended x refused a b c
        call x a b c
        run 1
        ended x kept a b c
    """,
    "who gives up fails the operation for all, also for those who come later": """
        start a b c
        run 3
        call x a b
        run 1
        give_up a x
        run 1
        open x a b
        call x c
        run 1
        ended x refused a b c
        call x a b c
        run 1
        ended x kept a b c
    """,
    "who gives up when others hold the result already makes it an epoch's business": """
        start a b c
        run 3
        hold
        call x a b c
        run 0.1
        move x b c
        give_up a x
        run 2
        ended x refused a b c
        together a b c
    """,
    "an attempt that breaks is tried again, and nobody who answers is left out": """
        start a b c
        run 3
        hold
        call x a b c
        run 0.1
        break a x c
        run 0.4
        together a b c
        move x a b c
        run 0.1
        ended x kept a b c
    """,
    "two that cannot reach each other do not stay together, the younger goes": """
        start a
        run 2
        start b
        run 1
        start c
        run 1
        cut b c
        run 2
        together a b
    """,
    "operations of several tags do not wait for each other": """
        start a b
        run 3
        hold
        call x a b
        call y b a
        run 0.1
        move y a b
        run 0.1
        ended y kept a b
        open x a b
        move x a b
        run 0.1
        ended x kept a b
    """,
    "a newcomer does not come in while something moves": """
        start a b
        run 3
        hold
        call x a b
        run 0.1
        start c
        run 2
        out c
        move x a b
        run 1
        ended x kept a b
        together a b c
    """,
    "a newcomer that dies under admission costs an epoch": """
        start a b
        run 3
        start c
        run 0.115        # proposed with it
        kill c
        run 3
        together a b
        call x a b
        run 1
        ended x kept a b
    """,
    "who leaves in order is missed at once": """
        start a b c
        run 3
        call x a b
        run 1
        leave c
        run 0.1
        together a b
        run 1
        ended x kept a b
    """,
    "a process that starts again is somebody else": """
        start a b c
        run 3
        kill c
        start c
        run 3
        together a b c
        call x a b c
        run 1
        ended x kept a b c
    """,
}

ANY = {
    "down to one and back": """
        start a b c
        run 3
        call x a b c
        kill b
        kill c
        run 2
        epoch 3 a
        call y a
        run 1
        ended y kept a
        start b c
        run 3
        together a b c
        call y a b c
        run 1
        ended y kept a b c
    """,
    "of two parts that meet again the longer lineage goes on": """
        start a b c d
        run 3
        part a
        run 2
        together b c d
        kill d
        run 2
        together b c
        call x a
        run 1
        ended x kept a
        heal
        run 3
        together a b c
        call y a b c
        run 1
        ended y kept a b c
    """,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_membership_by_majority(bottle_of: Any, script_of: Any, name: str) -> None:
    script_of(bottle_of(Policy())).play(SCRIPTS[name])


@pytest.mark.parametrize("name", ANY)
def test_membership_of_whoever_is_there(bottle_of: Any, script_of: Any, name: str) -> None:
    script_of(bottle_of(Policy(quorum="any"))).play(ANY[name])


def test_newcomers_come_in_at_borders_only_where_that_is_agreed(bottle_of: Any, script_of: Any) -> None:
    script_of(bottle_of(Policy(admits="border"))).play("""
        start a
        run 2
        start b
        run 1
        out b
        call border a
        run 1
        open border a        # it has let b in, and waits for it there
        together a b
        call border b
        run 1
        ended border kept a b
        start c
        run 2
        out c
        call x a b
        run 1
        ended x kept a b
        call border a b
        run 1
        together a b c
        call border c
        run 1
        ended border kept a b c
    """)


def test_until_enough_were_there_newcomers_need_no_border(bottle_of: Any, script_of: Any) -> None:
    script_of(bottle_of(Policy("any", "border", least=2))).play("""
        start a
        run 2
        call x a
        run 1
        start b
        run 1
        together a b
        call x b
        run 1
        ended x kept a b
        start c
        run 2
        out c               # now there is somewhere to come in
        kill b
        run 3
        call border a
        run 1
        together a c
    """)


def test_a_part_that_is_no_majority_says_what_it_waits_for(bottle_of: Any, script_of: Any) -> None:
    bottle = bottle_of(Policy())
    script_of(bottle).play("""
        start a b
        run 3
        kill b
        call x a
        run 5
        open x a
    """)
    assert bottle.nodes["a"].core.waits_for == "1 of 2 members answer; majority is needed"


def test_too_few_members_begin_nothing(bottle_of: Any, script_of: Any) -> None:
    script_of(bottle_of(Policy(least=2))).play("""
        start a
        run 2
        call x a
        run 2
        open x a
        start b
        run 2
        call x b
        run 1
        ended x kept a b
    """)
