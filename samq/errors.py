"""What a person did wrong, or what the machine lacks, in one sentence: what, where, and what to do about it."""


class SamqError(Exception):
    """An error a person can act on. The command line prints it as one sentence and exits with code 2."""


class ToolError(SamqError):
    """A program of llama.cpp failed, hung or is missing; the message names its log."""


class UnreachableError(SamqError):
    """The network, or a server beyond it, failed for now: the same may well work when tried again."""
