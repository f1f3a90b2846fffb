"""Whole daemons behind NATs: a generation goes on while the connection under it changes, tokens unchanged.

Two homes hold half of a model each; two public nodes relay. The homes begin over a relay, get a direct
connection in mid-sentence, lose it again, and lose the relay that carries them then.
"""

from __future__ import annotations

import pytest
import trio

from mycel.compute.engine import Sampling
from mycel.compute.infer.request import GenerateRequest
from mycel.compute.model.tiny import tiny_model
from mycel.protocol.address import circuit_of, is_circuit
from mycel.protocol.mesh import PathKind
from mycel.simnet import clock
from mycel.simnet.internet import InternetOptions, internet
from mycel.simnet.link import LinkOptions
from mycel.simnet.swarm import Swarm, SwarmOptions

LATENCY_S = 0.01
LAYERS = 4


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=3, n_layers=LAYERS)


class Street:
    """Two public nodes, and two homes with half of the model each; `owner` is public and asks."""

    def __init__(self, net, swarm):
        self.net = net
        self.swarm = swarm
        self.may_punch = trio.Event()

    async def settle(self, kinds):
        """Everybody is there, and the homes are connected over a relay."""
        founder = await self.swarm.found("r0", serves=False)
        ticket = founder.ticket()
        await self.swarm.join(ticket, "r1", serves=False)
        for name, kind, layers in zip("ab", kinds, ((0, 2), (2, 4)), strict=True):
            self.net.add_site(name, kind)
            home = await self.swarm.join(ticket, name, layers=layers)
            self._hold_back(home.node.reach.upgrade.puncher)
        await self.swarm.join(ticket, "owner", serves=False)
        await self.until(self._is_ready)
        assert self.path() == [PathKind.RELAYED] * 2

    def _hold_back(self, puncher):
        """No punch before the scenario wants one."""
        punch = puncher.punch

        async def wait(peer):
            if not self.may_punch.is_set():
                await self.may_punch.wait()
            await punch(peer)

        puncher.punch = wait

    def _is_ready(self):
        status = next(iter(self.swarm.nodes["owner"].node.generator.models()), None)
        nodes = list(self.swarm.nodes.values())
        return (
            status is not None
            and status.complete
            and all(len(node.node.host.peers) == len(nodes) - 1 for node in nodes)
            and all(len(self.host(name).circuits.relays) == 2 for name in "ab")
        )

    def host(self, name):
        return self.swarm.nodes[name].node.reach

    def info(self, name):
        """How home `name` is connected with the other one; None where it is not."""
        other = self.swarm.nodes["b" if name == "a" else "a"].peer
        return self.swarm.nodes[name].node.host.peers.get(other)

    def path(self):
        return [info.path if (info := self.info(name)) else None for name in "ab"]

    def relay(self):
        """The name of the relay between the homes."""
        addr = self.info("a").addr
        assert is_circuit(addr)
        peer = circuit_of(addr).relay_peer
        return next(name for name, node in self.swarm.nodes.items() if node.peer == peer)

    def reset_direct(self):
        """A NAT forgets the direct connection and says so: it is reset."""
        outside = self.net.boxes["b box 0"].ip
        (pipe,) = [pipe for pipe in self.net.machines["a"].pipes if pipe.far[0] == outside]
        pipe.reset()

    def cut_direct(self):
        """Nothing passes between the two homes any more; each still reaches the rest of the world."""
        self.net.cut([self.net.machines["a"]], [self.net.machines["b"]])

    async def until(self, holds, seconds=60):
        with trio.fail_after(seconds):
            while not holds():  # noqa: ASYNC110
                await trio.sleep(0.05)

    async def generate(self, tokens, acts=()):
        """(the tokens, the report). `acts` are (at how many tokens, what to do)."""
        owner = self.swarm.nodes["owner"].node
        status = next(iter(owner.generator.models()))
        request = GenerateRequest(
            model=status.card.fingerprint,
            prompt=(1, 2, 3, 4, 5),
            sampling=Sampling(temperature=0.8, seed=7),
            max_tokens=tokens,
            stop_tokens=(),
        )
        found, todo = [], list(acts)
        with trio.fail_after(600):
            async with owner.generator.generate(request) as generation:
                async for piece in generation:
                    found.extend(token.id for token in piece.tokens)
                    while todo and len(found) >= todo[0][0]:
                        todo.pop(0)[1]()
        assert not todo
        return found, generation.report


def play(model, scenario, seed=1, kinds=("port", "port")):
    async def main():
        options = InternetOptions(seed=seed, link=LinkOptions(latency_s=LATENCY_S))
        async with internet(options) as net, trio.open_nursery() as nursery:
            street = Street(net, Swarm(net, nursery, SwarmOptions(model=model, layer_step_s=0.05)))
            await street.settle(kinds)
            await scenario(street)
            nursery.cancel_scope.cancel()

    clock.run(main, seed)


TOKENS = 80
"""At about 0.3 s a token longer than a superseded connection is drained (10 s)."""


def assert_same(tokens, report, calm):
    """Nothing of the text changed, no stage was given up, and no row was computed twice."""
    assert tokens == calm
    for repair in report.failovers:
        assert not repair.lost
        assert repair.replayed_rows == 0


def test_a_generation_goes_on_from_relayed_to_direct(model):
    async def scenario(street):
        calm, usual = await street.generate(TOKENS)
        assert street.path() == [PathKind.RELAYED] * 2
        tokens, report = await street.generate(TOKENS, [(20, street.may_punch.set)])
        assert street.path() == [PathKind.DIRECT] * 2
        assert_same(tokens, report, calm)
        assert report.longest_gap_s < usual.longest_gap_s + 0.3

    play(model, scenario)


@pytest.mark.parametrize("how", ["reset", "cut"])
def test_a_generation_survives_the_death_of_the_direct_connection_and_is_direct_again(model, how):
    async def scenario(street):
        street.may_punch.set()
        await street.until(lambda: street.path() == [PathKind.DIRECT] * 2)
        await trio.sleep(15)  # the relayed connection is gone by then
        calm, usual = await street.generate(40)
        assert not usual.failovers
        began, paths = [], []

        def strike():
            began.append(trio.current_time())
            (street.reset_direct if how == "reset" else street.cut_direct)()

        tokens, report = await street.generate(40, [(10, strike), (14, lambda: paths.append(street.path()))])
        assert_same(tokens, report, calm)
        assert report.longest_gap_s < (1.0 if how == "reset" else 4.0)
        if how == "cut":
            assert paths == [[PathKind.RELAYED] * 2]
            assert street.path() == [PathKind.RELAYED] * 2
            street.net.heal()
        await street.until(lambda: street.path() == [PathKind.DIRECT] * 2)

    play(model, scenario)


@pytest.mark.parametrize("death", ["crash", "vanish"])
def test_a_generation_survives_the_death_of_its_relay(model, death):
    async def scenario(street):
        calm, _ = await street.generate(40)
        dead = street.relay()
        tokens, report = await street.generate(40, [(10, getattr(street.net.machines[dead], death))])
        assert_same(tokens, report, calm)
        assert street.path() == [PathKind.RELAYED] * 2
        assert street.relay() != dead
        assert report.longest_gap_s < (1.0 if death == "crash" else 4.0)

    play(model, scenario)


@pytest.mark.parametrize("wait_s", [0, 1, 20], ids=["relayed", "fresh", "direct"])
def test_a_home_that_says_goodbye_is_not_fetched_back(model, wait_s):
    async def scenario(street):
        if wait_s:
            street.may_punch.set()
            await street.until(lambda: street.path() == [PathKind.DIRECT] * 2)
            await trio.sleep(wait_s)
        home, other = (street.swarm.nodes[name] for name in "ab")
        dialled = []
        host = other.node.host
        connect = host.connect

        async def note(addrs, **options):
            if any(str(addr).endswith(home.peer) for addr in addrs):
                dialled.append([str(addr) for addr in addrs])
            return await connect(addrs, **options)

        host.connect = note
        home.node.stop()
        await street.until(lambda: home.peer not in host.peers)
        await trio.sleep(1)  # before the contacts' own redial
        assert dialled == []

    play(model, scenario)


def test_homes_that_cannot_meet_stay_relayed_and_say_why(model):
    async def scenario(street):
        street.may_punch.set()
        await trio.sleep(30)
        assert street.path() == [PathKind.RELAYED] * 2
        failed = [street.host(name).upgrade.failed for name in "ab"]
        assert sum(failed) == 1
        troubles = [street.host(name).upgrade.troubles for name in "ab"]
        assert all("choose another port" in why for one in troubles for why in one.values())
        tokens, report = await street.generate(10)
        assert len(tokens) == 10
        assert not report.failovers

    play(model, scenario, kinds=("symmetric", "symmetric"))
