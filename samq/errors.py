"""What a person did wrong, or what the machine lacks, in one sentence: what, where, and what to do about it."""


class SamqError(Exception):
    """An error a person can act on. The command line prints it as one sentence and exits with code 2."""


class ToolError(SamqError):
    """A program of llama.cpp failed, hung or is missing; the message names its log."""


class UnreachableError(SamqError):
    """A server, the network or a file cannot be reached now; the same may work when tried again."""


class NotRegisteredError(SamqError):
    """MLflow answered, and its registry has no such model, version or alias."""
