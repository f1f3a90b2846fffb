"""Scenario "swarm": daemons join by ticket, run a generation, and lose a third of themselves in the middle.

The same prompt is generated twice with the same seed: undisturbed, and with a third of the nodes dying at a
random token, the route's first stage among them. Half of the dead crash (their kernels reset their
connections), the others vanish without a word. The owner of the session holds no layers and stays.

The last holder of each layer stays as well; or, with `last_copies`, every layer has one holder only, and the
survivors have to take those of the dead beside their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from mycel.compute.engine import Sampling
from mycel.compute.infer.generation import Generation
from mycel.compute.infer.request import GenerateRequest, ModelStatus, Report
from mycel.compute.inline import InlineEngine
from mycel.protocol.limits import DEFAULT_LIMITS
from mycel.simnet.check import InvariantBroken
from mycel.simnet.internet import InternetOptions, internet
from mycel.simnet.link import GIGABIT, LinkOptions
from mycel.simnet.swarm import SimNode, Swarm, SwarmOptions

POLL_S = 0.1
LINE = LinkOptions(latency_s=0.01, jitter_s=0.002, up_bytes_per_s=GIGABIT / 10, down_bytes_per_s=GIGABIT / 10)
"""A home's: 100 Mbit/s both ways, 20 ms to the next home."""


@dataclass(frozen=True, slots=True)
class DieoffOptions:
    """How large, how much dies, and within which virtual seconds each part must be done."""

    model: Path
    seed: int = 0
    nodes: int = 30
    deaths: int = 10
    tokens: int = 24
    stages: int = 4
    layers_per_node: int = 2
    """How many layers a node has memory for."""
    last_copies: bool = False
    """Whether the dead may be the last holders of their layers."""
    line: LinkOptions = LINE
    join_s_max: float = 60.0
    generate_s_max: float = 60.0
    settle_s_max: float = 30.0


@dataclass(frozen=True, slots=True)
class DieoffReport:
    """What happened. Times are virtual seconds."""

    seed: int
    nodes: int
    joined_s: float
    """Until every node was connected with every other and the model was whole."""
    holders: int
    tokens: tuple[int, ...]
    same_tokens: bool
    """Whether the disturbed run gave the tokens of the undisturbed one."""
    died: tuple[str, ...]
    died_at_token: int
    stages_died: int
    taken: int
    """Stages that survivors took beside their own."""
    failovers: int
    longest_gap_s: float
    undisturbed_gap_s: float
    settled_s: float
    """From the deaths until every survivor knew just the survivors."""
    virtual_s: float
    events: dict[str, int]
    trace_hash: str

    @property
    def went_well(self) -> bool:
        """Whether the deaths changed nothing but the time it took."""
        return self.same_tokens and self.failovers > 0


async def dieoff(options: DieoffOptions) -> DieoffReport:
    """Run it on this trio loop. Raises `trio.TooSlowError` when a part misses its time."""
    async with internet(InternetOptions(seed=options.seed, link=options.line)) as net:
        async with trio.open_nursery() as nursery:
            card = await InlineEngine().describe(str(options.model))
            memory_bytes = card.edge_bytes + options.layers_per_node * card.layer_bytes
            swarm = Swarm(
                net,
                nursery,
                SwarmOptions(options.model, memory_bytes=memory_bytes, stages=options.stages),
            )
            run = _Run(options, swarm)
            await run.gather()
            calm, calm_report = await run.generate(on_token=lambda generation, count: None)
            tokens, report = await run.generate(on_token=run.strike_at)
            settled_s = await run.settle()
            taken = run.taken()
            nursery.cancel_scope.cancel()
        return DieoffReport(
            seed=options.seed,
            nodes=options.nodes,
            joined_s=run.joined_s,
            holders=run.holders,
            tokens=tokens,
            same_tokens=tokens == calm,
            died=tuple(node.name for node in run.dead),
            died_at_token=run.strike_token,
            stages_died=run.stages_died,
            taken=taken,
            failovers=len(report.failovers),
            longest_gap_s=report.longest_gap_s,
            undisturbed_gap_s=calm_report.longest_gap_s,
            settled_s=settled_s,
            virtual_s=trio.current_time(),
            events=dict(sorted(net.trace.counts.items())),
            trace_hash=net.trace.hash,
        )


class _Run:
    """The scenario's parts in their order, and what they found."""

    def __init__(self, options: DieoffOptions, swarm: Swarm) -> None:
        self._options = options
        self._swarm = swarm
        self._rng = random.Random(f"dieoff {options.seed}")
        self.strike_token = self._rng.randrange(2, options.tokens - 2)
        self.joined_s = 0.0
        self.holders = 0
        self.dead: list[SimNode] = []
        self.stages_died = 0
        self._struck_at = 0.0

    @property
    def owner(self) -> SimNode:
        """The node that asks: the last to join, without layers of its own."""
        return list(self._swarm.nodes.values())[-1]

    def status(self) -> ModelStatus | None:
        """The model as the owner sees it."""
        return next(iter(self.owner.node.generator.models()), None)

    async def gather(self) -> None:
        """Found the swarm, let everybody join at a random moment, wait until all are there."""
        with trio.fail_after(self._options.join_s_max):
            founder = await self._swarm.found(layers=self._layers(0))
            ticket = founder.ticket()
            async with trio.open_nursery() as nursery:
                for number in range(1, self._options.nodes - 1):
                    nursery.start_soon(self._join_later, ticket, number, self._rng.random() * 2)
            await self._swarm.join(ticket, f"n{self._options.nodes - 1}", serves=False)
            await _until(self._is_gathered)
        self.joined_s = trio.current_time()
        status = self.status()
        assert status is not None
        self.holders = len(status.holders)

    async def _join_later(self, ticket: str, number: int, seconds: float) -> None:
        await trio.sleep(seconds)
        await self._swarm.join(ticket, f"n{number}", layers=self._layers(number))

    def _layers(self, number: int) -> tuple[int, int] | None:
        """What a node is told to serve; None: what the swarm needs."""
        return (number, number + 1) if self._options.last_copies else None

    def _is_gathered(self) -> bool:
        status = self.status()
        everybody = self._options.nodes - 1
        return (
            status is not None
            and sum(holder.state == "ready" for holder in status.holders) == everybody
            and all(len(node.node.host.peers) == everybody for node in self._swarm.nodes.values())
        )

    async def generate(self, on_token: Callable[[Generation, int], None]) -> tuple[tuple[int, ...], Report]:
        """One generation by the owner; returns its tokens and its report."""
        status = self.status()
        assert status is not None
        request = GenerateRequest(
            model=status.card.fingerprint,
            prompt=(1, 2, 3, 4, 5),
            sampling=Sampling(temperature=0.8, seed=self._options.seed),
            max_tokens=self._options.tokens,
            stop_tokens=(),
        )
        tokens: list[int] = []
        with trio.fail_after(self._options.generate_s_max):
            async with self.owner.node.generator.generate(request) as generation:
                async for piece in generation:
                    tokens.extend(token.id for token in piece.tokens)
                    on_token(generation, len(tokens))
        return tuple(tokens), generation.report

    def strike_at(self, generation: Generation, count: int) -> None:
        """Let a third of the nodes die once enough tokens are there."""
        if count < self.strike_token or self.dead:
            return
        on_route = [stage.peer for stage in generation.report.route]
        others = [node for node in self._swarm.nodes.values() if node is not self.owner]
        self._rng.shuffle(others)
        others.sort(key=lambda node: node.peer not in on_route[:1])
        for node in others:
            if len(self.dead) < self._options.deaths and self._can_spare(node):
                self.dead.append(node)
        self.stages_died = sum(node.peer in on_route for node in self.dead)
        self._struck_at = trio.current_time()
        for number, node in enumerate(self.dead):
            if number % 2:
                node.machine.vanish()
            else:
                node.machine.crash()

    def _can_spare(self, node: SimNode) -> bool:
        """Whether every layer keeps a holder when `node` dies too, or need not."""
        if self._options.last_copies:
            return True
        status = self.status()
        assert status is not None
        gone = {node.peer, *(dead.peer for dead in self.dead)}
        spans = [holder.span for holder in status.holders if holder.peer not in gone]
        return all(
            any(span.start <= layer < span.end for span in spans) for layer in range(status.card.n_layers)
        )

    def taken(self) -> int:
        """Stages that somebody has beside another one. Raises `InvariantBroken` if the model is not whole."""
        status = self.status()
        if status is None or not status.complete:
            raise InvariantBroken("the model did not become whole again")
        peers = [holder.peer for holder in status.holders]
        return len(peers) - len(dict.fromkeys(peers))

    async def settle(self) -> float:
        """Wait until every survivor knows just the other survivors; returns how long it took.

        Then one connection for each pair must be left, once those of simultaneous dials are drained.
        """
        alive = self._swarm.alive
        if len(alive) != self._options.nodes - self._options.deaths:
            raise InvariantBroken(f"{len(alive)} of {self._options.nodes} nodes live on")
        peers = {node.peer for node in alive}
        with trio.fail_after(self._options.settle_s_max):
            await _until(lambda: all({node.peer, *node.node.host.peers} == peers for node in alive))
        settled_s = trio.current_time() - self._struck_at
        with trio.fail_after(2 * DEFAULT_LIMITS.drain_s):
            await _until(lambda: all(node.node.host.connections == len(alive) - 1 for node in alive))
        return settled_s


async def _until(holds: Callable[[], bool]) -> None:
    while True:
        if holds():
            return
        await trio.sleep(POLL_S)
