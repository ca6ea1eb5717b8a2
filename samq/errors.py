"""Errors that the user can fix. The message is one sentence: what is wrong, where, and what to do."""


class SamqError(Exception):
    """An error that the user can fix. The command line prints its message and exits with code 2."""


class TextError(SamqError):
    """A text that cannot be tokenized. Another text can."""


class ToolError(SamqError):
    """A program of llama.cpp failed, timed out or is missing; the message names its log."""


class UnreachableError(SamqError):
    """A server, the network or a file cannot be reached now. The same request may succeed later."""


class NotRegisteredError(SamqError):
    """MLflow answered, and its registry has no such model, version or alias."""
