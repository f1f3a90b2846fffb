"""Tokens to text while they come, and stop strings across their borders.

One token is not one text: a character's UTF-8 bytes may be spread over several tokens, and a decoder may
treat the first token of a text unlike the others (a dropped leading space). So a short window of the last
tokens is decoded again with each new one, and what the window gained is the new text. Replacement
characters at the window's end may be the first bytes of a character: up to three wait for the rest.

Stop strings are looked for in the text, not in the tokens: the one that is complete first ends the text
before its first character. Text that may be the beginning of a stop string is held back until it is not.
How the text was cut into tokens changes neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

WINDOW_TOKENS_MAX = 32
"""Tokens decoded with each new one, at most."""
WINDOW_TOKENS_KEPT = 8
"""Tokens kept as context when the window moves on: an unfinished character has at most 3 before it."""
UNFINISHED_MAX = 3
"""Replacement characters that a UTF-8 character's first bytes can show as."""
STOPS_MAX = 64
STOP_CHARS_MAX = 1024
REPLACEMENT = "�"


class Detokenizer:
    """Text of tokens as they come. `decode` must skip no token and end in U+FFFD for unfinished bytes."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that were returned
        self._text = ""

    def push(self, token: int) -> str:
        """What `token` makes certain of the text; "" while it is not a whole character."""
        self._window.append(token)
        self._text = self._decode(self._window)
        held = 0
        while held < UNFINISHED_MAX and self._text.endswith(REPLACEMENT, 0, len(self._text) - held):
            held += 1
        new = self._text[self._emitted : len(self._text) - held]
        self._emitted += len(new)
        if len(self._window) >= WINDOW_TOKENS_MAX:
            self._move_window()
        return new

    def flush(self) -> str:
        """The unfinished end: replacement characters, if anything waits."""
        new = self._text[self._emitted :]
        self._emitted += len(new)
        return new

    def _move_window(self) -> None:
        waiting = len(self._text) - self._emitted
        rest = self._window[-WINDOW_TOKENS_KEPT:]
        text = self._decode(rest)
        if text:
            self._window, self._text, self._emitted = rest, text, len(text) - waiting


class StopFinder:
    """Finds the first complete stop string in a text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises `ValueError` for an empty stop string, or too many or too long ones."""
        if any(not stop for stop in stops):
            raise ValueError("an empty stop string would stop at once; leave it out")
        if len(stops) > STOPS_MAX or any(len(stop) > STOP_CHARS_MAX for stop in stops):
            raise ValueError(f"at most {STOPS_MAX} stop strings of {STOP_CHARS_MAX} characters")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text; the longest, should several be complete at once."""

    def push(self, text: str) -> str:
        """What of the text so far is certain to stand before any stop string. After a stop, ""."""
        if self.found is not None or not text:
            return ""
        if not self._stops:
            return text
        self._held += text
        ends = []
        for stop in self._stops:
            at = self._held.find(stop)
            if at >= 0:
                ends.append((at + len(stop), at, stop))
        if ends:
            _, at, self.found = min(ends)
            held, self._held = self._held[:at], ""
            return held
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def flush(self) -> str:
        """The held text: it was not a stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, short of the whole."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """One answer's text from its tokens: special tokens skipped, stop strings found."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        special: Mapping[int, str],
        stops: Sequence[str] = (),
    ) -> None:
        """`special`: ids that have no text, with their names: a stop string may be such a name.

        Raises `ValueError` as `StopFinder` does.
        """
        self._detokenizer = Detokenizer(decode)
        self._finder = StopFinder(stops)
        self._special = special
        self._stops = frozenset(stops)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._finder.found

    def push(self, token: int) -> str:
        """The text that `token` lets go; "" for none. After a stop, always ""."""
        if self.stopped is not None:
            return ""
        name = self._special.get(token)
        if name is None:
            return self._finder.push(self._detokenizer.push(token))
        if name not in self._stops:
            return ""
        text = self.finish()
        if self._finder.found is None:
            self._finder.found = name
        return text

    def finish(self) -> str:
        """The rest of the text when no more tokens come (or the special stop token came)."""
        if self.stopped is not None:
            return ""
        text = self._finder.push(self._detokenizer.flush())
        return text if self.stopped is not None else text + self._finder.flush()
