"""What every `Network` must do, in both worlds: dialling and listening."""

from __future__ import annotations

import pytest
import trio
from multiaddr import Multiaddr

from mycel.protocol.address import endpoint_of
from mycel.protocol.errors import AddressError, DialError, PipeBroken


async def read_some(pipe, size=65536):
    buffer = bytearray(size)
    while (count := pipe.try_recv_into(buffer)) is None:
        await pipe.wait_readable()
    return bytes(buffer[:count])


def test_both_ends_know_the_same_two_addresses(play):
    async def scenario(place):
        listener, near, far = await place.connect()
        assert near.remote == listener.addr == far.local
        assert near.local == far.remote
        assert endpoint_of(listener.addr).port != 0

    play(scenario)


def test_a_peer_id_at_the_end_of_an_address_is_not_the_networks_business(play):
    async def scenario(place):
        listener = await place.far.listen(place.far_any)
        peer = Multiaddr("/p2p/12D3KooWGCGBjEbTgUhGcZ8dpwDqg6aCTYL9J4JiiUQXYoQoMRyw")
        pipe = await place.near.dial(listener.addr.encapsulate(peer))
        assert pipe.remote == listener.addr

    play(scenario)


def test_ipv6(play):
    async def scenario(place):
        listener = await place.far.listen(place.far_any6)
        pipe = await place.near.dial(listener.addr)
        accepted = await listener.accept()
        assert endpoint_of(accepted.remote).kind == "ip6"
        assert pipe.try_send(b"six") == 3
        assert await read_some(accepted) == b"six"

    play(scenario)


def test_a_host_name_is_resolved(play):
    async def scenario(place):
        listener = await place.far.listen(place.far_any)
        port = endpoint_of(listener.addr).port
        pipe = await place.near.dial(Multiaddr(f"/dns/{place.far_name}/tcp/{port}"))
        assert endpoint_of(pipe.remote).port == port

    play(scenario)


def test_an_unknown_host_name_is_a_dial_error(play):
    async def scenario(place):
        with pytest.raises(DialError, match=r"cannot resolve nobody\.invalid"):
            await place.near.dial(Multiaddr("/dns/nobody.invalid/tcp/1"))

    play(scenario)


def test_nobody_listens_is_refused(play):
    async def scenario(place):
        listener = await place.far.listen(place.far_any)
        listener.close()
        with pytest.raises(DialError, match="Connection refused") as caught:
            await place.near.dial(listener.addr)
        assert str(listener.addr) in str(caught.value)

    play(scenario)


def test_no_route_is_a_dial_error(play):
    async def scenario(place):
        with pytest.raises(DialError, match=r"unreachable|No route"):
            await place.near.dial(place.unreachable)

    play(scenario)


@pytest.mark.parametrize("addr", ["/ip4/127.0.0.1/udp/1", "/unix/tmp/x", "/ip4/127.0.0.1"])
def test_other_kinds_of_address_are_refused(play, addr):
    async def scenario(place):
        with pytest.raises(AddressError, match="not a TCP address"):
            await place.near.dial(Multiaddr(addr))
        with pytest.raises(AddressError, match="not a TCP address"):
            await place.near.listen(Multiaddr(addr))

    play(scenario)


def test_a_name_cannot_be_listened_on(play):
    async def scenario(place):
        with pytest.raises(AddressError, match="listen on an IP address"):
            await place.far.listen(Multiaddr(f"/dns/{place.far_name}/tcp/0"))

    play(scenario)


def test_an_address_of_another_machine_cannot_be_listened_on(play):
    async def scenario(place):
        with pytest.raises(AddressError, match="Cannot assign requested address"):
            await place.far.listen(Multiaddr("/ip4/192.0.2.77/tcp/0"))

    play(scenario)


def test_a_port_is_listened_on_once(play):
    async def scenario(place):
        listener = await place.far.listen(place.far_any)
        with pytest.raises(AddressError, match="Address already in use") as caught:
            await place.far.listen(listener.addr)
        assert str(listener.addr) in str(caught.value)
        listener.close()
        again = await place.far.listen(listener.addr)
        assert again.addr == listener.addr

    play(scenario)


def test_closing_a_listener_wakes_its_acceptor_and_spares_its_pipes(play):
    async def scenario(place):
        listener, near, far = await place.connect()
        outcomes = []

        async def acceptor():
            with pytest.raises(PipeBroken, match="closed"):
                await listener.accept()
            outcomes.append("woken")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(acceptor)
            await trio.testing.wait_all_tasks_blocked()
            listener.close()
        assert outcomes == ["woken"]
        with pytest.raises(PipeBroken, match="closed"):
            await listener.accept()
        listener.close()
        near.try_send(b"alive")
        assert await read_some(far) == b"alive"

    play(scenario)


def test_a_cancelled_dial_leaves_nothing_behind(play):
    async def scenario(place):
        listener = await place.far.listen(place.far_any)
        for _ in range(20):
            with trio.CancelScope() as scope:
                scope.cancel()
                await place.near.dial(listener.addr)
            assert scope.cancelled_caught
        near = await place.near.dial(listener.addr)
        near.try_send(b"real")
        while True:
            far = await listener.accept()
            try:
                data = await read_some(far)
            except PipeBroken:
                continue  # one of the cancelled ones had got through before it was given up
            if data:
                break
        assert data == b"real"

    play(scenario)


def test_a_dial_leaves_from_a_shared_listeners_port(play):
    async def scenario(place):
        own = await place.near.listen(place.near_any, shared=True)
        listener = await place.far.listen(place.far_any)
        near = await place.near.dial(listener.addr, local=own.addr)
        far = await listener.accept()
        assert endpoint_of(far.remote).port == endpoint_of(own.addr).port
        near.try_send(b"from my listening port")
        assert await read_some(far) == b"from my listening port"
        with pytest.raises(DialError):
            await place.near.dial(listener.addr, local=own.addr)  # the same two addresses twice

    play(scenario)


def test_a_port_that_is_not_shared_cannot_be_dialled_from(play):
    async def scenario(place):
        own = await place.near.listen(place.near_any)
        listener = await place.far.listen(place.far_any)
        with pytest.raises(DialError, match="Address already in use"):
            await place.near.dial(listener.addr, local=own.addr)

    play(scenario)


def test_many_dials_at_once(play):
    async def scenario(place):
        count = 200
        listener = await place.far.listen(place.far_any)
        answers = []

        async def serve_one(pipe):
            pipe.try_send(await read_some(pipe))
            pipe.close()

        async def serve():
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    nursery.start_soon(serve_one, await listener.accept())

        async def ask(number):
            pipe = await place.near.dial(listener.addr)
            pipe.try_send(b"%d" % number)
            answers.append(int(await read_some(pipe)))
            assert await read_some(pipe) == b""
            pipe.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            for number in range(count):
                nursery.start_soon(ask, number)
        assert sorted(answers) == list(range(count))

    play(scenario)


def test_unaccepted_connections_are_bounded(play):
    """A dial completes before it is accepted, but the backlog has an end; accepting makes room again."""

    async def scenario(place):
        listener = await place.far.listen(place.far_any)
        pipes = []

        async def dial():
            pipes.append(await place.near.dial(listener.addr))

        with trio.move_on_after(0.7):
            async with trio.open_nursery() as nursery:
                for _ in range(700):
                    nursery.start_soon(dial)
        assert 100 < len(pipes) < 700
        for _ in range(50):
            await listener.accept()
        with trio.fail_after(10):
            await dial()

    play(scenario)


def test_the_machines_own_facts(play):
    async def scenario(place):
        ips = place.near.local_ips()
        assert "127.0.0.1" in ips
        first_loopback = min(i for i, ip in enumerate(ips) if ip in ("127.0.0.1", "::1"))
        assert all(ip in ("127.0.0.1", "::1") for ip in ips[first_loopback:])
        before = place.near.wall()
        await trio.sleep(0.05)
        assert 0.04 < place.near.wall() - before < 5
        assert before > 1_700_000_000
        draws = [place.near.entropy(16) for _ in range(4)] + [place.far.entropy(16)]
        assert len({bytes(draw) for draw in draws}) == 5
        assert all(len(draw) == 16 for draw in draws)

    play(scenario)
