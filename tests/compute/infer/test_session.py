"""A stage's side of a session, sentence by sentence."""

from __future__ import annotations

from typing import Any

import pytest

from mycel.compute.engine import Done, Sampled, Sampling, Span
from mycel.compute.infer.log import Memory
from mycel.compute.infer.messages import (
    CreditFrame,
    NoticeFrame,
    Open,
    Resume,
    StepFrame,
    TokenFrame,
)
from mycel.compute.infer.session import Send, StageSession
from mycel.protocol.errors import Refused
from mycel.protocol.mesh import PeerId
from mycel.protocol.tensor import Tensor

OWNER, PREV, NEXT, OTHER = (PeerId(name) for name in ("owner", "prev", "next", "other"))


def opened(epoch: int = 1, span: Span = Span(1, 2), **changes: Any) -> Open:
    start = Resume("s", epoch, credit=100) if epoch == 1 else None
    fields: dict[str, Any] = {"next_addrs": (), "sampling": Sampling(), "start": start, "next": NEXT}
    return Open("s", epoch, "f", span, 3, PREV, **(fields | changes))


def stage(span: Span = Span(1, 2), memory: Memory | None = None, **changes: Any) -> StageSession:
    session = StageSession(OWNER, opened(span=span, **changes), memory or Memory(10**6), 0.0)
    session.on_open(session.opened, 0.0)
    assert session.opened.start is not None
    session.on_resume(session.opened.start, 0.0)
    return session


def hidden(position: int, count: int) -> Tensor:
    return Tensor(
        "uint8", (count, 2), bytes(b for row in range(position, position + count) for b in (row, 1))
    )


def rows(position: int, count: int = 1, epoch: int = 1) -> StepFrame:
    return StepFrame("s", epoch, position, count, None, hidden(position, count))


def step(session: StageSession, rows_max: int = 512) -> list[Send]:
    """One step of the engine."""
    work = session.take(rows_max)
    count = len(work.tokens) if work.tokens is not None else work.hidden.shape[0]  # type: ignore[union-attr]
    if work.sampling is not None:
        done = Done(work.session, work.position, sampled=Sampled(work.position + count, 0.0, (), 1.0))
    else:
        done = Done(work.session, work.position, hidden=hidden(work.position, count))
    return session.on_done(work, count, done, 1.0)


def notices(sends: list[Send]) -> list[tuple[PeerId, str]]:
    return [(send.peer, send.frame.kind) for send in sends if isinstance(send.frame, NoticeFrame)]


def positions(sends: list[Send]) -> list[tuple[int, int]]:
    return [(s.frame.position, s.frame.count) for s in sends if isinstance(s.frame, StepFrame)]


def test_rows_go_through_in_order_and_on_to_the_next() -> None:
    session = stage()
    assert session.on_step(PREV, rows(0, 3), 0.0) == []
    assert session.can_step
    [send] = step(session)
    assert send.peer == NEXT
    assert isinstance(send.frame, StepFrame)
    assert (send.frame.position, send.frame.count) == (0, 3)
    assert not session.can_step


def test_rows_that_came_before_are_dropped_and_counted() -> None:
    session = stage()
    session.on_step(PREV, rows(0, 3), 0.0)
    step(session)
    assert session.on_step(PREV, rows(0, 3), 0.0) == []
    assert session.on_step(PREV, rows(1, 1), 0.0) == []
    assert not session.can_step
    assert (session.accepted, session.counters.rows_duplicate) == (3, 4)


def test_of_rows_that_partly_came_before_the_rest_is_taken() -> None:
    session = stage()
    session.on_step(PREV, rows(0, 3), 0.0)
    step(session)
    session.on_step(PREV, rows(1, 4), 0.0)
    work = session.take(512)
    assert work.position == 3
    assert work.hidden is not None
    assert bytes(work.hidden.data) == bytes([3, 1, 4, 1])
    assert session.counters.rows_duplicate == 2


def test_a_gap_is_told_once_and_holds_the_output() -> None:
    session = stage()
    session.on_step(PREV, rows(0), 0.0)
    assert notices(session.on_step(PREV, rows(2), 0.0)) == [(OWNER, "gap")]
    assert session.on_step(PREV, rows(3), 0.0) == []
    assert step(session) == []  # computed and logged, not sent
    session.on_open(opened(2), 0.0)
    assert positions(session.on_resume(Resume("s", 2, keep=1, next_have=0), 0.0)) == [(0, 1)]


@pytest.mark.parametrize("epoch", [0, 2])
def test_frames_of_another_epoch_are_dropped(epoch: int) -> None:
    session = stage()
    assert session.on_step(PREV, rows(0, epoch=epoch), 0.0) == []
    assert session.accepted == 0
    assert session.counters.frames_stale == 1


def test_only_the_ring_and_the_owner_may_send() -> None:
    session = stage()
    session.on_step(OTHER, rows(0), 0.0)
    assert session.accepted == 0
    first = stage(Span(0, 1))
    first.on_token(OTHER, TokenFrame("s", 1, 0, Sampled(7, 0.0, (), 1.0)), 0.0)
    assert first.accepted == 0
    first.on_step(OWNER, StepFrame("s", 1, 0, 1, (7,)), 0.0)
    assert first.accepted == 1


def test_tokens_and_hidden_states_go_to_the_stages_that_take_them() -> None:
    middle, first = stage(), stage(Span(0, 1))
    middle.on_step(PREV, StepFrame("s", 1, 0, 1, (7,)), 0.0)
    middle.on_token(PREV, TokenFrame("s", 1, 0, Sampled(7, 0.0, (), 1.0)), 0.0)
    first.on_step(PREV, rows(0), 0.0)
    assert middle.accepted == first.accepted == 0


def test_credit_holds_the_first_stage_and_lets_it_go() -> None:
    session = stage(Span(0, 1), start=Resume("s", 1, credit=2))
    session.on_step(OWNER, StepFrame("s", 1, 0, 2, (7, 8)), 0.0)
    step(session)
    session.on_token(PREV, TokenFrame("s", 1, 2, Sampled(9, 0.0, (), 1.0)), 0.0)
    assert not session.can_step
    assert session.status(0.0).state == "held"
    session.on_credit(CreditFrame("s", 0, 10))  # of an older epoch
    assert not session.can_step
    session.on_credit(CreditFrame("s", 1, 3))
    assert session.can_step


def test_the_last_stage_draws_and_tells_first_and_owner() -> None:
    session = stage(Span(1, 3), start=Resume("s", 1, sample_from=2))
    session.on_step(PREV, rows(0, 2), 0.0)
    assert step(session) == []  # rows below 2 draw nothing
    session.on_step(PREV, rows(2), 0.0)
    sends = step(session)
    assert [send.peer for send in sends] == [NEXT, OWNER]
    assert {send.frame.position for send in sends if isinstance(send.frame, TokenFrame)} == {3}


def test_a_first_stage_that_is_the_owners_is_told_once() -> None:
    session = stage(Span(1, 3), next=OWNER)
    session.on_step(PREV, rows(0), 0.0)
    assert [send.peer for send in step(session)] == [OWNER]


def test_penalised_sampling_gets_every_token_it_has_not_had() -> None:
    sampling = Sampling(repetition_penalty=1.2)
    session = stage(Span(1, 3), sampling=sampling, start=Resume("s", 1, sample_from=1, context=(4, 5)))
    session.on_step(PREV, rows(0, 2), 0.0)
    work = session.take(512)
    assert work.context == (4, 5)
    session.on_done(work, 2, Done(work.session, 0, sampled=Sampled(6, 0.0, (), 1.0)), 0.0)
    session.on_step(PREV, rows(2), 0.0)
    assert session.take(512).context == (6,)


def test_open_tells_what_is_there_and_resume_sends_what_lacks() -> None:
    session = stage()
    session.on_step(PREV, rows(0, 2), 0.0)
    step(session)
    session.on_step(PREV, rows(2), 0.0)
    step(session)
    session.on_step(PREV, rows(3), 0.0)
    work = session.take(512)
    session.on_step(PREV, rows(4), 0.0)
    reply = session.on_open(opened(2, next=OTHER), 0.0)
    assert (reply.accepted, reply.started, reply.log_start) == (5, 4, 0)
    # The step that was in the engine ends: logged, not yet sent.
    assert session.on_done(work, 1, Done(work.session, 3, hidden=hidden(3, 1)), 0.0) == []
    sends = session.on_resume(Resume("s", 2, keep=5, next_have=2), 0.0)
    assert {send.peer for send in sends} == {OTHER}
    assert positions(sends) == [(2, 1), (3, 1)]
    assert session.counters.rows_resent == 2
    assert positions(step(session)) == [(4, 1)]
    assert session.counters.rows_computed == 5


def test_rows_under_a_new_epoch_wait_for_the_resume_and_are_not_cut_by_it() -> None:
    session = stage()
    session.on_step(PREV, rows(0, 2), 0.0)
    session.on_open(opened(2), 0.0)
    session.on_step(PREV, rows(2, epoch=2), 0.0)
    assert session.accepted == 2
    session.on_resume(Resume("s", 2, keep=2, next_have=0), 0.0)
    assert session.accepted == 3


def test_rows_nobody_knows_the_token_of_are_cut() -> None:
    session = stage()
    session.on_step(PREV, rows(0, 2), 0.0)
    session.on_step(PREV, rows(2, 2), 0.0)
    session.on_open(opened(2), 0.0)
    session.on_resume(Resume("s", 2, keep=3), 0.0)
    assert session.accepted == 3
    step(session)
    assert positions(step(session)) == [(2, 1)]


def test_what_the_engine_began_cannot_be_cut() -> None:
    session = stage()
    session.on_step(PREV, rows(0, 2), 0.0)
    step(session)
    session.on_open(opened(2), 0.0)
    with pytest.raises(Refused) as refused:
        session.on_resume(Resume("s", 2, keep=1), 0.0)
    assert refused.value.reason == "unkept"


def test_starting_afresh_drops_a_late_result_and_names_the_old_cache() -> None:
    session = stage()
    session.on_step(PREV, rows(0, 2), 0.0)
    work = session.take(512)
    session.on_open(opened(2), 0.0)
    session.on_resume(Resume("s", 2, keep=0), 0.0)
    assert session.abandoned == [work.session]
    assert session.on_done(work, 2, Done(work.session, 0, hidden=hidden(0, 2)), 0.0) == []
    assert (session.accepted, session.computed) == (0, 0)
    session.on_step(PREV, rows(0, 2, epoch=2), 0.0)
    assert session.take(512).session != work.session


def test_another_span_starts_afresh() -> None:
    session = stage()
    session.on_step(PREV, rows(0, 2), 0.0)
    assert session.on_open(opened(2, Span(0, 2)), 0.0).accepted == 0


def test_older_epochs_are_refused() -> None:
    session = stage()
    session.on_open(opened(3), 0.0)
    for call in (
        lambda: session.on_open(opened(2), 0.0),
        lambda: session.on_resume(Resume("s", 2), 0.0),
        lambda: session.on_resume(Resume("s", 4), 0.0),
    ):
        with pytest.raises(Refused) as refused:
            call()
        assert refused.value.reason == "stale"


def test_a_lost_link_holds_and_tells_the_owner() -> None:
    session = stage()
    assert session.on_link_lost(OTHER, "link", "") == []
    assert notices(session.on_link_lost(NEXT, "link", "")) == [(OWNER, "link")]
    assert session.on_link_lost(NEXT, "link", "") == []
    assert notices(session.on_link_lost(NEXT, "unreachable", "")) == [(OWNER, "unreachable")]
    session.on_step(PREV, rows(0), 0.0)
    assert step(session) == []


def test_a_lost_way_to_the_owner_is_told_to_nobody() -> None:
    session = stage(Span(1, 3))
    assert session.on_link_lost(OWNER, "unreachable", "") == []
    assert not session.flowing


def test_a_failed_step_tells_the_owner_and_the_next_open_starts_afresh() -> None:
    session = stage()
    session.on_step(PREV, rows(0), 0.0)
    work = session.take(512)
    sends = session.on_done(work, 1, Done(work.session, 0, error="full: no cache memory"), 0.0)
    assert notices(sends) == [(OWNER, "error")]
    session.on_step(PREV, rows(1), 0.0)
    assert not session.can_step
    assert session.on_open(opened(2), 0.0).accepted == 0


def test_a_chunked_replay_joins_what_waits_below_the_border() -> None:
    session = stage(start=Resume("s", 1, merge_below=4))
    for position in range(6):
        session.on_step(PREV, rows(position), 0.0)
    assert positions(step(session, rows_max=3)) == [(0, 3)]
    assert positions(step(session)) == [(3, 1)]
    assert positions(step(session)) == [(4, 1)]


def test_the_oldest_log_goes_first_and_says_so() -> None:
    memory = Memory(8)
    old, new = stage(memory=memory), stage(memory=memory)
    for session in (old, new):
        for position in range(3):
            session.on_step(PREV, rows(position), 0.0)
            step(session)
    assert old.on_open(opened(2), 0.0).log_start == 3
    assert new.on_open(opened(2), 0.0).log_start == 0
    assert memory.nbytes <= 8
    with pytest.raises(Refused) as refused:
        old.on_resume(Resume("s", 2, keep=3, next_have=1), 0.0)
    assert refused.value.reason == "unkept"


def test_waiting_bytes_are_accounted_until_computed_or_dropped() -> None:
    memory = Memory(10**6)
    session = stage(memory=memory)
    session.on_step(PREV, rows(0, 3), 0.0)
    session.on_step(PREV, rows(3, 2), 0.0)
    assert memory.waiting_bytes == 10
    step(session)
    assert memory.waiting_bytes == 4
    session.on_open(opened(2), 0.0)
    session.on_step(PREV, rows(5, 1, epoch=2), 0.0)
    assert memory.waiting_bytes == 6
    session.on_resume(Resume("s", 2, keep=4), 0.0)
    assert memory.waiting_bytes == 2  # row 3; row 5 no longer follows
    session.close()
    assert memory.waiting_bytes == memory.nbytes == 0
