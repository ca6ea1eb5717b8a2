import pytest

from samq.serving.text import TextAssembler


def assemble(pieces, stops=()):
    assembler = TextAssembler(stops)
    given = []
    for piece in pieces:
        given.append(assembler.push(piece))
        if assembler.stopped:
            break
    return [*given, assembler.finish()], assembler.stopped


def test_a_character_is_sent_when_its_last_byte_has_come():
    euro = "€".encode()
    assert assemble([b"a", euro[:1], euro[1:2], euro[2:] + b"b"]) == (["a", "", "", "€b", ""], False)


def test_an_unfinished_or_impossible_character_becomes_the_replacement():
    assert assemble([b"a\xff", b"\xe2"]) == (["a\ufffd", "", "\ufffd"], False)


def test_nothing_of_a_stop_sequence_is_sent():
    assert assemble([b"one E", b"N", b"D two"], ["END"]) == (["one ", "", "", ""], True)


def test_what_only_began_like_a_stop_sequence_is_sent_later():
    assert assemble([b"one E", b"N", b"C", b"EN"], ["END"]) == (["one ", "", "ENC", "", "EN"], False)


def test_the_stop_sequence_that_comes_first_ends_the_text():
    assert assemble([b"a b c"], ["c", "b"]) == (["a ", ""], True)


def test_a_stop_sequence_may_overlap_itself():
    assert assemble([b"xaa", b"aab"], ["aab"]) == (["x", "aa", ""], True)


@pytest.mark.parametrize("cut", range(1, 12))
def test_where_tokens_end_changes_nothing(cut):
    text = "añb€ñSTOPx".encode()
    given, stopped = assemble([text[:cut], text[cut:]], ["STOP", "ñS"])
    assert ("".join(given), stopped) == ("añb€", True)


@pytest.mark.parametrize(
    "pieces, starts",
    [
        ([b"one E", b"N", b"D"], [0, 5, 6]),
        ([b"a", "€".encode()[:1], "€".encode()[1:], b"", b"b"], [0, 1, 1, 2, 2]),
        ([b"\xe2", b"S", b"\xf0\x9f", b"\xe2", b"\x80", b"c"], [0, 1, 2, 3, 3, 4]),
        ([b"\xe0", b"\x80a", b"b"], [0, 1, 3]),
    ],
)
def test_where_the_text_of_a_token_begins(pieces, starts):
    assembler, found, sent = TextAssembler(["ND"]), [], 0
    for piece in pieces:
        sent += len(assembler.push(piece))
        found.append(assembler.start)
        assert assembler.sent == sent
    assert found == starts
