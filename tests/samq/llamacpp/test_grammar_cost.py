"""What patterns and grammars cost llama.cpp, counted before it sees them."""

import pytest

from samq.llamacpp.grammar_cost import UnusableGrammar, grammar_cost, pattern_cost


@pytest.mark.parametrize(
    "pattern, matches",
    [
        (r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,6})?(Z|[+-]\d{2}:\d{2})$", 3),
        (r"^((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)$", 5),
        (r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", 1),
        (r"^[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}$", 3),
        (r"^([a-z0-9]+-)*[a-z0-9]+$", 3),
        (r"^[a-zA-Z0-9_]{0,64}$", 1),
        (r"^(red|green|blue)$", 3),
        (r"^\?\*[*?]{5}$", 1),
        ("^" + "[a-z]?" * 20 + "$", 251),  # C(20, 8) / 500
        ("^" + "[a-z]?" * 30 + "$", 11705),
        ("^([a-z]|[a-z]|[a-z]|[a-z])*$", 131),  # 4^8 / 500
        ("^((a?){10}){10}$", 2_000_000),
        ("(" * 300 + "a" + ")" * 300, 1),
    ],
)
def test_the_matches_of_a_pattern(pattern, matches):
    assert pattern_cost(pattern).matches == matches


JSON_GRAMMAR = r"""
root ::= object
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws  # text
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


def test_a_pattern_that_is_too_large_to_count_is_one_sentence():
    with pytest.raises(UnusableGrammar, match="too large to count"):
        pattern_cost("^((((a|b|c){9}){9}){9}){9}$")


def multiplied(depth):
    rules = "".join(f"r{number} ::= {' | '.join([f'r{number + 1} [a-z]'] * 8)}\n" for number in range(depth))
    return f"root ::= r0\n{rules}r{depth} ::= [a-z]"


@pytest.mark.parametrize(
    "grammar, few",
    [
        (JSON_GRAMMAR, True),
        ('root ::= "yes" | "no"', True),
        ("root ::= [ぁ-ゟ]+ ([ァ-ヿ] | [一-鿿])*", True),
        ('root ::= "[" root "]" | "a"', True),
        ('root ::= "[" root "]" | "[" root "]" | "a"', False),
        (multiplied(3), True),
        ("root ::= " + "[a-z]{0,3} " * 20, False),
    ],
)
def test_the_matches_of_a_grammar(grammar, few):
    assert (grammar_cost(grammar).matches <= 1000) is few


def test_the_elements_of_a_grammar_written_out():
    assert grammar_cost("root ::= " + "[a-j]{2000} " * 100).elements > 10**6


@pytest.mark.parametrize(
    "grammar, reason",
    [
        ("root ::= " + "(" * 200 + '"a"' + ")" * 200, "too large to count"),
        ("root ::= " + "[a-z]? " * 9000, "too large to count"),
        ("root ::= ((((a|b|c){9}){9}){9}){9}\na ::= [a]\nb ::= [b]\nc ::= [c]", "too large to count"),
        (multiplied(5), "too large to count"),
        ('root ::= "a"{3,2}', "a minimum of repetitions exceeds its maximum"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_one_sentence(grammar, reason):
    with pytest.raises(UnusableGrammar, match=reason):
        grammar_cost(grammar)
