"""One running generation: tokens in, pieces out."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from itertools import pairwise

import msgspec
import trio

from mycel.compute.engine import ModelCard, Sampled
from mycel.compute.infer.contact import Services
from mycel.compute.infer.drive import Drive
from mycel.compute.infer.messages import TokenFrame
from mycel.compute.infer.owner import OwnerSession
from mycel.compute.infer.request import (
    GenerateRequest,
    GenerationFailed,
    Piece,
    Report,
    RequestInvalid,
    RouteStage,
    Token,
)
from mycel.compute.textstream import TextStream
from mycel.compute.tokenizer import Tokenizer
from mycel.protocol.errors import MycelError
from mycel.protocol.mesh import PeerId


class Generation:
    """Iterate it for pieces; leave its context to cancel it everywhere."""

    def __init__(
        self,
        request: GenerateRequest,
        card: ModelCard,
        tokenizer: Tokenizer | None,
        session: OwnerSession,
        services: Services,
    ) -> None:
        self.request = request
        self.card = card
        self.drive = Drive(session, card, services, self._on_news)
        self._session = session
        self._links = services.links
        self._tokenizer = tokenizer
        self._text = _text_stream(tokenizer, request)
        eos = card.eos_tokens if tokenizer is None else (*card.eos_tokens, *tokenizer.eos_tokens)
        self._stop_tokens = frozenset(eos if request.stop_tokens is None else request.stop_tokens)
        self._read = 0  # tokens given to the client
        self._shown = 0  # ...those of them that count as output
        self._began = trio.current_time()
        self._finish: str | None = None
        self._failure: MycelError | None = None
        self._echo = request.echo
        self._news = trio.Event()
        self._scope = trio.CancelScope()

    @property
    def session(self) -> str:
        """The session's id."""
        return self._session.job.session

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's token ids."""
        return self._session.job.prompt

    @property
    def route(self) -> tuple[RouteStage, ...]:
        """Who runs it now."""
        return self._session.route

    # --- the ring's side

    def on_token(self, peer: PeerId, frame: TokenFrame) -> None:
        """A token came."""
        if self._session.on_token(peer, frame, trio.current_time()):
            self._news.set()
        elif self._session.is_gap(frame):
            self.drive.on_gap()

    async def keep_going(self) -> None:
        """Drive the session until it ends."""
        with self._scope:
            try:
                await self.drive.run()
            except MycelError as error:
                self._failure = error
            finally:
                if self._failure is None and self._finish is None:
                    self._failure = GenerationFailed("this node stops")
                self._news.set()

    def end(self) -> None:
        """It is over: free it everywhere."""
        if self._finish is None:
            self._finish = "cancelled" if self._failure is None else "failed"
        self._scope.cancel()
        self.drive.dismiss_all()

    def _on_news(self) -> None:
        self._news.set()

    # --- the client's side

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        """The next piece: all tokens that came since the last. Raises as `Generator.generate` says."""
        if self._echo:
            self._echo = False
            text = self.request.prompt
            if isinstance(text, tuple):
                text = "" if self._tokenizer is None else self._tokenizer.decode(text)
            return Piece(text)
        if self._finish is not None:
            raise StopAsyncIteration
        while self._read == len(self._session.drawn):
            if self._failure is not None:
                raise self._failure
            self._news = trio.Event()
            await self._news.wait()
        await trio.lowlevel.checkpoint_if_cancelled()
        return self._next_piece()

    def _next_piece(self) -> Piece:
        text, tokens = "", []
        finish: str | None = None
        began = self._read
        while self._read < len(self._session.drawn) and finish is None:
            drawn = self._session.drawn[self._read]
            self._read += 1
            if drawn.token in self._stop_tokens:
                finish = "stop"
                break
            self._shown += 1
            tokens.append(self._token(drawn))
            if self._text is not None:
                text += self._text.push(drawn.token)
                if self._text.stopped is not None:
                    finish = "stop"
            if finish is None and self._session.complete and self._read == len(self._session.drawn):
                finish = "length"
        if finish is None:
            self._grant(self._read - began)
        else:
            text += "" if self._text is None else self._text.finish()
            self._finish = finish
            self.end()
        return Piece(text, tuple(tokens), finish)

    def _grant(self, count: int) -> None:
        credit = self._session.on_consumed(count, trio.current_time())
        if credit is not None and self._session.route:
            self._links.send(self._session.route[0].peer, credit)
            self.drive.nudge()

    def _token(self, drawn: Sampled) -> Token:
        name = (lambda token: "") if self._tokenizer is None else self._tokenizer.token_text
        top = tuple((token, name(token), logprob) for token, logprob in drawn.top)
        return Token(drawn.token, name(drawn.token), drawn.logprob, top)

    @property
    def report(self) -> Report:
        """How it went so far; final once iteration ended."""
        session = self._session
        times = session.times[: self._read] or [math.nan]
        ends = [self._began, *session.times]
        failovers = []
        for failover in self.drive.failovers:
            drawn = failover.position - len(self.prompt)
            after = ends[drawn + 1] if drawn + 1 < len(ends) else trio.current_time()
            failovers.append(msgspec.structs.replace(failover, stall_s=after - ends[drawn]))
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return Report(
            session=self.session,
            model=self.card.name,
            route=session.route,
            prompt_tokens=len(self.prompt),
            tokens=self._shown,
            first_token_s=times[0] - self._began,
            tokens_per_s=len(gaps) / sum(gaps) if sum(gaps) > 0 else 0.0,
            failovers=tuple(failovers),
            longest_gap_s=max(gaps, default=0.0),
            gap_min=min((drawn.gap for drawn in session.drawn[: self._read]), default=math.inf),
            finish=self._finish or "running",
        )


def _text_stream(tokenizer: Tokenizer | None, request: GenerateRequest) -> TextStream | None:
    if tokenizer is None:
        return None
    try:
        return tokenizer.stream(request.stop)
    except ValueError as error:
        raise RequestInvalid(str(error)) from None
