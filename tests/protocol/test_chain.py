"""Chains: what they grant, and every way in which they grant nothing."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocol.chain import (
    CHAIN_BYTES_MAX,
    DELEGATE,
    PEER,
    Certificate,
    Chain,
    Grant,
    Link,
    certify_peer,
    decode_chain,
    encode_chain,
    read_certificate,
    sign_certificate,
    verify_chain,
)
from mycel.protocol.errors import Refused
from mycel.protocol.identity import SigningKey, public_of
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access, PeerId
from mycel.protocol.ticket import Ticket, issue_ticket, parse_ticket

NOW = 1_800_000_000
ROOT = SigningKey(bytes([1]) * 32)
OTHER_ROOT = SigningKey(bytes([2]) * 32)
DELEGATION = SigningKey(bytes([3]) * 32)
PEER_ID = OwnKey(bytes([4]) * 32).peer_id
STRANGER_ID = OwnKey(bytes([5]) * 32).peer_id
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "trust.json").read_text())

ROLES = st.sampled_from([Access.SUBMIT, Access.MEMBER, Access.ADMIN])


def a_ticket(root: SigningKey = ROOT, access: Access = Access.MEMBER, life_s: float = 3600) -> Ticket:
    return issue_ticket(
        root, access=access, now=NOW, entropy=lambda n: bytes([3]) * n, life_s=life_s, label="lab"
    )


def reason_of(chain: Chain, peer: PeerId = PEER_ID, now: float = NOW, skew_s: float = 300.0) -> str:
    with pytest.raises(Refused) as caught:
        verify_chain(chain, peer, ROOT.public, now, skew_s=skew_s)
    return caught.value.reason


def cert(kind: str, subject: bytes, access: Access, swarm: bytes = ROOT.public) -> Certificate:
    return Certificate(kind, swarm, subject, int(access), NOW, NOW + 3600, "lab")


def test_chain_through_a_ticket_grants_its_role() -> None:
    grant = verify_chain(a_ticket().chain_for(PEER_ID), PEER_ID, ROOT.public, NOW)
    assert grant == Grant(Access.MEMBER, NOW, NOW + 3600, "lab", by_ticket=True)


def test_chain_by_the_root_itself_grants_its_role() -> None:
    grant = Grant(Access.ADMIN, NOW, NOW + 60, "desk", by_ticket=False)
    chain = Chain((certify_peer(ROOT, ROOT.public, PEER_ID, grant),))
    assert verify_chain(chain, PEER_ID, ROOT.public, NOW) == grant


def test_chain_survives_its_encoding() -> None:
    chain = a_ticket().chain_for(PEER_ID)
    assert decode_chain(encode_chain(chain)) == chain


def test_chain_of_another_swarm_is_refused() -> None:
    assert reason_of(a_ticket(OTHER_ROOT).chain_for(PEER_ID)) == "wrong_swarm"


def test_chain_that_names_our_swarm_but_was_signed_by_another_root_is_refused() -> None:
    delegate = sign_certificate(OTHER_ROOT, cert(DELEGATE, DELEGATION.public, Access.MEMBER))
    leaf = sign_certificate(DELEGATION, cert(PEER, public_of(PEER_ID), Access.MEMBER))
    assert reason_of(Chain((delegate, leaf))) == "forged"


def test_chain_whose_leaf_another_key_signed_is_refused() -> None:
    ticket = a_ticket()
    leaf = sign_certificate(OTHER_ROOT, cert(PEER, public_of(PEER_ID), Access.MEMBER))
    assert reason_of(Chain((ticket.link, leaf))) == "forged"


def test_chain_copied_from_another_peer_is_refused() -> None:
    chain = a_ticket().chain_for(STRANGER_ID)
    assert verify_chain(chain, STRANGER_ID, ROOT.public, NOW).access is Access.MEMBER
    assert reason_of(chain, PEER_ID) == "foreign_chain"


def test_chain_for_a_peer_without_an_ed25519_key_is_refused() -> None:
    rsa_peer = PeerId("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")
    assert reason_of(a_ticket().chain_for(PEER_ID), rsa_peer) == "foreign_chain"


@pytest.mark.parametrize("skew_s", [0.0, 1.0, 300.0])
def test_chain_ends_with_its_ticket_give_or_take_the_clock_tolerance(skew_s: float) -> None:
    chain = a_ticket(life_s=3600).chain_for(PEER_ID)
    for inside in (NOW - skew_s, NOW, NOW + 3600 + skew_s):
        assert verify_chain(chain, PEER_ID, ROOT.public, inside, skew_s=skew_s).access is Access.MEMBER
    assert reason_of(chain, now=NOW + 3600 + skew_s + 1, skew_s=skew_s) == "expired"
    assert reason_of(chain, now=NOW - skew_s - 1, skew_s=skew_s) == "not_yet"


def test_leaf_cannot_outlive_its_ticket() -> None:
    ticket = a_ticket(life_s=10)
    longer = Grant(Access.MEMBER, NOW, NOW + 10**6, "", by_ticket=False)
    chain = Chain((ticket.link, certify_peer(ticket.delegation, ROOT.public, PEER_ID, longer)))
    assert verify_chain(chain, PEER_ID, ROOT.public, NOW).not_after == NOW + 10
    assert reason_of(chain, now=NOW + 10**5) == "expired"


@given(of_ticket=ROLES, of_leaf=ROLES)
def test_roles_only_narrow_down_the_chain(of_ticket: Access, of_leaf: Access) -> None:
    ticket = a_ticket(access=of_ticket)
    leaf = sign_certificate(ticket.delegation, cert(PEER, public_of(PEER_ID), of_leaf))
    chain = Chain((ticket.link, leaf))
    if of_leaf <= of_ticket:
        assert verify_chain(chain, PEER_ID, ROOT.public, NOW).access is of_leaf
    else:
        assert reason_of(chain) == "forged"


def test_a_ticket_is_no_membership_and_cannot_delegate_further() -> None:
    ticket = a_ticket()
    assert reason_of(Chain((ticket.link,))) == "malformed"
    second = sign_certificate(ticket.delegation, cert(DELEGATE, DELEGATION.public, Access.MEMBER))
    assert reason_of(Chain((ticket.link, second))) == "malformed"
    peer_then_peer = certify_peer(
        ROOT, ROOT.public, PEER_ID, Grant(Access.MEMBER, NOW, NOW, "", by_ticket=False)
    )
    assert reason_of(Chain((peer_then_peer, peer_then_peer))) == "malformed"


@pytest.mark.parametrize("links", [0, 3])
def test_chain_has_one_or_two_links(links: int) -> None:
    link = a_ticket().link
    data = msgspec.msgpack.encode([[[link.body, link.signature]] * links])
    with pytest.raises(Refused) as caught:
        decode_chain(data)
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("access", [-1, int(Access.STRANGER), int(Access.ADMIN) + 1])
def test_certificate_for_a_role_that_does_not_exist_is_malformed(access: int) -> None:
    certificate = Certificate(PEER, ROOT.public, public_of(PEER_ID), access, NOW, NOW + 9, "")
    assert reason_of(Chain((sign_certificate(ROOT, certificate),))) == "malformed"


def test_label_that_would_write_to_a_terminal_is_malformed() -> None:
    certificate = Certificate(PEER, ROOT.public, public_of(PEER_ID), 2, NOW, NOW + 9, "\x1b[2J")
    assert reason_of(Chain((sign_certificate(ROOT, certificate),))) == "malformed"


GOOD = encode_chain(a_ticket().chain_for(PEER_ID))


@given(bit=st.integers(0, 8 * len(GOOD) - 1))
def test_every_flipped_bit_of_a_chain_is_refused(bit: int) -> None:
    data = bytearray(GOOD)
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Refused) as caught:
        verify_chain(decode_chain(bytes(data)), PEER_ID, ROOT.public, NOW)
    assert caught.value.reason in ("malformed", "wrong_swarm", "forged")


@given(cut=st.integers(0, len(GOOD) - 1), tail=st.binary(max_size=8))
def test_every_cut_or_lengthened_chain_is_refused(cut: int, tail: bytes) -> None:
    for data in (GOOD[:cut], GOOD + tail + b"\0"):
        with pytest.raises(Refused) as caught:
            decode_chain(data)
        assert caught.value.reason == "malformed"


@given(data=st.binary(max_size=2000))
def test_any_bytes_are_judged_not_raised_over(data: bytes) -> None:
    with pytest.raises(Refused):
        verify_chain(decode_chain(data), PEER_ID, ROOT.public, NOW)


@given(body=st.binary(max_size=200), signature=st.binary(min_size=64, max_size=64))
def test_a_link_of_any_bytes_is_judged_not_raised_over(body: bytes, signature: bytes) -> None:
    assert reason_of(Chain((Link(body, signature),))) == "malformed"


def test_overlong_chain_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(Refused, match="too long"):
        decode_chain(bytes(CHAIN_BYTES_MAX + 1))


def test_one_chain_has_one_encoding() -> None:
    chain = a_ticket().chain_for(PEER_ID)
    wide = b"\x91\xdc\x00\x02" + GOOD[2:]  # the same array of two links with a longer header
    assert msgspec.msgpack.decode(wide, type=Chain) == chain
    with pytest.raises(Refused, match="encoding"):
        decode_chain(wide)


def test_chains_of_the_golden_vectors() -> None:
    for vector in VECTORS["chains"]:
        root = bytes.fromhex(vector["root"])
        data = bytes.fromhex(vector["chain"])
        grant = verify_chain(decode_chain(data), vector["peer_id"], root, vector["now"])
        assert [grant.access.name, grant.not_after, grant.label] == vector["grant"]
        ticket = parse_ticket(vector["ticket"])
        assert encode_chain(ticket.chain_for(vector["peer_id"])) == data
        assert read_certificate(ticket.link).swarm == root
