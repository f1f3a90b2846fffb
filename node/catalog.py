"""Models as blocks: which this node keeps, which others announce, and how they get here.

Every node states on the board, for each model of which it keeps some, the root's name and what of it is here
(`RootFact`). So a model is found by its name or root wherever a member has it, and who fetches knows whom to
ask first; beyond those in sight Kademlia tells (`mycel.node.providers`). The facts are for finding alone:
what is fetched is asked of every connected member, and checked by its name.

To be loaded, layers are laid out as files in `models/` of the node's home, the small files (config,
tokenizer) first: they are enough to decide which layers to take. One fetch of a model at a time, for each
adds to what is pinned; different models do not wait for each other.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import msgspec
import trio

from mycel.compute.fingerprint import fingerprint_of
from mycel.dht.block.add import add_model
from mycel.dht.block.manifest import EDGE, MODEL_PIN, check_model_name, encode, pin_name
from mycel.dht.block.model import Model, Sources, fetch_manifest, fetch_model, lay_out, read_model
from mycel.dht.block.safetensor import find_files
from mycel.node.blocks import Blocks
from mycel.node.providers import Providers
from mycel.protocol.board import Board
from mycel.protocol.cid import Cid, cid_of, cid_text, parse_cid
from mycel.protocol.errors import RemoteProtocolError, UsageProblem
from mycel.protocol.mesh import PeerId

log = logging.getLogger("mycel.node")

ROOT_KEY = "model-root/"
"""Board: what the author keeps of the model whose root follows."""
ROOTS_MAX = 64
"""Models that a node announces while it runs: an author has room for 256 facts of all kinds."""

SEEK_S = 2.0
"""How long a model that nobody announced yet is waited for before it is looked for elsewhere."""

Progress = Callable[[str, int, int], None]
"""What is done ("hashing", "copying", "fetching"), how much of it is done, and how much there is."""


class RootFact(msgspec.Struct, frozen=True, array_like=True):
    """What an author keeps of a model."""

    name: str
    fingerprint: str
    layers: int
    nbytes: int
    """Of the whole model's weights."""
    held: tuple[tuple[int, int], ...]
    """Spans of layers."""
    edge: bool
    """Whether embeddings and head are there too."""
    content: bytes
    """The same for models that are the same but for their names: a hash over everything else in the root."""


class Catalog:
    """The service. `folder` is where models are laid out."""

    def __init__(self, blocks: Blocks, board: Board, me: PeerId, folder: Path) -> None:
        self.looked = trio.Event()
        """Set once it is known what is kept here."""
        self.providers: Providers | None = None
        """Tells of models, and finds them, beyond those in sight."""
        self._blocks = blocks
        self._board = board
        self._me = me
        self._folder = folder
        self._own: dict[Cid, RootFact] = {}
        self._announced: dict[Cid, None] = {}
        self._turns: dict[Cid, trio.Lock] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Announce what is here until cancelled; started at once."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            if self.providers is not None:
                nursery.start_soon(self.providers.run)
            await self._look_at_all()
            self.looked.set()

    async def _look_at_all(self) -> None:
        store = (await self._blocks.exchange()).store
        for pin in [name for name in store.pins() if name.startswith(MODEL_PIN)]:
            root = parse_cid(pin.removeprefix(MODEL_PIN))
            if not store.has(root):  # it was being added when the node was killed, or nobody had it
                await store.unpin(pin)
                continue
            await self._look(root)

    # --- finding

    def known(self) -> dict[Cid, dict[PeerId, RootFact]]:
        """Who keeps what of which model, this node included."""
        found: dict[Cid, dict[PeerId, RootFact]] = {root: {self._me: own} for root, own in self._own.items()}
        for fact in self._board.facts(ROOT_KEY):
            try:
                root = parse_cid(fact.key.removeprefix(ROOT_KEY))
                told = msgspec.msgpack.decode(fact.value or b"", type=RootFact)
            except (RemoteProtocolError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                continue
            if fact.author != self._me:
                found.setdefault(root, {})[fact.author] = told
        return found

    def find(self, text: str) -> Cid | None:
        """The model of this name, or root; None where nobody announces it.

        Raises `UsageProblem` where several go by the name.
        """
        try:
            return parse_cid(text)
        except RemoteProtocolError:
            pass
        names = {root: next(iter(facts.values())).name for root, facts in self.known().items()}
        roots = [root for root, name in names.items() if name == text]
        roots = roots or [root for root, name in names.items() if name.rpartition("/")[2] == text]
        if len(roots) > 1:
            told = ", ".join(sorted(cid_text(root) for root in roots))
            raise UsageProblem(f"several models go by the name {text}: say which by its root ({told})")
        return roots[0] if roots else None

    async def seek(self, text: str) -> Cid | None:
        """As `find`, with time for members to tell of it: a node that just came knows of none yet."""
        await self.looked.wait()
        try:
            check_model_name(text)
        except RemoteProtocolError:
            return None
        async with self._board.watch(ROOT_KEY) as changes:
            root = self.find(text)
            with trio.move_on_after(SEEK_S):
                while root is None:
                    await changes.__anext__()
                    root = self.find(text)
        return root

    def find_same(self, fingerprint: str) -> Cid | None:
        """The model with this fingerprint, under the root that most announce; None where nobody does, or
        where there are several, for it cannot be told which is meant."""
        counts: dict[Cid, int] = {}
        contents: dict[bytes, None] = {}
        for root, facts in sorted(self.known().items()):
            same = [fact for fact in facts.values() if fact.fingerprint == fingerprint]
            if same:
                counts[root] = len(same)
            contents.update(dict.fromkeys(fact.content for fact in same))
        if len(contents) > 1:
            log.warning("%d models in sight have the fingerprint %s", len(contents), fingerprint)
            return None
        return max(counts, key=lambda root: counts[root], default=None)

    def check_alone(self, root: Cid) -> None:
        """Raise `UsageProblem` where another model in sight would be taken for this one.

        A fingerprint covers a config and the sizes of files, so two fine-tunes may share one; layers of both
        must not be served at once.
        """
        known = self.known()
        own = next(iter(known.get(root, {}).values()), None)
        for other, facts in known.items():
            for fact in facts.values():
                if own and fact.fingerprint == own.fingerprint and fact.content != own.content:
                    raise UsageProblem(
                        f"{own.name} and {fact.name} ({cid_text(other)}) differ in their weights alone, and "
                        "their layers would be taken for each other's: give one of them a config.json of its "
                        'own (another "_name_or_path" will do), add it again, and remove the other root'
                    )

    def is_whole(self, root: Cid, start: int, end: int) -> bool:
        """Whether layers [start:end), with what belongs to them, are announced by anybody."""
        facts = list(self.known().get(root, {}).values())
        needs_edge = any(start == 0 or end == fact.layers for fact in facts)
        return (not needs_edge or any(fact.edge for fact in facts)) and all(
            any(a <= layer < b for fact in facts for a, b in fact.held) for layer in range(start, end)
        )

    def name_of(self, root: Cid) -> str:
        """What the model is called, its root where nobody says."""
        facts = self.known().get(root)
        return next(iter(facts.values())).name if facts else cid_text(root)

    # --- here

    async def add(self, directory: Path, name: str, progress: Progress | None = None) -> Cid:
        """Keep the model in `directory` as blocks, called `name`. Raises as `add_model`."""
        exchange = await self._blocks.exchange()
        fingerprint = await trio.to_thread.run_sync(_fingerprint, directory)
        root = await add_model(
            exchange.store, directory, name=name, fingerprint=fingerprint, progress=progress
        )
        for cid in exchange.store.pinned(pin_name(root)):
            exchange.announce(cid)
        await self._look(root)
        return root

    async def get(self, root: Cid, span: tuple[int, int] | None, progress: Progress | None = None) -> None:
        """Fetch and keep layers [i:j) of a model, None for all. Raises as `fetch_model`."""
        async with self._turn(root):
            await self._fetch(root, span, progress)

    async def prepare(self, root: Cid) -> Path:
        """A directory with the small files, enough to choose layers by.

        Raises as `fetch_manifest`, and as `check_alone`.
        """
        exchange = await self._blocks.exchange()
        async with self._turn(root):
            model = await fetch_manifest(exchange, root, sources=await self._sources(root))
            await self._look(root)
            self.check_alone(root)
            return await lay_out(exchange.store, model, self._folder)

    async def bring(self, root: Cid, span: tuple[int, int], progress: Progress | None = None) -> None:
        """Fetch what a stage of layers [i:j) needs, and lay it out to be loaded. Raises as `fetch_model`."""
        exchange = await self._blocks.exchange()
        async with self._turn(root):
            model = await self._fetch(root, span, progress)
            await lay_out(exchange.store, model, self._folder)

    async def remove(self, root: Cid) -> None:
        """Keep the model no more, and remove its files. Raises `UsageProblem` where nothing of it is here."""
        store = (await self._blocks.exchange()).store
        async with self._turn(root):
            if not store.pinned(pin_name(root)):
                raise UsageProblem(f"nothing of {self.name_of(root)} is kept here; see `mycel models list`")
            self._own.pop(root, None)
            self._board.withdraw(ROOT_KEY + cid_text(root))
            if self.providers is not None:
                self.providers.withdraw(root)
            await store.unpin(pin_name(root))
            await trio.to_thread.run_sync(
                partial(shutil.rmtree, self._folder / cid_text(root), ignore_errors=True)
            )

    async def _fetch(self, root: Cid, span: tuple[int, int] | None, progress: Progress | None) -> Model:
        exchange = await self._blocks.exchange()
        say = None if progress is None else partial(progress, "fetching")
        try:
            sources = await self._sources(root)
            return await fetch_model(exchange, root, span, sources=sources, progress=say)
        finally:
            with trio.CancelScope(shield=True):  # what came stays, and is announced
                await self._look(root)

    async def _sources(self, root: Cid) -> Sources:
        """Whom to ask first: those who announce the model, or provide it."""
        peers = [peer for peer in self.known().get(root, {}) if peer != self._me]
        if self.providers is not None and not self._is_all_here(root):
            peers = await self.providers.meet(root, peers)
        return Sources(first=peers)

    def _is_all_here(self, root: Cid) -> bool:
        own = self._own.get(root)
        return own is not None and own.edge and own.held == (((0, own.layers),) if own.layers else ())

    def _turn(self, root: Cid) -> trio.Lock:
        return self._turns.setdefault(root, trio.Lock())

    async def _look(self, root: Cid) -> None:
        """See what of a model is here, and announce it."""
        model = await read_model((await self._blocks.exchange()).store, root)
        if model is None:
            return
        self._own[root] = fact = _fact_of(model)
        if self.providers is not None:
            self.providers.tell(root)
        if len(self._announced) < ROOTS_MAX or root in self._announced:
            self._announced[root] = None
            self._board.publish(ROOT_KEY + cid_text(root), msgspec.msgpack.encode(fact))


def _fact_of(model: Model) -> RootFact:
    manifest = model.manifest
    return RootFact(
        name=manifest.name,
        fingerprint=manifest.fingerprint,
        layers=manifest.layers,
        nbytes=sum(part.nbytes for part in manifest.parts),
        held=spans_of([layer for layer in sorted(model.parts) if layer != EDGE]),
        edge=EDGE in model.parts,
        content=cid_of(encode(msgspec.structs.replace(manifest, name=""))),
    )


def spans_of(layers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Layers, ordered, as spans [i:j)."""
    if not layers:
        return ()
    breaks = [at for at, (one, other) in enumerate(pairwise(layers), start=1) if other != one + 1]
    borders = [0, *breaks, len(layers)]
    return tuple((layers[i], layers[j - 1] + 1) for i, j in pairwise(borders))


def _fingerprint(directory: Path) -> str:
    try:
        return fingerprint_of(directory, {path.name: path.stat().st_size for path in find_files(directory)})
    except OSError as error:
        raise UsageProblem(
            f"{directory} cannot be read ({error.strerror}): name a model's directory"
        ) from None
