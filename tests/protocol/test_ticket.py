"""Tickets: one string there and back, and a typo never gets through."""

from __future__ import annotations

import json
from pathlib import Path

import base58
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiaddr import Multiaddr

from mycel.protocol.chain import sign_certificate, verify_chain
from mycel.protocol.errors import Refused
from mycel.protocol.identity import SigningKey
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access
from mycel.protocol.ticket import (
    BOOTSTRAP_MAX,
    PREFIX,
    TEXT_CHARS_MAX,
    Ticket,
    TicketError,
    check_ticket,
    describe,
    issue_ticket,
    parse_ticket,
)

NOW = 1_800_000_000
ROOT = SigningKey(bytes([1]) * 32)
PEER_ID = OwnKey(bytes([4]) * 32).peer_id
ADDR = Multiaddr(f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER_ID}")
ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def a_ticket(**changes: object) -> Ticket:
    options: dict[str, object] = {
        "access": Access.MEMBER, "now": NOW, "entropy": lambda n: bytes([3]) * n, "life_s": 3600.0,
        "label": "lab", "bootstrap": [ADDR],
    }  # fmt: skip
    options |= changes
    bootstrap: list[Multiaddr] = options.pop("bootstrap")  # type: ignore[assignment]
    return issue_ticket(ROOT, **options).with_bootstrap(bootstrap)  # type: ignore[arg-type]


TEXT = a_ticket().text()


def pack(link: object, seed: bytes, addrs: list[bytes]) -> str:
    """A ticket's text around any body, with a checksum that fits."""
    from mycel.protocol.ticket import _checksum

    body = msgspec.msgpack.encode([link, seed, addrs])
    return PREFIX + base58.b58encode(body + _checksum(body)).decode()


def test_ticket_there_and_back() -> None:
    ticket = parse_ticket(TEXT)
    assert ticket.text() == TEXT
    assert ticket.root == ROOT.public
    assert ticket.access is Access.MEMBER
    assert ticket.bootstrap == (ADDR,)
    chain = ticket.chain_for(PEER_ID)
    assert verify_chain(chain, PEER_ID, ROOT.public, NOW).label == "lab"


def test_ticket_of_two_machines_makes_each_its_own_chain() -> None:
    other = OwnKey(bytes([9]) * 32).peer_id
    ticket = parse_ticket(TEXT)
    for peer in (PEER_ID, other):
        assert verify_chain(ticket.chain_for(peer), peer, ROOT.public, NOW).access is Access.MEMBER


@given(
    label=st.text(st.characters(categories=["L", "N", "P"]), max_size=64),
    access=st.sampled_from([Access.SUBMIT, Access.MEMBER, Access.ADMIN]),
    life_s=st.floats(1, 10**9),
    ports=st.lists(st.integers(1, 65535), max_size=BOOTSTRAP_MAX),
)
def test_any_ticket_survives_its_text(label: str, access: Access, life_s: float, ports: list[int]) -> None:
    addrs = tuple(Multiaddr(f"/dns4/host.example/tcp/{port}") for port in ports)
    ticket = a_ticket(label=label, access=access, life_s=life_s, bootstrap=addrs)
    again = parse_ticket(ticket.text())
    assert again.certificate == ticket.certificate
    assert again.bootstrap == addrs
    assert again.delegation.seed == ticket.delegation.seed


@given(at=st.integers(len(PREFIX), len(TEXT) - 1), char=st.sampled_from(ALPHABET))
def test_every_mistyped_character_is_noticed(at: int, char: str) -> None:
    typo = TEXT[:at] + char + TEXT[at + 1 :]
    if typo == TEXT:
        return
    with pytest.raises(TicketError, match="mistyped or cut off"):
        parse_ticket(typo)


@given(st.data())
def test_every_swap_of_neighbours_is_noticed(data: st.DataObject) -> None:
    at = data.draw(st.integers(len(PREFIX), len(TEXT) - 2))
    swapped = TEXT[:at] + TEXT[at + 1] + TEXT[at] + TEXT[at + 2 :]
    if swapped != TEXT:
        with pytest.raises(TicketError, match="mistyped"):
            parse_ticket(swapped)


@given(cut=st.integers(0, len(TEXT) - 1))
def test_every_cut_ticket_is_noticed(cut: int) -> None:
    with pytest.raises(TicketError):
        parse_ticket(TEXT[:cut])


@given(text=st.text(max_size=300))
def test_any_text_is_refused_with_a_word(text: str) -> None:
    for candidate in (text, PREFIX + text):
        with pytest.raises(TicketError):
            parse_ticket(candidate)


@given(
    places=st.lists(st.integers(0, len(TEXT)), max_size=6), space=st.sampled_from([" ", "\n", "\r\n", "\t"])
)
def test_spaces_and_line_breaks_do_not_matter(places: list[int], space: str) -> None:
    text = TEXT
    for place in places:
        text = text[:place] + space + text[place:]
    assert parse_ticket(text).text() == TEXT


def test_look_alike_characters_are_named() -> None:
    with pytest.raises(TicketError, match="0, O, I and l"):
        parse_ticket(TEXT[:-1] + "0")


def test_overlong_text_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(TicketError, match="too many"):
        parse_ticket(PREFIX + "z" * TEXT_CHARS_MAX)


def test_ticket_not_signed_by_its_root_is_refused() -> None:
    ticket = a_ticket()
    forged = sign_certificate(SigningKey(bytes([8]) * 32), ticket.certificate)
    with pytest.raises(TicketError, match="not signed"):
        parse_ticket(pack(forged, ticket.delegation.seed, []))


def test_ticket_with_another_key_than_the_certified_is_refused() -> None:
    with pytest.raises(TicketError, match="do not belong together"):
        parse_ticket(pack(a_ticket().link, bytes(32), []))


def test_ticket_around_a_peer_certificate_is_refused() -> None:
    ticket = a_ticket()
    peer_kind = msgspec.structs.replace(ticket.certificate, kind="peer")
    with pytest.raises(TicketError, match="do not belong together"):
        parse_ticket(pack(sign_certificate(ROOT, peer_kind), ticket.delegation.seed, []))


@given(raw=st.binary(max_size=64))
def test_any_bootstrap_bytes_are_read_or_refused(raw: bytes) -> None:
    ticket = a_ticket()
    try:
        addrs = parse_ticket(pack(ticket.link, ticket.delegation.seed, [raw])).bootstrap
    except TicketError:
        return
    assert [addr.to_bytes() for addr in addrs] == [raw]


@given(body=st.binary(max_size=300))
def test_any_body_with_a_fitting_checksum_is_refused(body: bytes) -> None:
    from mycel.protocol.ticket import _checksum

    with pytest.raises(TicketError):
        parse_ticket(PREFIX + base58.b58encode(body + _checksum(body)).decode())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"access": Access.STRANGER}, "roles"),
        ({"life_s": 0}, "live"),
        ({"life_s": -5}, "live"),
        ({"life_s": float("inf")}, "live"),
        ({"life_s": float("nan")}, "live"),
        ({"label": "x" * 65}, "label"),
        ({"label": "bell\a"}, "label"),
        ({"bootstrap": [ADDR] * (BOOTSTRAP_MAX + 1)}, "addresses"),
        (
            {"bootstrap": [Multiaddr("/dns4/" + ".".join(["a" * 60] * 4) + "/tcp/1" + "/tcp/2" * 10)]},
            "addresses",
        ),
    ],
)
def test_ticket_that_cannot_be_is_not_issued(changes: dict[str, object], words: str) -> None:
    with pytest.raises(TicketError, match=words):
        a_ticket(**changes)


def test_ticket_expires() -> None:
    ticket = a_ticket(life_s=60)
    check_ticket(ticket, NOW + 60)
    with pytest.raises(Refused) as caught:
        check_ticket(ticket, NOW + 361)
    assert caught.value.reason == "expired"


def test_description_and_repr_keep_the_secret() -> None:
    ticket = a_ticket()
    told = json.dumps(describe(ticket)) + repr(ticket)
    seed = ticket.delegation.seed
    for spelling in (seed.hex(), base58.b58encode(seed).decode(), repr(seed)[2:-1], TEXT):
        assert spelling not in told
    assert describe(ticket)["access"] == "member"
    assert describe(ticket)["bootstrap"] == [str(ADDR)]


def test_largest_ticket_fits_its_bound() -> None:
    addr = Multiaddr("/dns4/" + ".".join(["a" * 60] * 3) + f"/tcp/1/p2p/{PEER_ID}")
    ticket = a_ticket(bootstrap=[addr] * BOOTSTRAP_MAX, label="ü" * 64)
    assert parse_ticket(ticket.text()).bootstrap == (addr,) * BOOTSTRAP_MAX


def test_tickets_of_the_golden_vectors() -> None:
    vectors = json.loads((Path(__file__).parents[1] / "vectors" / "trust.json").read_text())
    for vector in vectors["tickets"]:
        ticket = parse_ticket(vector["text"])
        assert describe(ticket) == vector["says"]
        entropy = bytes.fromhex(vector["delegation_seed"])
        again = issue_ticket(
            SigningKey(bytes.fromhex(vector["root_seed"])),
            access=ticket.access,
            now=ticket.certificate.not_before,
            entropy=lambda _, seed=entropy: seed,
            life_s=ticket.certificate.not_after - ticket.certificate.not_before,
            label=ticket.certificate.label,
        ).with_bootstrap(ticket.bootstrap)
        assert again.text() == vector["text"]
