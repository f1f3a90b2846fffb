"""What a coordinator and its clients say to each other: the messages of federated rounds.

    train.offer   unary   may I order rounds of this job from you?         Claim -> Offered, or `Refused`
    train.first   unary   make the job's first model                        Claim -> Begun
    train.round   bidi    an order and the model go down, a report and the update come up

A round's call begins with a `Down` that holds the order, followed by the model in pieces; when the work is
done, the client sends an `Up` that holds its report, followed by the update in pieces. How many bytes are to
come both sides know from the layout in the order; a piece too many, or one too few, ends the call. The model
is checked by the digest in the order before anything is made of it.

An aggregator of a tree is a client whose order names `branches`: it passes order and model on to them, and
what it sends up is the mean of their updates and its own, weighted by examples, as one update with all of
their weight. It holds no lease: the coordinator signs, for each aggregator, the order that it may pass on
(`Deputy`).
"""

from __future__ import annotations

import math

import msgspec

from mycel.compute.train.layout import Layout
from mycel.compute.train.trade import Begun, Setting
from mycel.protocol.errors import Refused
from mycel.protocol.limits_train import FederatedLimits
from mycel.protocol.mesh import PeerId
from mycel.protocol.method import Kind, Method
from mycel.protocol.tensor import Tensor


class Claim(msgspec.Struct, frozen=True):
    """By what right somebody orders: the job, the epoch of its lease, and the lease itself, whose form is the
    business of whoever gives out leases (`mycel.compute.train.client.Gate`)."""

    job: str
    epoch: int
    warrant: bytes = b""


class Offered(msgspec.Struct, frozen=True):
    """Yes."""

    held: int = 0
    """The last round whose update this client keeps, 0 for none."""


class Deputy(msgspec.Struct, frozen=True):
    """A coordinator lets an aggregator pass one order on, as it is."""

    coordinator: PeerId
    head: PeerId
    """The aggregator."""
    signature: bytes
    """The coordinator's, over `Order.words`."""


class Order(msgspec.Struct, frozen=True):
    """Work for one round."""

    claim: Claim
    number: int
    layout: Layout
    model: str
    """Digest of the model to come: sha256 of its row."""
    settings: dict[str, Setting]
    seed: int
    train: bool = True
    evaluate: bool = False
    limit_s: float = 600.0
    """After so long nobody waits for the answer."""
    branches: tuple[PeerId, ...] = ()
    deputy: Deputy | None = None
    """With branches: what they are shown by their aggregator, who holds no lease."""

    def words(self, head: PeerId) -> bytes:
        """What a coordinator signs so that `head` may pass this order on."""
        plain = msgspec.structs.replace(self, branches=(), deputy=None)
        return b"mycel-federated-deputy:" + msgspec.msgpack.encode((head, plain))

    def check(self, limits: FederatedLimits) -> Order:
        """Raise `Refused` for what no coordinator of ours sends; returns itself."""
        self.layout.check(limits.model_bytes)
        texts = [value for value in self.settings.values() if isinstance(value, str)]
        is_small = all(len(text) <= limits.text for text in [*self.settings, *texts])
        if len(self.settings) > limits.settings or not is_small or len(self.branches) > limits.branches:
            raise Refused(
                "an order with too many settings, too long ones, or too many branches", reason="order"
            )
        if self.number < 0 or not self.limit_s > 0 or not (self.train or self.evaluate):
            raise Refused("an order for no work, or for no round", reason="order")
        return self


class Missing(msgspec.Struct, frozen=True, array_like=True):
    """A client below an aggregator that gave nothing."""

    client: PeerId
    why: str


class Report(msgspec.Struct, frozen=True):
    """What came of an order."""

    job: str
    epoch: int
    number: int
    model: str
    """Digest of the model that the update was made from."""
    clients: tuple[PeerId, ...]
    """Whose updates are in it: the client's own, and those below it."""
    has_update: bool
    examples: int
    metrics: dict[str, float]
    judged_examples: int
    judged: dict[str, float]
    seconds: float
    """The trainer's own."""
    missing: tuple[Missing, ...] = ()

    def check(self, order: Order, client: PeerId, limits: FederatedLimits) -> Report:
        """Raise `Refused` where it does not answer `order`, "replayed", or makes no sense, "report"."""
        claim = order.claim
        asked = (claim.job, claim.epoch, order.number, order.model)
        if (self.job, self.epoch, self.number, self.model) != asked:
            what = f"round {self.number}, epoch {self.epoch}"
            raise Refused(f"a report of {what}: not what was asked", reason="replayed")
        known = dict.fromkeys((client, *order.branches))
        heard = [*self.clients, *(missing.client for missing in self.missing)]
        if len(dict.fromkeys(heard)) != len(heard) or any(other not in known for other in heard):
            raise Refused("a report that names clients it was not given", reason="report")
        few = len(self.metrics) + len(self.judged) <= limits.metrics
        short = all(len(name) <= limits.text for name in [*self.metrics, *self.judged])
        short = short and all(len(missing.why) <= limits.text for missing in self.missing)
        finite = all(math.isfinite(value) for value in [*self.metrics.values(), *self.judged.values()])
        if not (few and short and finite) or self.examples < 0 or self.judged_examples < 0:
            raise Refused("a report with too many figures, or impossible ones", reason="report")
        if self.has_update != (order.train and bool(self.clients)):
            raise Refused("a report without the update that was asked for", reason="report")
        return self


class Down(msgspec.Struct, frozen=True):
    """From the coordinator: the order, or a piece of the model."""

    order: Order | None = None
    piece: Tensor | None = None


class Up(msgspec.Struct, frozen=True):
    """From the client: the report, or a piece of the update."""

    report: Report | None = None
    piece: Tensor | None = None


OFFER = Method("train.offer", Claim, Offered)
FIRST = Method("train.first", Claim, Begun)
ROUND = Method("train.round", Down, Up, kind=Kind.BIDI)
