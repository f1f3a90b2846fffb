"""What a library takes in, refuses, and gives out; and that nodes agree whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mycel.dht.doc.document import Document
from mycel.dht.doc.library import Library
from mycel.dht.doc.message import NOWHERE, Head, Missing, Part, Vector, Version, head_bytes, next_digest
from mycel.dht.doc.store import VolatileStore
from mycel.dht.doc.terms import Taken
from mycel.protocol.board import Fact
from mycel.protocol.errors import LimitExceeded
from mycel.protocol.limits_doc import DocumentLimits

SMALL = DocumentLimits(log_bytes=200, content_bytes=2048, document_bytes=6144, value_bytes=1024)
Signers = Callable[[int], Any]


def anybody(author: str, chain: bytes) -> bool:
    return True


def library_of(signer: Any, store: VolatileStore | None = None, limits: DocumentLimits = SMALL) -> Library:
    library = fresh_library_of(signer, store, limits)
    library.on_compared()
    return library


def fresh_library_of(
    signer: Any, store: VolatileStore | None = None, limits: DocumentLimits = SMALL
) -> Library:
    """One that has not compared yet."""
    return Library(signer, store or VolatileStore(), anybody, limits=limits)


def whole_of(library: Library, signer: Any) -> Part:
    (part,) = library.since(signer.peer_id, NOWHERE)
    return part


def catch_up(reader: Library, source: Library) -> Missing:
    """One exchange: what `reader` lacks of `source`."""
    buckets = source.vector.differing(reader.vector.digests)
    return source.missing(Vector(buckets, dict(reader.vector.of(buckets))))


def test_an_update_is_taken_once_and_read_in_order(signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    ra, rb = library_of(a), library_of(b)
    ra.write({"model/x": b"1", "job/y": b"2"})
    rb.write({"model/x": b"3"})
    part = whole_of(ra, a)
    assert rb.take(part) is Taken.NEWS
    assert rb.take(part) is Taken.KNOWN
    both = sorted(
        [Fact(a.peer_id, "model/x", b"1"), Fact(b.peer_id, "model/x", b"3")], key=lambda f: f.author
    )
    assert rb.read("model/") == both
    assert [fact.key for fact in rb.read("")] == ["job/y", "model/x", "model/x"]


def test_updates_in_between_are_missed_and_asked_for(signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    ra, rb = library_of(a), library_of(b)
    ra.write({"k": b"1"})
    rb.take(whole_of(ra, a))
    behind = rb.version(a.peer_id)
    missed = ra.write({"k": b"2"})
    assert missed is not None
    between = ra.write({"l": b"3"})
    assert between is not None
    (tail,) = ra.since(a.peer_id, between)
    assert rb.take(tail) is Taken.GAP
    (tail,) = ra.since(a.peer_id, behind)
    assert (tail.start, len(tail.updates), tail.snapshot) == (1, 2, None)
    assert rb.take(tail) is Taken.NEWS
    assert rb.read("") == [Fact(a.peer_id, "k", b"2"), Fact(a.peer_id, "l", b"3")]


def test_overlapping_updates_are_taken_from_where_they_are_new(signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    ra, rb = library_of(a), library_of(b)
    first = ra.write({"k": b"1"})
    assert first == NOWHERE
    start = ra.version(a.peer_id)
    rb.take(whole_of(ra, a))
    ra.write({"k": b"2"})
    rb.take(ra.since(a.peer_id, start)[0])
    ra.write({"k": b"3"})
    assert rb.take(ra.since(a.peer_id, start)[0]) is Taken.NEWS
    assert rb.read("") == [Fact(a.peer_id, "k", b"3")]


def test_compaction_needs_no_bytes_where_everything_is_known(signer_of: Signers) -> None:
    a, b, c = signer_of(1), signer_of(2), signer_of(3)
    ra, rb, rc = library_of(a), library_of(b), library_of(c)
    for n in range(3):
        ra.write({f"k{n}": b"v"})
    rb.take(whole_of(ra, a))
    at_end = rb.version(a.peer_id)
    ra.write({"k0": None})
    ra.compact()
    tail, bare = ra.since(a.peer_id, at_end)
    assert (bare.size, bare.snapshot) == (0, None)
    assert [rb.take(tail), rb.take(bare)] == [Taken.NEWS, Taken.NEWS]
    assert rc.take(bare) is Taken.GAP
    rc.take(whole_of(rb, a))
    assert whole_of(ra, a) == whole_of(rb, a) == whole_of(rc, a)
    assert [fact.key for fact in rc.read("")] == ["k1", "k2"]


def test_size_follows_what_is_live(signer_of: Signers) -> None:
    a = signer_of(1)
    ra = library_of(a)
    for n in range(2000):
        ra.write({f"k{n % 5}": b"%d" % n})
    for n in range(4):
        ra.write({f"k{n}": None})
    ra.compact()
    assert ra.read("") == [Fact(a.peer_id, "k4", b"1999")]
    assert ra.size < 40


def forgeries(part: Part, other: Any) -> dict[str, tuple[Part, str]]:
    """Changed parts, each with the reason for which it is refused."""
    head = part.head
    later = msgspec.structs.replace(head, sequence=head.sequence + 1)
    by_other = msgspec.structs.replace(head, signature=other.sign(head.signed_bytes()))
    swapped = msgspec.structs.replace(head, author=other.peer_id)
    changed = (part.updates[0].replace(b"value", b"VALUE"), *part.updates[1:])
    return {
        "later": (msgspec.structs.replace(part, head=later), "forged"),
        "signed by another": (msgspec.structs.replace(part, head=by_other), "forged"),
        "of another": (msgspec.structs.replace(part, head=swapped), "forged"),
        "changed update": (msgspec.structs.replace(part, updates=changed), "forged"),
        "left out": (msgspec.structs.replace(part, updates=part.updates[:-1]), "forged"),
        "added": (msgspec.structs.replace(part, updates=(*part.updates, part.updates[-1])), "forged"),
        "empty update": (msgspec.structs.replace(part, updates=(*part.updates, b"")), "malformed"),
        "other snapshot": (msgspec.structs.replace(part, snapshot=b"x"), "forged"),
        "edition too far": (
            msgspec.structs.replace(part, head=msgspec.structs.replace(head, edition=1 << 63)),
            "malformed",
        ),
        "oversized": (msgspec.structs.replace(part, snapshot=b"x" * 10_000), "oversized"),
        "chain too long": (msgspec.structs.replace(part, chain=b"x" * 10_000), "oversized"),
    }


def test_what_does_not_hold_is_refused_and_counted(signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    ra = library_of(a)
    ra.write({"k": b"value"})
    ra.write({"k": b"value two"})
    for name, (part, reason) in forgeries(whole_of(ra, a), b).items():
        rb = library_of(signer_of(3))
        assert rb.take(part) is Taken.REFUSED, name
        assert rb.refused == {reason: 1}, name
        assert (rb.read(""), rb.size, rb.version(a.peer_id)) == ([], 0, NOWHERE), name
        assert rb.take(whole_of(ra, a)) is Taken.NEWS, name  # and the true one still gets in


def test_signed_nonsense_changes_nothing(signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    ra, rb = library_of(a), library_of(b)
    ra.write({"k": b"1"})
    rb.take(whole_of(ra, a))
    document = Document.of(whole_of(ra, a))
    digest = next_digest(document.head.digest, [b"nonsense"])
    at = Version(document.head.edition, 2)
    head = Head(a.peer_id, *at, digest, a.sign(head_bytes(a.peer_id, at, digest)))
    assert rb.take(Part(head, 1, None, (b"nonsense",))) is Taken.REFUSED
    assert rb.refused == {"malformed": 1}
    ra.write({"k": b"2"})
    assert rb.take(ra.since(a.peer_id, rb.version(a.peer_id))[0]) is Taken.NEWS
    assert rb.read("") == [Fact(a.peer_id, "k", b"2")]


def test_who_may_not_write_here_is_refused(signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    ra = Library(a, VolatileStore(), anybody, chain=b"let in", limits=SMALL)
    ra.on_compared()
    stranger = library_of(signer_of(3))
    rb = Library(b, VolatileStore(), lambda author, chain: chain == b"let in", limits=SMALL)
    ra.write({"k": b"1"})
    stranger.write({"k": b"2"})
    assert rb.take(whole_of(stranger, signer_of(3))) is Taken.UNWANTED
    assert rb.take(whole_of(ra, a)) is Taken.NEWS
    assert rb.refused == {"foreign": 1}
    ra.write({"k": b"3"})
    assert rb.take(ra.since(a.peer_id, rb.version(a.peer_id))[0]) is Taken.NEWS


def test_a_new_chain_travels_with_a_new_edition(signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    store = VolatileStore()
    valid = [b"old"]
    ra = Library(a, store, anybody, chain=b"old", limits=SMALL)
    ra.on_compared()
    rb = Library(b, VolatileStore(), lambda author, chain: chain in valid, limits=SMALL)
    ra.write({"k": b"1"})
    rb.take(whole_of(ra, a))
    valid[:] = [b"new"]
    ra = Library(a, store, anybody, chain=b"new", limits=SMALL)
    ra.on_compared()
    ra.write({"k": b"2"})
    assert [rb.take(part) for part in ra.since(a.peer_id, rb.version(a.peer_id))] == [Taken.NEWS]
    assert rb.read("") == [Fact(a.peer_id, "k", b"2")]


def test_authors_and_bytes_are_bounded(signer_of: Signers) -> None:
    writers = [signer_of(n) for n in range(1, 5)]
    parts = []
    for signer in writers:
        library = library_of(signer)
        library.write({"k": b"v" * 100})
        parts.append(whole_of(library, signer))
    few = library_of(signer_of(9), limits=replace(SMALL, authors=2))
    assert [few.take(part) for part in parts] == [Taken.NEWS] * 2 + [Taken.UNWANTED] * 2
    tight = library_of(signer_of(9), limits=replace(SMALL, total_bytes=300))
    assert [tight.take(part) for part in parts] == [Taken.NEWS] * 2 + [Taken.UNWANTED] * 2
    assert few.refused == tight.refused == {"full": 2}
    assert tight.size <= 300


def test_an_own_write_out_of_bounds_changes_nothing(signer_of: Signers) -> None:
    a = signer_of(1)
    ra = library_of(a)
    ra.write({"k": b"1"})
    at = ra.version(a.peer_id)
    for changes in (
        {"": b"1"},
        {"k" * 300: b"1"},
        {"k": b"1" * 2000},
        {f"k{n}": b"1" * 900 for n in range(3)},
    ):
        with pytest.raises(LimitExceeded, match=r"documents\."):
            ra.write(changes)
    assert ra.write({"absent": None}) is None
    assert ra.version(a.peer_id) == at
    ra.write({"k": b"2"})
    assert Document.of(whole_of(ra, a)).live == {"k": b"2"}


def test_an_old_disk_takes_over_what_others_have(signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    backup, rb = VolatileStore(), library_of(b)
    ra = library_of(a, backup)
    ra.write({"k": b"1", "l": b"1"})
    old = VolatileStore()
    old.save(whole_of(ra, a), None, durable=True)
    ra.write({"k": b"2"})
    ra.write({"l": b"2"})
    rb.take(whole_of(ra, a))
    restored = fresh_library_of(a, old)
    restored.write({"l": b"3"})
    assert restored.take(whole_of(rb, a)) is Taken.NEWS
    assert [fact.value for fact in restored.read("")] == [b"2", b"3"]
    for part in restored.since(a.peer_id, rb.version(a.peer_id)):
        assert rb.take(part) is Taken.NEWS
    assert rb.read("") == restored.read("")


def test_a_lost_disk_comes_back_from_others(signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    ra, rb = library_of(a), library_of(b)
    ra.write({"k": b"1"})
    rb.take(whole_of(ra, a))
    fresh = library_of(a)
    assert [fresh.take(part) for part in catch_up(fresh, rb).parts] == [Taken.NEWS]
    fresh.write({"l": b"2"})
    assert rb.take(fresh.since(a.peer_id, rb.version(a.peer_id))[0]) is Taken.NEWS
    assert [fact.value for fact in rb.read("")] == [b"1", b"2"]


@pytest.mark.parametrize("restarts", [False, True])
def test_who_writes_before_it_compared_keeps_what_others_had(signer_of: Signers, restarts: bool) -> None:
    a, b = signer_of(1), signer_of(2)
    first, rb = library_of(a), library_of(b)
    first.write({"jobs/1": b"old", "member": b"old"})
    rb.take(whole_of(first, a))
    store = VolatileStore()
    second = fresh_library_of(a, store)  # the disk was lost
    for n in range(300):  # over several compactions
        second.write({"member": b"%d" % n})
    assert second.since(a.peer_id, NOWHERE) == []  # nobody hears of it
    if restarts:
        second = fresh_library_of(a, store)
    assert [second.take(part) for part in rb.since(a.peer_id, NOWHERE)] == [Taken.NEWS]
    second.on_compared()
    assert [fact.value for fact in second.read("")] == [b"old", b"299"]
    assert rb.take(whole_of(second, a)) is Taken.NEWS
    assert rb.read("") == second.read("")


def test_a_provisional_document_becomes_a_proper_one(signer_of: Signers) -> None:
    a = signer_of(1)
    ra = fresh_library_of(a)
    empty = ra.vector.digests
    ra.write({"k": b"1"})
    assert (ra.version(a.peer_id).edition, ra.vector.digests) == (1, empty)
    ra.on_compared()
    assert ra.vector.digests != empty
    assert ra.version(a.peer_id) == Version(int(a.wall() * 1000), 0)


def test_whose_membership_ended_leaves_the_library(signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    valid, store, told = {a.peer_id}, VolatileStore(), list[Fact]()
    ra, rb = library_of(a), Library(b, store, lambda author, chain: author in valid, limits=SMALL)
    rb.on_changes = told.extend
    empty = rb.vector.digests
    ra.write({"k": b"1"})
    assert rb.take(whole_of(ra, a)) is Taken.NEWS
    valid.clear()
    rb.forget(a.peer_id)
    assert (rb.read(""), rb.size, rb.authors, rb.vector.digests, store.load()) == ([], 0, [], empty, [])
    assert told == [Fact(a.peer_id, "k", b"1"), Fact(a.peer_id, "k", None)]
    assert rb.take(whole_of(ra, a)) is Taken.UNWANTED


def test_editions_from_the_future_are_refused_and_not_kept_up(signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    ra, rb = library_of(a), library_of(b)
    right = a.now
    a.now += 10 * 86400
    ra.write({"k": b"1"})
    assert rb.take(whole_of(ra, a)) is Taken.UNWANTED
    assert rb.refused == {"skewed": 1}
    a.now = right  # the clock is set right
    ra.write({"k": b"2"})
    ra.compact()
    assert rb.take(whole_of(ra, a)) is Taken.NEWS


def test_two_documents_for_one_version_are_counted_and_the_next_settles_them(signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    one, two, rb = library_of(a), library_of(a), library_of(b)
    one.write({"k": b"1"})
    two.write({"k": b"2"})
    rb.take(whole_of(one, a))
    assert rb.take(whole_of(two, a)) is Taken.KNOWN
    assert rb.refused == {"forked": 1}
    other = msgspec.structs.replace(whole_of(two, a).head, digest=bytes(32))
    assert rb.take(Part(other, 0, b"", ())) is Taken.REFUSED
    assert rb.refused == {"forked": 1, "forged": 1}
    two.write({"l": b"3"})
    assert rb.take(two.since(a.peer_id, rb.version(a.peer_id))[0]) is Taken.GAP
    assert rb.take(whole_of(two, a)) is Taken.NEWS
    assert rb.read("") == two.read("")


def test_a_newcomer_gets_as_much_as_fits_at_a_time(signer_of: Signers) -> None:
    source = library_of(signer_of(9), limits=replace(SMALL, reply_bytes=300))
    for n in range(1, 7):
        library = library_of(signer_of(n))
        library.write({"k": b"v" * 100})
        source.take(whole_of(library, signer_of(n)))
    newcomer = library_of(signer_of(8))
    rounds = 0
    while not (reply := catch_up(newcomer, source)).is_all or reply.parts:
        assert sum(part.size for part in reply.parts) <= 300
        assert all(newcomer.take(part) is Taken.NEWS for part in reply.parts)
        rounds += 1
    assert rounds == 3
    assert newcomer.read("") == source.read("")
    assert source.vector.differing(newcomer.vector.digests) == []


@dataclass
class Swarm:
    """Libraries and the parts under way between them, for hypothesis to play with."""

    signers: list[Any]
    stores: list[VolatileStore]
    libraries: list[Library]
    under_way: list[tuple[int, Part]]
    written: list[dict[str, bytes]]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 2), st.integers(0, 3), st.none() | st.binary(max_size=60)),
        st.tuples(st.just("arrive"), st.integers(0, 50), st.booleans(), st.none()),
        st.tuples(st.just("lose"), st.integers(0, 50), st.none(), st.none()),
        st.tuples(st.just("restart"), st.integers(0, 2), st.none(), st.none()),
        st.tuples(st.just("compare"), st.integers(0, 2), st.integers(0, 2), st.none()),
        st.tuples(st.just("compact"), st.integers(0, 2), st.none(), st.none()),
    ),
    max_size=60,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120)
@given(steps)
def test_nodes_agree_after_losses_duplicates_reordering_and_restarts(
    signer_of: Signers, script: list[tuple[str, Any, Any, Any]]
) -> None:
    signers = [signer_of(n) for n in (1, 2, 3)]
    stores = [VolatileStore() for _ in signers]
    pairs = zip(signers, stores, strict=True)
    swarm = Swarm(signers, stores, [library_of(*pair) for pair in pairs], [], [{}, {}, {}])
    for name, one, two, three in script:
        play(swarm, name, one, two, three)
    for _ in range(3):  # the partition heals: everybody compares with everybody
        for reader in swarm.libraries:
            for source in swarm.libraries:
                for part in catch_up(reader, source).parts:
                    assert reader.take(part) is not Taken.REFUSED
    wholes = [[whole_of(library, signer) for signer in signers if library.version(signer.peer_id) > NOWHERE]
              for library in swarm.libraries]  # fmt: skip
    assert wholes[0] == wholes[1] == wholes[2]  # byte for byte
    for signer, written in zip(signers, swarm.written, strict=True):
        found = {
            fact.key: fact.value for fact in swarm.libraries[0].read("") if fact.author == signer.peer_id
        }
        assert found == written
    assert all(library.refused == {} for library in swarm.libraries)


def play(swarm: Swarm, name: str, one: Any, two: Any, three: Any) -> None:
    """One step of a script."""
    if name == "write":
        key = f"k{two}"
        before = swarm.libraries[one].write({key: three})
        if three is None:
            swarm.written[one].pop(key, None)
        else:
            swarm.written[one][key] = three
        if before is not None:
            parts = swarm.libraries[one].since(swarm.signers[one].peer_id, before)
            swarm.under_way += [(to, part) for part in parts for to in range(3) if to != one]
    elif name in ("arrive", "lose") and swarm.under_way:
        to, part = swarm.under_way[one % len(swarm.under_way)]
        if name == "arrive":
            swarm.libraries[to].take(part)
        if not two:
            del swarm.under_way[one % len(swarm.under_way)]
    elif name == "restart":
        swarm.libraries[one] = library_of(swarm.signers[one], swarm.stores[one])
    elif name == "compare":
        for part in catch_up(swarm.libraries[one], swarm.libraries[two]).parts:
            swarm.libraries[one].take(part)
    elif name == "compact":
        swarm.libraries[one].compact()
