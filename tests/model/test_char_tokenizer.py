import json

import pytest

from model import CharTokenizer, load_tokenizer

TEXT = "To be, or not to be: that is the question.\n\t\u2014 caf\u00e9 \U0001f600\\\"' \u00a0"


def test_decoding_undoes_encoding():
    tokenizer = CharTokenizer.from_text(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_characters_are_numbered_in_the_order_of_their_code_points():
    tokenizer = CharTokenizer.from_text("hello world")
    assert "".join(tokenizer.itos[i] for i in range(tokenizer.vocab_size)) == " dehlorw"
    assert all(tokenizer.stoi[character] == i for i, character in tokenizer.itos.items())


def test_characters_outside_the_vocabulary_are_named():
    tokenizer = CharTokenizer.from_text("abc")
    with pytest.raises(ValueError, match="'x', '\u00e9' not in the vocabulary of 3 characters: leave them out, or use"):
        tokenizer.encode("a\u00e9xbx")
    with pytest.raises(ValueError, match="'r' and 1 more not in the vocabulary"):
        tokenizer.encode("hijklmnoprs")
    with pytest.raises(ValueError, match="token 3 is outside the vocabulary of 3"):
        tokenizer.decode([0, 3])


def test_a_vocabulary_of_anything_but_different_characters_is_refused():
    for vocab in ("aa", ["ab", "c"], "", ["a", ""]):
        with pytest.raises(ValueError, match="vocab is not a sequence of different single characters"):
            CharTokenizer(vocab)


def test_a_saved_tokenizer_is_the_same_one(tmp_path):
    tokenizer = CharTokenizer(list(dict.fromkeys(TEXT)))  # in the order of the text, not sorted
    tokenizer.save(tmp_path / "new" / "place")
    assert load_tokenizer(tmp_path / "new" / "place").itos == tokenizer.itos
    assert [path.name for path in (tmp_path / "new" / "place").iterdir()] == ["tokenizer.json"]


def test_hugging_faces_library_reads_the_file_and_agrees(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = CharTokenizer.from_text(TEXT)
    ours.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(TEXT).ids == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.json does not exist"),
        ("{", "tokenizer.json cannot be read: it is damaged"),
        ("[]", "tokenizer.json cannot be read: it is damaged"),
        ('{"model": []}', "tokenizer.json cannot be read: it is damaged"),
        (json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}}}), "damaged, or newer than the installed tokenizers"),
        (CharTokenizer("ab").to_json().replace('"b": 1', '"b": 2'), "does not number the characters from 0"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)
