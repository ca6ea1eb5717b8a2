"""Texts that llama.cpp's tokenizers cannot take as they are, and the stack that they need.

Most of llama.cpp's BPE vocabularies cut a text by regular expressions of C++'s standard library. GCC's recurses once for
each character of a match. So a run of 20,000 letters, spaces or dashes overflows the stack of a usual thread, which ends
the process. Such a text is tokenized in a thread with a stack that is large enough; the tokens are the same.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from samq.errors import SamqError, TextError

T = TypeVar("T")

LONGEST_MATCH = 2**20  # characters; the stack for it is 1 GiB of addresses, of which llama.cpp touches 0.4 GiB
_BYTES_A_CHARACTER = 1024  # measured: up to 370 bytes of stack for each character of a match (GCC 12, -O3)
_SMALL_MATCH = 1024  # characters for which the stack of any thread suffices
# `tokenizer.ggml.model` of vocabularies without patterns, and `tokenizer.ggml.pre` of those that have code of their own
_NO_PATTERNS = frozenset({"llama", "bert", "t5", "rwkv", "plamo2"})
_OWN_CODE = frozenset({"gpt-2", "llama-bpe", "qwen2", "qwen35", "kimi-k2", "gemma4"})
_MOST_DIGITS = {"superbpe": 4096}  # in a run: those that take a time of its square, a second for 4096
_SPANS_SPACES = frozenset({"exaone-moe"})  # pre-tokenizers with matches of several words
_one_large_stack = threading.Lock()  # at a time: they share memory, and `threading.stack_size` is the whole process's


def _table(characters: str) -> NDArray[np.bool_]:
    """Whether a code point is one of these; for all beyond the last of them, the table's last entry says no."""
    codes = [ord(character) for character in characters]
    table = np.zeros(max(codes) + 2, bool)
    table[codes] = True
    return table


# White space for C++, for llama.cpp or for both: where it is unclear, a character may lengthen either kind of run.
_SURE_SPACES = _table(" \t\n\v\f\r")
_POSSIBLE_SPACES = _table("".join(chr(code) for code in range(0x3001) if chr(code).isspace()))
_LINE_ENDS = _table("\r\n/")  # some patterns count slashes among them
_DIGITS = _table("0123456789")
_CLAUSE_ENDS = _table("".join(chr(code) for code in range(128) if not (chr(code).isalpha() or chr(code) == " ")))


def stack_bytes(text: str, tokenizer: str, pretokenizer: str) -> int:
    """Bytes of stack that llama.cpp needs to tokenize this text; 0: any thread's suffices.

    The vocabulary is named as in the file's `tokenizer.ggml.model` and `tokenizer.ggml.pre`. Raises TextError if the text
    needs more than 1 GiB, or too long a time, and SamqError for a vocabulary that llama.cpp cannot tokenize with.
    """
    # two spaces would end the process (`find_bpe_rank` in llama-vocab.cpp)
    if (tokenizer, pretokenizer) == ("gpt2", "whitespace"):
        raise SamqError(
            "llama.cpp cannot tokenize with tokenizer.ggml.pre whitespace in a vocabulary of kind gpt2; convert the "
            "model again with this llama.cpp"
        )
    if len(text) <= _SMALL_MATCH or tokenizer in _NO_PATTERNS or pretokenizer in _OWN_CODE:
        return 0
    if most := _MOST_DIGITS.get(pretokenizer):
        digits = _longest_run(_is_in(_codes(text), _DIGITS))
        if digits > most:
            raise TextError(
                f"a text has {digits} digits in a row, and the tokenizer {pretokenizer} takes {most} in a fair time; break it "
                "with white space, or shorten it"
            )
    longest = _longest_match(text, pretokenizer)
    if longest > LONGEST_MATCH:
        raise TextError(
            f"a text has {longest} characters without a break, and llama.cpp's tokenizers take {LONGEST_MATCH}; break it "
            "with white space, or shorten it"
        )
    return 0 if longest <= _SMALL_MATCH else longest * _BYTES_A_CHARACTER


def with_stack(function: Callable[[], T], stack: int) -> T:
    """Call a function in a thread with this many bytes of stack; 0: in this thread.

    Raises SamqError if there is no memory for the thread.
    """
    if not stack:
        return function()
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    with _one_large_stack:
        usual = threading.stack_size(stack)
        try:
            thread = threading.Thread(target=work, name="tokenizer", daemon=True)
            thread.start()
        except RuntimeError as error:
            raise SamqError(
                f"there are no {stack / 2**20:.0f} MiB of memory to tokenize a long run of text; shorten it"
            ) from error
        finally:
            threading.stack_size(usual)
        try:
            thread.join()
        finally:
            thread.join()  # also after Ctrl-C: the caller may free what the function uses
    return future.result()


def _longest_match(text: str, pretokenizer: str) -> int:
    """A bound on the characters of one match: of white space, then a word, then line ends, whatever the pattern."""
    codes = _codes(text)
    words = _longest_run(~_is_in(codes, _SURE_SPACES))
    if pretokenizer in _SPANS_SPACES:
        words = max(words, _longest_run(~_is_in(codes, _CLAUSE_ENDS)))
    return words + _longest_run(_is_in(codes, _POSSIBLE_SPACES)) + _longest_run(_is_in(codes, _LINE_ENDS))


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _is_in(codes: NDArray[np.uint32], table: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return table[np.minimum(codes, len(table) - 1)]


def _longest_run(mask: NDArray[np.bool_]) -> int:
    """Length of the longest run of true values."""
    breaks = np.concatenate([[-1], np.flatnonzero(~mask), [len(mask)]])
    return int(np.diff(breaks).max()) - 1
