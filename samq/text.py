"""Text as bytes."""

from samq.errors import TextError

_LONGEST_SHOWN = 40  # characters of a text in a message


def encode(text: str, what: str = "a text") -> bytes:
    """The text as UTF-8; raises TextError for half a character (a lone surrogate), which JSON can hold."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - _LONGEST_SHOWN // 2) : error.start + _LONGEST_SHOWN // 2]
        raise TextError(
            f"character {error.start + 1} of {what} is half a character ({near!a}), a lone surrogate; remove it"
        ) from error
