"""Stop strings: where a text ends, what is held back until it is known, and rows of a batch."""

import pytest

from model import CharTokenizer
from model.stop_strings import StopStrings, TextUntil


@pytest.mark.parametrize(
    ("pieces", "strings", "text"),
    [
        (["one", "\n", "\n", "two"], ["\n\n"], "one"),
        (["one\n\ntwo"], ["\n\n"], "one"),
        (list("aaab!"), ["aab"], "a"),
        (list("abcabd"), ["abd"], "abc"),
        (["x", "END", "y"], ["y", "D"], "xEN"),
        (list("over"), ["r?", "over it"], "over"),
        (["", "a", ""], ["b"], "a"),
        (list("abc"), [], "abc"),
        (["stop"], ["stop"], ""),
    ],
)
def test_a_text_ends_before_its_first_stop_string(pieces, strings, text):
    assert "".join(TextUntil(pieces, strings)) == text


def test_only_text_that_may_begin_a_stop_string_is_held():
    text = TextUntil(["a", "b", "c", "a", "d"], ["bcd"])
    shown = []
    for piece in text:
        shown.append((piece, text.held))
    assert shown == [("a", ""), ("", "b"), ("", "bc"), ("bca", ""), ("d", "")]


def test_held_text_is_available_after_an_interrupt():
    def interrupted():
        yield from "ab"
        raise KeyboardInterrupt

    text = TextUntil(interrupted(), ["bcd"])
    with pytest.raises(KeyboardInterrupt):
        for _ in text:
            pass
    assert text.held == "b"


def test_nothing_is_read_past_a_stop_string():
    pieces = iter("abcdef")
    assert "".join(TextUntil(pieces, ["cd"])) == "ab"
    assert "".join(pieces) == "ef"


def test_rows_are_searched_for_stop_strings_separately():
    tokenizer = CharTokenizer("abcd")
    rows = StopStrings(["ab", "dd"], tokenizer, [[0], [], [3]])
    found = [rows.update(tokenizer.encode(column)) for column in ("bad", "abd", "cca")]
    # prompts do not count: a, then b, is not ab in the first row; d, then d, is not dd in the third
    assert found == [[False, False, False], [False, True, True], [False, False, False]]


def test_one_stop_string_may_be_given_without_a_list():
    assert "".join(TextUntil("abc", "b")) == "a"


@pytest.mark.parametrize("strings", [[""], ["a", 3]])
def test_wrong_stop_strings_are_refused(strings):
    with pytest.raises(ValueError, match="has an empty string, or something that is not text"):
        TextUntil([], strings)
