"""Documents in the daemon: who may write them, and that those whose membership ended leave the library.

An author's membership chain travels with its document, so a node can judge an author that it never met: the
chain names the peer whose key signed the document's head. Everything else of documents is `mycel.dht.doc`.
"""

from __future__ import annotations

import logging

import trio

from mycel.dht.doc.library import Library
from mycel.dht.doc.store import DocumentStore
from mycel.dht.doc.sync import Documents
from mycel.protocol.chain import Grant, check_time, encode_chain
from mycel.protocol.errors import Refused
from mycel.protocol.limits import DEFAULT_LIMITS
from mycel.protocol.limits_doc import DEFAULT_DOCUMENT_LIMITS, DocumentLimits
from mycel.protocol.membership import Membership
from mycel.protocol.mesh import Access, Mesh, PeerId
from mycel.protocol.rpc import Rpc

log = logging.getLogger("mycel.node")

LOOK_S = 10.0
"""Between two looks at whose membership has ended; little beside the tolerance for clocks that differ."""


class Authors:
    """Who may write documents here. Good chains are remembered: a judgement costs two signatures."""

    def __init__(self, mesh: Mesh, membership: Membership, most: int) -> None:
        self._mesh = mesh
        self._membership = membership
        self._most = most
        self._good: dict[PeerId, tuple[bytes, Grant]] = {}

    def may_write(self, author: PeerId, chain: bytes) -> bool:
        """Whether `chain` makes `author` a member of this swarm now."""
        try:
            known, grant = self._good.get(author, (b"", None))
            if grant is None or known != chain:
                grant = self._membership.judge(author, chain)
                self._remember(author, chain, grant)
            check_time(grant, self._mesh.wall(), DEFAULT_LIMITS.clock_skew_s)
        except Refused:
            return False
        return grant.access >= Access.MEMBER

    def _remember(self, author: PeerId, chain: bytes, grant: Grant) -> None:
        self._good[author] = (chain, grant)
        if len(self._good) > self._most:
            del self._good[next(iter(self._good))]


class DocumentService:
    """The daemon's documents, and their upkeep."""

    def __init__(
        self,
        mesh: Mesh,
        rpc: Rpc,
        membership: Membership,
        store: DocumentStore,
        limits: DocumentLimits = DEFAULT_DOCUMENT_LIMITS,
    ) -> None:
        self._mesh = mesh
        self._membership = membership
        self._chain = encode_chain(membership.credentials.chain)
        self.authors = Authors(mesh, membership, limits.authors)
        self._library = Library(mesh, store, self.authors.may_write, chain=self._chain, limits=limits)
        self.documents = Documents(mesh, rpc, self._library, limits)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Push, compare and keep order until cancelled. A node that is no member has no documents."""
        if self._membership.own_grant().access < Access.MEMBER:
            task_status.started()
            return
        async with trio.open_nursery() as nursery:
            await nursery.start(self.documents.run)
            task_status.started()
            while True:
                self._look()
                await trio.sleep(LOOK_S)

    def _look(self) -> None:
        """Show the newest chain, and let go of those who may not write any more."""
        chain = encode_chain(self._membership.credentials.chain)
        if chain != self._chain:
            self._chain = chain
            self.documents.renew(chain)
        for author in self._library.authors:
            document = self._library.document(author)
            if author == self._mesh.peer_id or document is None:
                continue
            if not self.authors.may_write(author, document.chain):
                log.info("the membership of %s has ended: its document is dropped", author)
                self._library.forget(author)
