"""Turns the bytes of tokens into text that can be sent: whole characters, and no part of a stop sequence."""

import codecs
from collections.abc import Sequence


class TextAssembler:
    """Takes the bytes of one token after another, and returns text as soon as later tokens cannot change it."""

    def __init__(self, stops: Sequence[str]) -> None:
        """The text ends before the first of the `stops` to appear; none of them is empty."""
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._unsent = ""  # the end of the text, which may be the beginning of a stop sequence
        self._decoded = 0  # characters
        self.start = 0  # index of the character that the last piece begins in
        self.sent = 0  # characters that were returned
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """Add a token's bytes; returns the text that can be sent now, which may be empty."""
        first = self._decoder.decode(piece[:1])  # ends with the character of this byte if that completes it
        unfinished = self._decoder.getstate()[0]
        self.start = self._decoded + len(first) - (1 if first and not unfinished else 0)
        new = first + self._decoder.decode(piece[1:])
        self._decoded += len(new)
        return self._release(new, last=False)

    def finish(self) -> str:
        """The rest of the text after the last token; an incomplete character becomes U+FFFD."""
        return "" if self.stopped else self._release(self._decoder.decode(b"", True), last=True)

    def _release(self, new: str, *, last: bool) -> str:
        text = self._unsent + new
        positions = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if positions:
            self.stopped, self._unsent = True, ""
            return self._send(text[: min(positions)])
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._unsent = text[len(text) - keep :]
        return self._send(text[: len(text) - keep])

    def _send(self, text: str) -> str:
        self.sent += len(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
