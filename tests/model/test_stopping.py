import pytest

from model import CharTokenizer
from model.stopping import StopStrings, TextUntil


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


def test_only_what_may_begin_a_stop_string_is_held_back():
    text = TextUntil(["a", "b", "c", "a", "d"], ["bcd"])
    shown = []
    for piece in text:
        shown.append((piece, text.held))
    assert shown == [("a", ""), ("", "b"), ("", "bc"), ("bca", ""), ("d", "")]


def test_who_stops_reading_finds_what_was_held_back():
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


def test_every_row_has_a_text_of_its_own():
    tokenizer = CharTokenizer("abcd")
    rows = StopStrings(["ab", "dd"], tokenizer, [[0], [], [3]])
    ended = [rows.ended(tokenizer.encode(column)) for column in ("bad", "abd", "cca")]
    # the b after the first row's prompt, an a, is no ab; the third row's prompt ends with a d
    assert ended == [[False, False, False], [False, True, True], [False, False, False]]


def test_a_single_string_may_stand_for_a_list_of_it():
    assert "".join(TextUntil("abc", "b")) == "a"


@pytest.mark.parametrize("strings", [[""], ["a", 3]])
def test_what_is_no_stop_string_is_refused(strings):
    with pytest.raises(ValueError, match="holds an empty one, or something that is no text"):
        TextUntil([], strings)
