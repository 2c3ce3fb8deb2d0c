"""Token ids -> text, one token at a time: no split characters, no text of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

TokenBytes = Callable[[int], bytes]


class TextStream:
    """Gives text as soon as it is certain. What it gave is a pure function of the tokens so far.

    Bytes of an unfinished character wait for the rest; characters that may begin a stop string
    wait until they do or do not.
    """

    def __init__(self, token_bytes: TokenBytes, stops: Sequence[str]) -> None:
        self._token_bytes = token_bytes
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` made certain. Nothing follows a stop string."""
        return self._release(self._decoder.decode(self._token_bytes(token)))

    def flush(self) -> str:
        """The rest, once no further token comes: what might have become a stop string did not."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        self._held += text
        cut = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            released, self._held = self._held[:cut], ""
            return released
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is shorter than it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
