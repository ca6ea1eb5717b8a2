"""Bytes of tokens -> text that may be sent: whole characters, and nothing of a stop sequence."""

import codecs
from collections.abc import Sequence


class TextAssembler:
    """Takes the pieces of tokens one by one, and gives out text as soon as nothing that follows can change it."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` end the text before the first of them to appear; none is empty."""
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._decoded = 0  # characters
        self.start = 0  # character of the text that the last piece begins in
        self.sent = 0  # characters that were given out
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """Take a token's bytes; returns what can be sent now, which may be nothing."""
        first = self._decoder.decode(piece[:1])  # may end with the character of this byte, if that is a whole one
        unfinished = self._decoder.getstate()[0]
        self.start = self._decoded + len(first) - (1 if first and not unfinished else 0)
        new = first + self._decoder.decode(piece[1:])
        self._decoded += len(new)
        return self._release(new, last=False)

    def finish(self) -> str:
        """What is left when no more tokens come; an unfinished character becomes U+FFFD."""
        return "" if self.stopped else self._release(self._decoder.decode(b"", True), last=True)

    def _release(self, new: str, *, last: bool) -> str:
        text = self._held + new
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return self._send(text[: min(found)])
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return self._send(text[: len(text) - keep])

    def _send(self, text: str) -> str:
        self.sent += len(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
