"""What a grammar costs llama.cpp: one in GBNF, or a pattern of a JSON schema.

llama.cpp follows all matches of a text at once. Its time for a token grows with their number, and with the ways to match the
token. So a grammar's matches at once are the most that can be at one place, or the ways to match `_LENGTH` characters divided
by `_WAYS_A_MATCH`. Both are read off its automaton, whose states are the atoms of the grammar (Glushkov 1961).

llama.cpp writes out repetitions, and what it writes fills the memory: the grammar's elements.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_LENGTH = 8  # characters: of a vocabulary of 49,000 few tokens fail later
_WAYS_A_MATCH = 500  # a match takes 0.3 ms of a token's time there, as do so many ways
TURNS = 12  # of a rule that leads back to itself: its matches multiply with each
_MOST_ATOMS = 5000  # of a pattern or grammar with its rules inserted; bounds the time of this module
_MOST_EDGES = 50_000
_MOST_REPETITIONS = 2000  # beyond it llama.cpp takes a repetition for one without an end
_MOST_DEPTH = 100  # of groups; llama.cpp does not use deeper patterns
_MOST_COPIES = 40  # of a repeated part: if it may be empty, so many are already too costly
TOO_MUCH = 10**9  # numbers stop there
MOST_WORK = 50_000  # of counting, for a request: about half a second
TOO_LARGE = "it is too large to count in how many ways at once a text can match it; shorten it"
BACKWARDS = "a minimum of repetitions exceeds its maximum; swap them"  # llama.cpp would fill the memory
_CHARACTERS = 128 + 2**11 + 1  # ASCII, blocks of 32 others, and one that stands for the rest

_PATTERN_TOKEN = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{[^}]*\}|\(\?:|.", re.DOTALL)
_FROM_TO = re.compile(r"\{\s*(\d+)\s*,\s*(\d+)\s*\}")
_GRAMMAR_TOKEN = re.compile(
    r'#[^\n]*|[\w-]+\s*::=|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|!?<[^>]*>|[\w-]+|\{[^}]*\}|[|()*+?.]', re.DOTALL
)
_CLASS_RANGE = re.compile(r"(\\.|.)(?:-(\\.|[^\]]))?", re.DOTALL)


class UnusableGrammar(ValueError):
    """A grammar or schema that llama.cpp must not be given; the message says why, and what to do."""


class Cost(NamedTuple):
    """What a grammar, or a schema that becomes one, costs: matches at once, and elements; and the work of counting them.

    A pattern or grammar takes 100 units of work, and one for each atom: about a second for 100,000.
    """

    matches: int
    elements: int
    work: int = 0


# A node of a parsed pattern: an atom, a sequence, alternatives, a repetition or the name of a rule.
@dataclass(frozen=True)
class _Atom:
    characters: npt.NDArray[np.bool_]  # that it may begin with
    length: int = 1
    elements: int = 1


@dataclass(frozen=True)
class _Concatenation:
    parts: list["_Node"]


@dataclass(frozen=True)
class _Alternatives:
    parts: list["_Node"]


@dataclass(frozen=True)
class _Repetition:
    part: "_Node"
    least: int
    most: int | None


_Node = _Atom | _Concatenation | _Alternatives | _Repetition | str


@lru_cache(maxsize=1024)
def pattern_cost(pattern: str) -> Cost:
    """Of a regular expression in a schema. Raises UnusableGrammar."""
    tokens = [match[0] for match in _PATTERN_TOKEN.finditer(pattern) if match[0] not in "^$"]
    return _cost({"": _parsed(tokens, _pattern_atom) or _Concatenation([])}, "")  # llama.cpp takes any text if too deep


def counts_backwards(pattern: str) -> bool:
    """Whether a repetition in a regular expression has a minimum above its maximum: llama.cpp would fill the memory with it."""
    counts = [_FROM_TO.fullmatch(match[0]) for match in _PATTERN_TOKEN.finditer(pattern)]
    return any(int(count[1][:9]) > int(count[2][:9]) for count in counts if count)


def grammar_cost(text: str) -> Cost:
    """Of a grammar in GBNF. Raises UnusableGrammar."""
    rules: dict[str, list[str]] = {}
    tokens: list[str] = []
    for match in _GRAMMAR_TOKEN.finditer(text):
        token = match[0]
        if token.endswith("::="):
            tokens = rules[token[:-3].strip()] = []
        elif not token.startswith("#"):
            tokens.append(token)
    nodes = {name: node for name, tokens in rules.items() if (node := _parsed(tokens, _grammar_atom))}
    if len(nodes) < len(rules):
        raise UnusableGrammar(TOO_LARGE)
    return _cost(nodes, "root")


def _parsed(tokens: list[str], atom: Callable[[str], "_Node"]) -> _Node | None:
    """None if groups are nested too deep."""
    levels: list[list[list[_Node]]] = [[[]]]  # alternatives of each open group
    for token in tokens:
        sequence = levels[-1][-1]
        if token in ("(", "(?:"):
            levels.append([[]])
        elif token == ")" and len(levels) > 1:
            group = levels.pop()
            levels[-1][-1].append(_Alternatives([_Concatenation(parts) for parts in group]))
        elif token == "|":
            levels[-1].append([])
        elif token in ("*", "+", "?") or token.startswith("{"):
            if sequence:
                sequence[-1] = _Repetition(sequence[-1], *_counts(token))
        else:
            sequence.append(atom(token))
        if len(levels) > _MOST_DEPTH + 1:
            return None
    return _Alternatives([_Concatenation(parts) for parts in levels[0]])


def _counts(token: str) -> tuple[int, int | None]:
    if token in "*+?":
        return int(token == "+"), 1 if token == "?" else None
    least, comma, most = (part.strip()[:9] for part in token.strip("{}").partition(","))
    count = int(least) if least.isdigit() else 0
    if not comma:
        return count, count
    return count, int(most) if most.isdigit() and int(most) <= _MOST_REPETITIONS else None


def _pattern_atom(token: str) -> _Node:
    return _class(token[1:-1]) if len(token) > 1 and token[0] == "[" else _literal(token)


def _grammar_atom(token: str) -> _Node:
    if token[0] == "[":
        return _class(token[1:-1])
    if token[0] == '"':
        return _literal(token[1:-1]) if len(token) > 2 else _Concatenation([])
    if token[0] in "!<.":
        return _Atom(np.ones(_CHARACTERS, np.bool_))
    return token


def _literal(text: str) -> _Atom:
    characters = np.zeros(_CHARACTERS, np.bool_)
    if text == "." or text[0] == "\\":
        characters[:] = True
    else:
        characters[_index(text[0])] = True
    length = len(text) - text.count("\\")
    return _Atom(characters, max(1, length), max(1, length))


def _class(text: str) -> _Atom:
    characters = np.zeros(_CHARACTERS, np.bool_)
    ranges = list(_CLASS_RANGE.finditer(text.removeprefix("^")))
    for match in ranges:
        characters[_index(match[1][-1]) : _index((match[2] or match[1])[-1]) + 1] = True
        if "\\" in match[0]:
            characters[:] = True  # an escape such as \x41 or \d: it may be any
    if text.startswith("^"):
        characters = ~characters | (characters.all())
    return _Atom(characters, 1, 2 * len(ranges))


def _index(character: str) -> int:
    code = ord(character)
    return code if code < 128 else min(128 + code // 32, _CHARACTERS - 1)


class _Start(NamedTuple):
    """How a node of a grammar begins, and its matches at once with those of the rules that it names."""

    characters: npt.NDArray[np.bool_]
    may_be_empty: bool
    matches: int


_NOTHING = _Start(np.zeros(_CHARACTERS, np.bool_), False, 1)


def _start(node: _Node, rules: dict[str, _Start]) -> _Start:
    if isinstance(node, _Atom):
        return _Start(node.characters, False, 1)
    if isinstance(node, str):
        return rules.get(node, _NOTHING)
    if isinstance(node, _Repetition):
        part = _start(node.part, rules)
        return part._replace(may_be_empty=part.may_be_empty or node.least == 0)
    starts = [_start(part, rules) for part in node.parts]
    if isinstance(node, _Alternatives):
        sums = sum((start.characters * np.float64(start.matches) for start in starts), np.zeros(_CHARACTERS))
        empty = any(start.may_be_empty for start in starts)
        return _Start(sums > 0, empty, int(min(TOO_MUCH, max(1, sums.max()))))
    characters = np.zeros(_CHARACTERS, np.bool_)
    for start in starts:
        characters = characters | start.characters
        if not start.may_be_empty:
            break
    empty = all(start.may_be_empty for start in starts)
    return _Start(characters, empty, max((start.matches for start in starts), default=1))


def _recursion(rules: dict[str, _Node]) -> int:
    """The matches at once that grow with the depth of a text."""
    starts: dict[str, _Start] = {}
    for _ in range(TURNS):
        before = [start.matches for start in starts.values()]
        for name, node in reversed(rules.items()):
            starts[name] = _start(node, starts)
        if before == [start.matches for start in starts.values()]:
            break
    return max((start.matches for start in starts.values()), default=1)


class _TooMany(Exception):
    """More atoms than are worth counting."""


class _Automaton:
    """Atoms, and which of them may follow each: Glushkov's automaton, with rules inserted where they are named."""

    def __init__(self, rules: dict[str, _Node], turns: int) -> None:
        self._rules = rules
        self._turns = turns  # a rule is inserted into itself so often, less one
        self._edges = 0
        self._open: Counter[str] = Counter()  # rules that are being inserted
        self.atoms: list[_Atom] = []
        self.follow: list[set[int]] = []

    def add(self, node: _Node) -> tuple[bool, set[int], set[int]]:
        """Whether the node may be empty, the atoms it may begin with, and those it may end with."""
        if isinstance(node, _Atom):
            if len(self.atoms) == _MOST_ATOMS:
                raise _TooMany
            self.atoms.append(node)
            self.follow.append(set())
            return False, {len(self.atoms) - 1}, {len(self.atoms) - 1}
        if isinstance(node, str):
            if self._open[node] == self._turns or node not in self._rules:
                return True, set(), set()
            self._open[node] += 1
            added = self.add(self._rules[node])
            self._open[node] -= 1
            return added
        if isinstance(node, _Alternatives):
            parts = [self.add(part) for part in node.parts]
            return (
                any(empty for empty, _, _ in parts),
                set().union(*(first for _, first, _ in parts)),
                set().union(*(last for _, _, last in parts)),
            )
        if isinstance(node, _Concatenation):
            return self._sequence(node.parts, least=len(node.parts))
        most = node.least + 1 if node.most is None else max(node.least, node.most)
        copies = min(most, _MOST_COPIES)
        least = max(0, node.least - most + copies)
        may_be_empty, first, last = self._sequence([node.part] * copies, least)
        if node.most is None:
            self._connect(last, first)
        return may_be_empty, first, last

    def _sequence(self, parts: list[_Node], least: int) -> tuple[bool, set[int], set[int]]:
        """Of parts that may end after `least` of them."""
        may_be_empty, firsts, lasts, ends = True, set[int](), set[int](), set[int]()
        for number, part in enumerate(parts, start=1):
            empty, first, last = self.add(part)
            self._connect(lasts, first)
            firsts |= first if may_be_empty else set()
            lasts = lasts | last if empty else last
            may_be_empty &= empty
            ends |= lasts if number >= least else set()
        return may_be_empty or least == 0, firsts, ends

    def _connect(self, lasts: set[int], firsts: set[int]) -> None:
        self._edges += len(lasts) * len(firsts)
        if self._edges > _MOST_EDGES:
            raise _TooMany
        for atom in lasts:
            self.follow[atom] |= firsts


def _cost(rules: dict[str, _Node], root: str) -> Cost:
    for turns in (2, 1):
        automaton = _Automaton(rules, turns)
        try:
            _, first, _ = automaton.add(root)
        except (_TooMany, RecursionError):
            continue
        sets = [*automaton.follow, first]
        ways = _ways(automaton.atoms, sets) // _WAYS_A_MATCH
        recursion = _recursion(rules) if root else 1  # a pattern has no name
        elements = sum(_elements(node) for node in rules.values())
        work = 100 + len(automaton.atoms)
        return Cost(max(1, ways, recursion, *map(len, sets)), min(TOO_MUCH, elements), work)
    raise UnusableGrammar(TOO_LARGE)


def _elements(node: _Node) -> int:
    if isinstance(node, _Atom):
        return node.elements
    if isinstance(node, str):
        return 1
    if isinstance(node, _Repetition):
        repeated = node.part.elements if isinstance(node.part, _Atom) else 1
        if node.most is not None and node.most < node.least:
            raise UnusableGrammar(BACKWARDS)
        return _elements(node.part) + (repeated + 3) * max(node.least, node.most or 0)
    return sum(map(_elements, node.parts), len(node.parts))


def _ways(atoms: list[_Atom], sets: list[set[int]]) -> int:
    """The ways to match the costliest text of up to `_LENGTH` characters from any place on."""
    filled = [index for index, one in enumerate(sets) if one]
    if not filled:
        return 1
    members = np.array([atom for index in filled for atom in sets[index]])
    starts = np.cumsum([0, *(len(sets[index]) for index in filled[:-1])])
    kinds = {atom.characters.tobytes(): atom.characters for atom in atoms}
    kind = {key: index for index, key in enumerate(kinds)}
    table = np.stack(list(kinds.values()))
    changes = np.flatnonzero((table[:, 1:] != table[:, :-1]).any(axis=0)) + 1
    alike = table[:, [0, *changes]].astype(np.float64)  # a column for each run of characters that match the same atoms
    characters = alike[[kind[atom.characters.tobytes()] for atom in atoms]]
    lengths = np.array([min(atom.length, _LENGTH) for atom in atoms])
    ways = np.ones((_LENGTH + 1, len(sets)))  # by the characters to come
    for length in range(1, _LENGTH + 1):
        after = ways[np.maximum(0, length - lengths), np.arange(len(atoms))]
        after[lengths >= length] = 1
        sums = np.add.reduceat(characters[members] * after[members, None], starts)
        ways[length] = 0
        ways[length, filled] = sums.max(axis=1)
    return int(min(TOO_MUCH, ways.max()))
