"""The daemon's jobs: made of its services, with the runners that it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mycel.compute.train.trade import Trainer
from mycel.compute.train.trainer import Trainers
from mycel.node.jobs.federate import FederateRunner, owner_of
from mycel.node.jobs.generate import GenerateRunner
from mycel.node.jobs.service import Jobs, MakeRunner, Place
from mycel.node.jobs.train import TrainRunner
from mycel.node.memory import Memory
from mycel.node.together import Together
from mycel.protocol.chain import encode_chain
from mycel.protocol.errors import Refused
from mycel.protocol.mesh import Access, PeerId

if TYPE_CHECKING:
    from mycel.node.running import Node


def open_jobs(node: Node, memory: Memory, makers: Sequence[MakeRunner] = ()) -> Jobs:
    """The jobs of `node`; `makers` make runners of further kinds."""
    membership = node.membership

    def access_of(peer: PeerId, chain: bytes) -> Access:
        try:
            return membership.judge(peer, chain).access
        except Refused:
            return Access.STRANGER

    def own_access() -> Access:
        try:
            return membership.own_grant().access
        except Refused:
            return Access.STRANGER

    place = Place(
        mesh=node.host,
        rpc=node.rpc,
        documents=node.documents,
        exchange=node.blocks.exchange,
        memory=memory,
        access_of=access_of,
        own_access=own_access,
        chain=lambda: encode_chain(membership.credentials.chain),
        label=node.label_of,
        takes_part=node.config.jobs,
    )
    return Jobs(place, [lambda services: GenerateRunner(services, node.generator), *makers])


def learners(
    start: Callable[[], Trainer] | None, data: Sequence[str], trusted: Sequence[str], together: Together
) -> list[MakeRunner]:
    """What makes the runners that train, from the config's `data` and `trust_submitters`; nothing where
    `start` is None and no trainer can be started."""
    if start is None:
        return []
    trainers, owner = Trainers(start), owner_of(data, trusted)
    return [
        lambda services: FederateRunner(services, trainers, owner),
        lambda services: TrainRunner(services, trainers, owner, together),
    ]
