"""Characters, bytes and subwords: decoding undoes encoding, Hugging Face reads the files, long texts may be cut."""

import json
import random

import pytest

from model import ByteTokenizer, CharTokenizer, SubwordTokenizer, load_tokenizer
from model import tokenizer as module

TEXT = "naïve — 日本語 🎭\n\ttabs  and   spaces\r\n<|endoftext|>It's 42 o'clock! \x00\x7f\xa0\xad"
CHARACTERS = "To be, or not to be: that is the question.\n\t\u2014 caf\u00e9 \U0001f600\\\"' \u00a0"


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE with GPT-2's words, of 400 tokens."""
    pytest.importorskip("tokenizers")
    from train.corpus import train_bpe

    return train_bpe([TEXT, "the winter of our discontent, the summer of the sun, thereof the theme " * 5], 400)


def test_each_byte_is_a_token_and_so_is_the_separator():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé<|endoftext|>b") == [97, 0xC3, 0xA9, 255, 98]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_streamed_bytes_become_characters_as_soon_as_they_are_complete():
    tokenizer = ByteTokenizer()
    assert list(tokenizer.stream([0xA9, 98, 0xC3, 255, 99], prompt=[0xC3])) == [
        "é",
        "b",
        "",
        "\ufffd<|endoftext|>",
        "c",
    ]
    assert "".join(tokenizer.stream(tokenizer.encode(TEXT))) == TEXT


def test_hugging_face_reads_the_file_of_bytes_to_the_same_numbers():
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(ByteTokenizer().to_json())
    every_character = "".join(chr(i) for i in range(0x3000) if not 0xD800 <= i < 0xE000)
    for text in (TEXT, every_character, "<|endoftext|>" * 3, " x"):
        assert theirs.encode(text).ids == ByteTokenizer().encode(text)
        assert theirs.decode(theirs.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", ["characters", "bytes", "subwords"])
def test_load_tokenizer_recognises_the_kind_of_a_file(tmp_path, kind, request):
    tokenizer = {"characters": lambda: CharTokenizer.from_text(TEXT), "bytes": ByteTokenizer}.get(
        kind, lambda: request.getfixturevalue("bpe")
    )()
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    for place in (path, tmp_path):
        loaded = load_tokenizer(place)
        assert type(loaded) is type(tokenizer) and loaded.kind == kind
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


def test_subwords_encode_every_text(bpe):
    for text in (TEXT, "".join(map(chr, range(1, 2000)))):
        assert bpe.decode(bpe.encode(text)) == text
    assert bpe.end_of_text == 0 and bpe.encode("a<|endoftext|>").count(0) == 1
    assert len(bpe.encode(" the winter")) == 2


def many_words(seed, count):
    words = ["the", "winter", "of", "<|endoftext|>", "it's", "42", "naïve", "...", "\n\n", "日本語", "x" * 40, "  "]
    chosen = random.Random(seed)
    return "".join(chosen.choice(words) + chosen.choice([" ", " ", "\n", "", "   "]) for _ in range(count))


def test_long_texts_are_encoded_in_parts_to_the_same_numbers(bpe, monkeypatch):
    monkeypatch.setattr(module, "_PART", 600)
    for seed in range(5):
        text = many_words(seed, 2000)
        assert len(list(bpe._parts(text))) > 1
        assert bpe.encode_to_bytes(text) == bpe._encode([text])


def test_a_cut_never_changes_the_encoding(bpe):
    """In GPT-2's words a run of spaces leaves its last one to the next word: between the spaces there is no cut."""
    text = "the" + " " * 60 + "winter of our " * 30
    at = bpe.cut(text)
    assert bpe._encode([text[:at], text[at:]]) == bpe._encode([text])
    assert text[at] == " " and text[at - 1] != " "


def test_text_without_any_space_is_cut_too(bpe, monkeypatch):
    monkeypatch.setattr(module, "_PART", 600)
    text = "日本語の文章" * 500
    assert 0 < bpe.cut(text) < len(text)
    assert bpe.encode_to_bytes(text) == bpe._encode([text])


def test_words_end_where_the_library_ends_them_whatever_the_character():
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    for character in (chr(i) for i in range(1, 0x110000) if i < 0x3100 or (i % 307 == 0 and not 0xD800 <= i < 0xE000)):
        for text in ("a.{0}b  {0} c", "{0}\n\n{0}{0}a {0}'s", "x{0} {0}  .{0}\t{0}"):
            text = text.format(character)
            words = module._WORDS.findall(text)
            assert "".join(words) == text
            assert [piece for word in words for piece, _ in split(word)] == [piece for piece, _ in split(text)]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": None},
        {"added_tokens": [(" of the ", {})]},
        {"added_tokens": [("of", {"lstrip": True})]},
        {"added_tokens": [("of", {"rstrip": True})]},
        {"added_tokens": [("the", {"single_word": True})]},
    ],
    ids=str,
)
def test_vocabularies_that_look_past_a_word_are_not_encoded_word_by_word(bpe, change):
    description = json.loads(bpe.to_json())
    if "added_tokens" in change:
        ((content, flags),) = change["added_tokens"]
        added = {**description["added_tokens"][0], "id": 400, "content": content, **flags}
        change = {"added_tokens": [*description["added_tokens"], added]}
    tokenizer = SubwordTokenizer(json.dumps(description | change))
    assert bpe._known is not None and tokenizer._known is None
    text = many_words(3, 300)
    assert tokenizer.encode_to_bytes(text) == tokenizer._encode([text])


def test_the_cache_of_words_has_a_limit(bpe, monkeypatch):
    monkeypatch.setattr(module, "_KNOWN", 100)
    for seed in range(20):
        text = "".join(f"{seed}-{i} " for i in range(20))
        assert bpe.encode_to_bytes(text) == bpe._encode([text])
        assert bpe._known_characters == sum(map(len, bpe._known)) < 250


def test_a_vocabulary_without_a_good_cut_still_gives_the_text_back(monkeypatch):
    """Metaspace puts a space before every text it encodes, so that every cut changes the encoding."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    text = many_words(1, 500)
    alphabet = sorted(set(text.replace(" ", "▁")) | {"▁"})
    theirs.train_from_iterator(
        [], tokenizers.trainers.BpeTrainer(vocab_size=200, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = SubwordTokenizer(theirs.to_str())
    assert tokenizer.cut(text) == len(text)
    monkeypatch.setattr(module, "_PART", 1000)
    parts = [part for parts in tokenizer._parts(text) for part in parts]
    assert "".join(parts) == text and len(parts) == -(-len(text) // 1000)


def test_a_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"other\.json does not exist"):
        load_tokenizer(tmp_path / "other.json")


def test_decoding_characters_undoes_encoding():
    tokenizer = CharTokenizer.from_text(CHARACTERS)
    assert tokenizer.decode(tokenizer.encode(CHARACTERS)) == CHARACTERS
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


def test_a_vocabulary_must_be_different_single_characters():
    for vocab in ("aa", ["ab", "c"], "", ["a", ""]):
        with pytest.raises(ValueError, match="vocab is not a sequence of different single characters"):
            CharTokenizer(vocab)


def test_a_saved_tokenizer_is_the_same_one(tmp_path):
    tokenizer = CharTokenizer(list(dict.fromkeys(CHARACTERS)))  # in the order of the text, not sorted
    tokenizer.save(tmp_path / "new" / "place")
    assert load_tokenizer(tmp_path / "new" / "place").itos == tokenizer.itos
    assert [path.name for path in (tmp_path / "new" / "place").iterdir()] == ["tokenizer.json"]


def test_hugging_face_reads_the_file_of_characters_to_the_same_numbers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = CharTokenizer.from_text(CHARACTERS)
    ours.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(CHARACTERS).ids == ours.encode(CHARACTERS)
    assert theirs.decode(ours.encode(CHARACTERS)) == CHARACTERS


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
def test_a_damaged_tokenizer_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_characters_with_an_end_of_documents_are_one_token_more_in_every_reader(tmp_path):
    plain, ended = CharTokenizer.from_text(CHARACTERS), CharTokenizer(sorted(set(CHARACTERS)), end=True)
    assert (ended.end_of_text, ended.vocab_size) == (plain.vocab_size, plain.vocab_size + 1)
    assert ended.encode(CHARACTERS) == plain.encode(CHARACTERS) and plain.end_of_text is None
    text = f"<|endoftext|>to{'<|endoftext|>' * 2}be<|endoftext|>"
    end = ended.end_of_text
    assert ended.encode(text) == [end, *plain.encode("to"), end, end, *plain.encode("be"), end]
    assert ended.decode(ended.encode(text)) == "".join(ended.stream(ended.encode(text))) == text
    for cut_at in range(len(text)):
        at = ended.cut(text[:cut_at])
        assert ended.encode(text[:at]) + ended.encode(text[at:]) == ended.encode(text)
    (tmp_path / "tokenizer.json").write_text(ended.to_json(), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is CharTokenizer and (loaded.stoi, loaded.end_of_text) == (ended.stoi, end)
    with pytest.raises(ValueError, match=rf"'Z' not in the vocabulary of {plain.vocab_size} characters"):
        ended.encode("Z<|endoftext|>")
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(ended.to_json())
    assert theirs.encode(text).ids == ended.encode(text)
    assert theirs.decode(ended.encode(text), skip_special_tokens=False) == text
