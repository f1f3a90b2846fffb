"""The control API of models as blocks: what is kept here and elsewhere, adding, getting and removing.

    GET  /control/models/kept      [KeptView, ...]
    POST /control/models/add       AddAsk -> lines of ProgressEvent, the last with a KeptView
    POST /control/models/get       GetAsk -> the same
    POST /control/models/remove    RemoveAsk -> {}
    POST /control/models/serve     ServeAsk -> lines of ProgressEvent, the last with a StageView

A client that goes away ends adding or getting; what was done stays done, and the next try goes on from there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from mycel.node.answer import Note, decode
from mycel.node.catalog import RootFact
from mycel.node.running import Node
from mycel.node.views import AddAsk, GetAsk, KeeperView, KeptView, RemoveAsk, ServeAsk
from mycel.protocol.cid import Cid, cid_text
from mycel.protocol.errors import UsageProblem
from mycel.protocol.mesh import PeerId

Route = Callable[[bytes], Awaitable[object]]
SlowRoute = Callable[[bytes, Note], Awaitable[object]]


class ModelRoutes:
    """The routes, to be answered by `Control`: at once, or (`slow`) in lines."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.routes: Mapping[tuple[str, str], Route] = {
            ("GET", "/control/models/kept"): self._kept,
            ("POST", "/control/models/remove"): self._remove,
        }
        self.slow: Mapping[str, SlowRoute] = {
            "/control/models/add": self._add,
            "/control/models/get": self._get,
            "/control/models/serve": self._serve,
        }

    async def _kept(self, body: bytes) -> object:
        await self._node.catalog.looked.wait()
        known = self._node.catalog.known()
        views = [self._view(root, facts) for root, facts in known.items()]
        return sorted(views, key=lambda view: (view.name, view.root))

    async def _add(self, body: bytes, note: Note) -> object:
        ask = decode(body, AddAsk)
        return await self._view_of(await self._node.catalog.add(Path(ask.directory), ask.name, note))

    async def _get(self, body: bytes, note: Note) -> object:
        ask = decode(body, GetAsk)
        root = await self._find(ask.model)
        await self._node.catalog.get(root, ask.layers, note)
        return await self._view_of(root)

    async def _serve(self, body: bytes, note: Note) -> object:
        ask = decode(body, ServeAsk)
        return await self._node.serve(ask.model, ask.layers, note)

    async def _remove(self, body: bytes) -> object:
        root = await self._find(decode(body, RemoveAsk).model)
        if any(lent.root == root for lent in self._node.lender.lent):
            raise UsageProblem(
                f"{self._node.catalog.name_of(root)} is served from its blocks here: restart the node "
                "without serving it first"
            )
        await self._node.catalog.remove(root)
        return {}

    async def _find(self, text: str) -> Cid:
        await self._node.catalog.looked.wait()
        root = self._node.catalog.find(text)
        if root is None:
            raise UsageProblem(
                f"no connected member keeps {text} as blocks: see `mycel models list`, or add it where its "
                "files are, with `mycel models add`"
            )
        return root

    async def _view_of(self, root: Cid) -> KeptView:
        return self._view(root, self._node.catalog.known()[root])

    def _view(self, root: Cid, facts: Mapping[PeerId, RootFact]) -> KeptView:
        me = self._node.host.peer_id
        keepers = {
            peer: KeeperView(peer, self._node.label_of(peer), fact.held, fact.edge)
            for peer, fact in sorted(facts.items())
        }
        some = next(iter(facts.values()))
        return KeptView(
            name=some.name,
            root=cid_text(root),
            fingerprint=some.fingerprint,
            layers=some.layers,
            nbytes=some.nbytes,
            here=keepers.pop(me, None),
            others=tuple(keepers.values()),
        )
