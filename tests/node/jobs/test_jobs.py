"""Jobs in a swarm: their coordinators change, fail and are stopped; what is forged is refused by name."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import trio

from mycel.node.jobs.lease import Lease, Vote
from mycel.node.jobs.record import JOB, STATE, key_of
from mycel.node.jobs.runner import JobFailed
from mycel.node.jobs.service import ArtefactUnknown, JobUnknown
from mycel.node.jobs.spec import Body, Envelope, encode_body, id_of, signed_bytes
from mycel.node.jobs.submit import choose_electors, packed
from mycel.node.jobs.views import ContentAsk, LogsAsk
from mycel.node.jobs.voting import ASK, HOLD, NOTE, Ask, Hold, Note
from mycel.node.jobs.work import Work
from mycel.protocol.board import Fact
from mycel.protocol.errors import ConnectionLost, Refused, RemoteError, RemoteProtocolError, UsageProblem
from mycel.protocol.limits_doc import DEFAULT_DOCUMENT_LIMITS
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS
from mycel.protocol.mesh import Access

PROMPTS = {"prompts": b'"x"\n'}


async def ended(s, node, job) -> str:
    await s.until(lambda: node.view(job).is_ended)
    return node.view(job).phase


async def test_members_take_part_and_see_progress_until_the_job_ends(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        nodes = await s.grow(6)
        job = (await nodes[0].jobs.submit(generate_spec, PROMPTS)).id
        await s.until(lambda: nodes[5].view(job).step == 10)
        assert [node.runner.taking_part for node in nodes] == [1] * 6
        assert nodes[5].view(job).metrics == {"square": 100.0}
        assert await ended(s, nodes[5], job) == "done"
        await trio.sleep(1)
        assert [node.runner.taking_part for node in nodes] == [0] * 6
        counted = [node.runner.counted for node in nodes if node.runner.counted]
        assert counted == [list(range(1, 21))], "one coordinator, and it counted once"
        assert await nodes[4].result(job, "numbers.txt") == b"".join(b"%d\n" % n for n in range(1, 21))
        with pytest.raises(ArtefactUnknown, match=r"numbers\.txt"):
            await nodes[4].result(job, "letters.txt")
        with pytest.raises(JobUnknown, match="mycel jobs"):
            nodes[4].view("none")
        assert nodes[4].view("night").id == nodes[4].view(job[:5]).id == job


async def test_a_coordinator_that_is_cut_off_stops_before_another_goes_on_and_its_old_words_count_nothing(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        nodes = await s.grow(3)
        job = (await nodes[2].jobs.submit(generate_spec, PROMPTS)).id
        await s.until(lambda: nodes[2].view(job).step >= 5)
        first = s.coordinator(job)
        others = [node for node in nodes if node is not first]
        old = first.jobs.book.get(job).lease
        s.world.cut([first.mesh], [node.mesh for node in others])
        await s.until(lambda: s.coordinator(job) is None)
        counted = list(first.runner.counted)
        await s.until(lambda: s.coordinator(job) in others)
        second = s.coordinator(job)
        await s.until(lambda: others[0].view(job).step >= 12)
        assert first.runner.counted == counted, "without a majority it did nothing more"
        s.world.heal()
        assert await ended(s, first, job) == "done"
        assert first.view(job).coordinator == second.peer
        assert second.runner.counted[-1] == 20
        assert second.runner.counted[0] <= counted[-1] + 1, "none was left out"
        assert first.view(job).epoch > old.epoch
        late = replace_state(first, job, lease=old, phase="failed", number=999)
        nodes[2].jobs._take(late)
        assert (nodes[2].view(job).phase, nodes[2].view(job).coordinator) == ("done", second.peer)


def replace_state(node, job, **changes):
    """What `node` knows, changed, as its own word."""
    state = msgspec.structs.replace(node.jobs.book.get(job).state, **changes)
    return Fact(node.peer, key_of(job, STATE), msgspec.msgpack.encode(state))


async def test_orders_of_a_lost_lease_are_refused(swarm, autojump_clock, counting, generate_spec):
    async with swarm(counting) as s:
        nodes = await s.grow(3)
        job = (await nodes[2].jobs.submit(generate_spec, PROMPTS)).id
        await s.until(lambda: nodes[2].view(job).step >= 3)
        first = s.coordinator(job)
        others = [node for node in nodes if node is not first]
        old = first.jobs.book.get(job).lease
        gate = others[0].jobs.gate
        assert gate.check(first.peer, old).id == job
        forged = Lease(job, old.epoch + 5, first.peer, old.votes)
        stolen = msgspec.structs.replace(old, holder=others[1].peer)
        unknown = msgspec.structs.replace(old, job="f" * 32)
        for peer, lease, reason in (
            (others[1].peer, old, "unproven"),
            (first.peer, forged, "unproven"),
            (others[1].peer, stolen, "unproven"),
            (first.peer, Lease(job, old.epoch, first.peer, (old.votes[0], old.votes[0])), "unproven"),
            (first.peer, unknown, "unknown-job"),
        ):
            with pytest.raises(Refused) as refused:
                gate.check(peer, lease)
            assert refused.value.reason == reason
        first.kill()
        await s.until(lambda: s.coordinator(job) is not None)
        await s.until(lambda: others[0].jobs.book.get(job).lease.epoch > old.epoch)
        with pytest.raises(Refused) as refused:
            gate.check(first.peer, old)
        assert refused.value.reason == "stale-epoch"
        await ended(s, others[0], job)
        with pytest.raises(Refused) as refused:
            gate.check(others[1].peer, others[0].jobs.book.get(job).lease)
        assert refused.value.reason == "ended"


async def test_forged_foreign_oversized_and_unproven_words_are_refused_by_name_while_other_jobs_go_on(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        nodes = await s.grow(4)
        evil, good = nodes[3], nodes[1]
        job = (await nodes[0].jobs.submit(generate_spec, PROMPTS)).id
        await s.until(lambda: good.view(job).step >= 2)
        envelope = msgspec.msgpack.decode(good.jobs.book.get(job).envelope, type=Envelope)
        stranger = s.world.add("stranger", swarm="other")
        body = msgspec.msgpack.decode(envelope.body, type=Body)

        def job_of(signer, **changes):
            data = encode_body(msgspec.structs.replace(body, **changes))
            return id_of(data), packed(Envelope(data, signer.sign(signed_bytes(data)), b""))

        state = good.jobs.book.get(job).state
        lying = msgspec.structs.replace(
            state, lease=Lease(job, 99, evil.peer, state.lease.votes), phase="done"
        )
        own = msgspec.structs.replace(
            state, phase="failed",
            lease=Lease(job, 99, evil.peer, (Vote(evil.peer, evil.mesh.sign(b"me")),) * 3),
        )  # fmt: skip
        as_other, by_stranger = (
            job_of(evil.mesh, nonce=b"forgery!"),
            job_of(stranger, submitter=stranger.peer_id),
        )
        unknown_keys = job_of(evil.mesh, submitter=evil.peer, spec=msgspec.msgpack.encode({"do": "evil"}))
        evil.documents.write(
            {
                key_of(as_other[0], JOB): as_other[1],
                key_of(by_stranger[0], JOB): by_stranger[1],
                key_of(unknown_keys[0], JOB): unknown_keys[1],
                key_of("e" * 32, JOB): packed(envelope),
                key_of("d" * 32, JOB): b"x" * 16000,
                key_of(job, STATE): msgspec.msgpack.encode(lying),
                key_of(job, "stop"): good.jobs.book.get(job).envelope,
                "jobs/": b"",
            }
        )
        await s.until(lambda: sum(good.jobs.book.refused.values()) >= 8)
        evil.documents.write({key_of(job, STATE): msgspec.msgpack.encode(own)})
        with pytest.raises(Refused, match="its submitter") as refused:
            await evil.jobs.stop(job)
        assert refused.value.reason == "foreign"
        assert await ended(s, good, job) == "done"
        assert good.jobs.book.refused == {
            "forged": 2, "foreign": 1, "malformed": 2, "oversized": 1, "unproven": 2, "unknown-key": 1,
        }  # fmt: skip
        assert [view.id for view in good.jobs.views().jobs] == [job]
        assert {one.author for one in good.jobs.views().refused} == {evil.peer}


async def test_a_job_that_fails_fails_aloud_and_one_that_breaks_is_tried_again(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        nodes = await s.grow(3)
        tried: list[int] = []

        def once(number: int) -> None:
            if number == 5 and not tried:
                tried.append(number)
                raise ConnectionLost("oh")

        troubles = {
            "for good": lambda number: fail(JobFailed("the data is no data")),
            "always": lambda number: fail(RemoteProtocolError("odd bytes")) if number == 3 else None,
            "bug": lambda number: [][number] if number == 3 else None,
            "once": once,
        }
        for name, trouble in troubles.items():
            for node in nodes:
                node.runner.before = trouble
            spec = msgspec.structs.replace(generate_spec, name=name)
            job = (await nodes[0].jobs.submit(spec, PROMPTS)).id
            phase = await ended(s, nodes[2], job)
            view = nodes[2].view(job)
            if name == "once":
                assert (phase, view.failures, view.text) == ("done", 0, "")
            else:
                assert phase == "failed"
                assert {"for good": "no data", "always": "odd bytes", "bug": "IndexError"}[name] in view.text
                assert view.failures == (1 if name == "for good" else DEFAULT_JOB_LIMITS.tries)


def fail(error: Exception) -> None:
    raise error


async def test_a_coordinator_whose_disk_fails_gives_way_to_another(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        nodes = await s.grow(3)
        job = (await nodes[0].jobs.submit(generate_spec, PROMPTS)).id
        await s.until(lambda: nodes[0].view(job).step >= 3)
        first = s.coordinator(job)
        first.disk.documents.save = lambda *args, **options: fail(UsageProblem("no space left"))
        assert await ended(s, nodes[0], job) == "done"
        assert nodes[0].view(job).coordinator != first.peer
        assert first.jobs.views().jobs[0].id == job, "it lives on"


async def test_a_stopped_job_stops_everywhere_and_others_go_on(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        nodes = await s.grow(4)
        jobs = [(await nodes[0].jobs.submit(generate_spec, PROMPTS)).id for _ in range(2)]
        await s.until(lambda: nodes[3].view(jobs[0]).step >= 3)
        assert (await nodes[0].jobs.stop(jobs[0])).phase in ("stopping", "stopped")
        assert await ended(s, nodes[3], jobs[0]) == "stopped"
        await trio.sleep(0.5)
        assert [node.runner.taking_part for node in nodes] == [1] * 4
        assert await ended(s, nodes[3], jobs[1]) == "done"
        assert nodes[3].view(jobs[0]).step < 20


async def test_whoever_may_only_submit_hands_a_job_to_members_and_may_leave(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        nodes = await s.grow(3)
        (asker,) = await s.grow(1, access=Access.SUBMIT)
        job = (await asker.jobs.submit(generate_spec, PROMPTS)).id
        asker.kill()
        await s.until(lambda: all(node.view(job).step >= 3 for node in nodes))
        for node in nodes:
            node.kill()
        for node in nodes:
            await node.restart()
        assert await ended(s, nodes[1], job) == "done"


async def test_whoever_may_only_submit_sees_its_own_jobs_through_a_member(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        nodes = await s.grow(3)
        (asker,) = await s.grow(1, access=Access.SUBMIT)
        window = asker.jobs.window
        await nodes[0].jobs.submit(msgspec.structs.replace(generate_spec, name="theirs"), PROMPTS)
        job = (await asker.jobs.submit(generate_spec, PROMPTS)).id
        lines = [line.text async for line in window.lines(LogsAsk("night", follow=True))]
        assert [lines[0], lines[-1]] == ["n0 coordinates, epoch 1", "done"]
        assert [one.id for one in (await window.views()).jobs] == [job]
        assert (await window.view("night")).phase == "done"
        content = b"".join([piece async for piece in window.content(ContentAsk("night", "numbers.txt"))])
        assert content == await nodes[1].result(job, "numbers.txt")
        with pytest.raises(RemoteError, match="no job 'theirs' of yours"):
            [piece async for piece in window.content(ContentAsk("theirs", "numbers.txt"))]
        assert await nodes[2].jobs.window.views() == nodes[2].jobs.views()


async def test_a_node_that_leaves_gives_its_lease_back_at_once(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        nodes = await s.grow(3)
        job = (await nodes[2].jobs.submit(generate_spec, PROMPTS)).id
        await s.until(lambda: nodes[2].view(job).step >= 3)
        first = s.coordinator(job)
        await first.jobs.leave()
        left_at = trio.current_time()
        first.kill()
        await s.until(lambda: s.coordinator(job) is not None)
        assert trio.current_time() - left_at < DEFAULT_JOB_LIMITS.lease_s + 1.0


async def test_long_logs_are_read_in_whole_from_any_peer_also_after_a_restart(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        nodes = await s.grow(3)
        job = (await nodes[0].jobs.submit(generate_spec, PROMPTS)).id
        await s.until(lambda: nodes[1].view(job).step >= 1)
        desk = nodes[1].jobs._tools.desk
        for number in range(300):
            desk.log(job, f"line {number} \x1b[31m" + "." * 60)
            await trio.sleep(0.02)
        await ended(s, nodes[2], job)
        await trio.sleep(1)  # what was not written within half a second would die with it
        nodes[1].kill()
        await nodes[1].restart()
        nodes[1].jobs._tools.desk.log(job, "one more")
        lines = [line async for line in nodes[2].jobs.lines(job, follow=True) if line.peer == nodes[1].peer]
        own = [line for line in lines if "coordinates" not in line.text and line.text not in ("done",)]
        assert [line.text.split(" ")[1] for line in own] == [*map(str, range(300)), "more"]
        assert [line.number for line in lines] == list(range(len(lines)))
        assert all(line.text.isprintable() for line in lines)
        keys = nodes[1].documents.read(f"jobs/{job}/")
        assert all(len(fact.value) < 2 * DEFAULT_JOB_LIMITS.log_bytes for fact in keys)


async def test_traces_of_jobs_that_ended_long_ago_go_with_their_blocks(
    swarm, autojump_clock, counting, generate_spec
):
    limits = replace(DEFAULT_JOB_LIMITS, kept=2)
    async with swarm(counting, limits) as s:
        nodes = await s.grow(3)
        jobs = []
        for _ in range(4):
            jobs.append((await nodes[0].jobs.submit(generate_spec, PROMPTS)).id)
            for node in nodes:
                await ended(s, node, jobs[-1])
        await s.until(lambda: all(len(node.jobs.views().jobs) == 2 for node in nodes))
        assert [view.id for view in nodes[2].jobs.views().jobs] == jobs[2:]
        for node in nodes:
            pinned = {name.split("/")[1] for name in node.disk.blocks.pins()}
            assert pinned <= {*jobs[2:]}
            assert {fact.key.split("/")[1] for fact in node.documents.read("jobs/")} == {*jobs[2:]}
        assert sum(len(node.runner.counted) for node in nodes) == 4 * 20


async def test_an_elector_that_was_away_when_a_job_ended_and_was_forgotten_does_not_bring_it_back(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        nodes = await s.grow(3)
        job = (await nodes[0].jobs.submit(generate_spec, PROMPTS)).id
        await s.until(lambda: nodes[2].view(job).step >= 3)
        away = next(node for node in nodes if node is not s.coordinator(job) and node is not nodes[0])
        there = [node for node in nodes if node is not away]
        away.kill()
        assert await ended(s, there[0], job) == "done"
        await s.until(lambda: there[0].jobs.book.get(job).ender is not None)
        ender = next(node for node in there if node.peer == there[0].jobs.book.get(job).ender)
        await s.until(lambda: len(there[0].jobs.book.get(job).carriers) == 2)
        ender.jobs._tools.desk.forget(job)  # as it does when it has ended many others since
        await trio.sleep(2)
        assert sum(len(node.runner.counted) for node in nodes) == 20
        for node in there:
            node.kill()
        for node in nodes:
            await node.restart()
        assert away.jobs.book.get(job) is not None, "it still says so"
        await s.until(lambda: all(node.jobs.book.get(job) is None for node in nodes))
        await trio.sleep(10)
        assert [node.runner.counted for node in nodes] == [[], [], []]


async def test_a_full_document_lets_go_of_ended_jobs_before_it_refuses_new_ones(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        s.documents = replace(DEFAULT_DOCUMENT_LIMITS, content_bytes=4 << 10)
        nodes = await s.grow(3)
        for _ in range(6):
            job = (await nodes[0].jobs.submit(generate_spec, PROMPTS)).id
            assert await ended(s, nodes[2], job) == "done"
        desks = [node.jobs._tools.desk for node in nodes]
        assert [desk.lost for desk in desks] == [0, 0, 0]
        assert 1 <= len(nodes[1].jobs.views().jobs) < 6, "there was no room for all"
        assert sum(len(node.runner.counted) for node in nodes) == 6 * 20, "none was done again"
        assert nodes[1].view(job).phase == "done"


async def test_electors_are_an_odd_number_of_those_who_have_been_there_longest(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        (alone,) = await s.grow(1)
        assert choose_electors(alone.mesh, is_member=True) == [alone.peer]
        with pytest.raises(UsageProblem, match="mycel peers"):
            choose_electors(alone.mesh, is_member=False)
        await s.grow(1)
        assert choose_electors(alone.mesh, is_member=True) == [alone.peer]
        await s.grow(1)
        assert choose_electors(alone.mesh, is_member=True)[-1] == alone.peer
        await s.grow(1)
        electors = choose_electors(alone.mesh, is_member=True)
        assert (len(electors), alone.peer in electors) == (3, False)
        await s.grow(3)
        electors = choose_electors(alone.mesh, is_member=True)
        since = [alone.mesh.peers[peer].since for peer in electors]
        assert (len(electors), since) == (5, sorted(since))


def job_of(node, job):
    return node.jobs.book.get(job).job


def holding_of(node, job):
    return node.jobs._attended[job].holding


async def test_words_of_an_epoch_that_is_over_are_refused_by_electors(
    swarm, autojump_clock, counting, generate_spec
):
    async with swarm(counting) as s:
        nodes = await s.grow(3)
        job = (await nodes[2].jobs.submit(generate_spec, PROMPTS)).id
        await s.until(lambda: nodes[2].view(job).step >= 3)
        first = s.coordinator(job)
        state = first.jobs.book.get(job).state
        elector, other = (node for node in nodes if node is not first)
        note = Note(job, msgspec.msgpack.encode(msgspec.structs.replace(state, number=10**6)))
        hold = Hold(state.lease, "checkpoint", [])

        async def tell(method, ask, by=first):
            try:
                await by.rpc.call(elector.peer, method, ask, deadline_s=5)
            except Refused as refused:
                return refused.reason
            return "done"

        assert [await tell(NOTE, note), await tell(HOLD, hold)] == ["done", "done"]
        assert await tell(HOLD, hold, other) == "unproven"
        assert await tell(NOTE, note, other) == "unproven"
        work = Work(first.jobs._tools, first.jobs.book.get(job), job_of(first, job), holding_of(first, job))
        s.world.silence(first.mesh)
        await s.until(lambda: s.coordinator(job) is other or s.coordinator(job) is elector)
        await s.until(lambda: elector.view(job).epoch > state.lease.epoch)
        with pytest.raises(Refused, match=r"lease .* is over"):
            await work.publish()
        s.world.unsilence(first.mesh)
        await s.until(lambda: elector.peer in first.mesh.peers)
        assert [await tell(NOTE, note), await tell(HOLD, hold)] == ["stale-epoch", "stale-epoch"]
        assert await ended(s, first, job) == "done"
        assert await tell(HOLD, hold) == "ended"
        with pytest.raises(Refused) as refused:
            await first.rpc.call(elector.peer, ASK, Ask("f" * 32, 1), deadline_s=5)
        assert refused.value.reason == "unknown-job"
