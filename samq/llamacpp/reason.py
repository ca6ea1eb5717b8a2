"""The reason in a failed program's log: seldom the last line, since others only report that the program failed."""

import re

_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt|Iteration)(?::.*)?$")
_CODE_OF = re.compile(r'^  File ".*", line \d+, in ')
_MEANINGLESS = re.compile(r"^(?:AssertionError|\w+Error)$|^(?:KeyError|IndexError|AttributeError|UnboundLocalError)\b")
_ERROR = re.compile(
    r"\b(?:error|errors|failed|failure|fatal|abort\w*|terminate called|cannot|can't|could not|unable"
    r"|unsupported|non-finite|invalid|missing|not enough|need at least|too few|out of memory|no such file"
    r"|bailing out)\b|GGML_ASSERT|bad_alloc",
    re.IGNORECASE,
)
# Lines that say no more than that the program failed: the reason is in another.
_REPORT = re.compile(
    r"failed to (?:quantize model from|load model|load the model|create context|initialize)|unable to load model"
    r"|error loading model$|^exiting",
    re.IGNORECASE,
)
_NOT_ERRORS = re.compile(r"\bwarn|\bkv +\d+:|print_info:|^\s*\[ *\d+/ *\d+\]|^(?:INFO|DEBUG)\b", re.IGNORECASE)


def reason_in(log: str) -> str:
    """The line of a program's log that says why it failed, or the last line if none does.

    That is a last line `error: ...`, as SAMQ's own processes end. Without one it is the exception that ended a Python program,
    with the line of code if it says nothing by itself. Otherwise it is the first error that is more than a report of failure.
    """
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    if not lines:
        return "no output"
    if lines[-1].startswith("error: ") and not _REPORT.search(lines[-1]):  # SAMQ's own processes end with the reason
        return lines[-1]
    if exception := _exception(lines):
        return exception
    errors = [line.strip() for line in lines if _ERROR.search(line) and not _NOT_ERRORS.search(line)]
    reasons = [line for line in errors if not _REPORT.search(line)]
    return (reasons or errors or [lines[-1].strip()])[0].lstrip("= ")


def _exception(lines: list[str]) -> str:
    """The last exception of a Python program; empty if it ended without a traceback."""
    if not any(line.startswith("Traceback (most recent call last)") for line in lines):
        return ""
    places = [index for index, line in enumerate(lines) if _EXCEPTION.match(line)]
    if not places:
        return ""
    message = lines[places[-1]]
    if not _MEANINGLESS.match(message):
        return message
    code = [lines[index + 1] for index in range(places[-1] - 1) if _CODE_OF.match(lines[index])]
    return f"{message} in `{code[-1].split('  # ')[0].strip()}`" if code else message
