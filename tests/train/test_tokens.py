"""Tokens are made once, in bounded memory, into a file that is complete or not used."""

import json
import pickle
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from model import ByteTokenizer, CharTokenizer
from model.command import cache_directory
from train import tokens as tokens_module
from train.corpus import DOCUMENT_END, Corpus, make_tokenizer, train_bpe
from train.data import TokenDataset, load_data
from train.tokens import TokenFile, encode_stream, encoder, tokenize

ROOT = Path(__file__).parents[2]
VERSE = (
    "Now is the winter of our discontent\nMade glorious summer by this sun of York;\n\n  And all the clouds — naïve!\n"
)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text(VERSE * 30)
    return Corpus(str(tmp_path / "text.txt"))


@pytest.fixture
def in_files(monkeypatch):
    """Every text is a long one."""
    monkeypatch.setattr(tokens_module, "IN_MEMORY", dict.fromkeys(tokens_module.IN_MEMORY, -1))


def tokenizer_for(kind, text=VERSE):
    if kind == "subwords":
        pytest.importorskip("tokenizers")
        return train_bpe([text], 300)
    return ByteTokenizer() if kind == "bytes" else CharTokenizer.from_text(text)


@pytest.mark.parametrize("kind", ["characters", "bytes", "subwords"])
def test_a_token_file_holds_what_memory_would(corpus, in_files, monkeypatch, tmp_path, kind):
    tokenizer, boundary = tokenizer_for(kind), corpus.boundary()
    for start, stop in ((0, boundary), (boundary, None)):
        text = (VERSE * 30)[start:stop]
        encoded = tokenize(corpus, tokenizer, start, stop, cache=tmp_path / "cache")
        assert isinstance(encoded.tokens, TokenFile)
        assert encoded.tokens[:].tolist() == tokenizer.encode(text)
        assert (encoded.characters, encoded.bytes) == (len(text), len(text.encode()))
        monkeypatch.setattr(tokens_module, "IN_MEMORY", {kind: 2**20})
        assert tokenize(corpus, tokenizer, start, stop).tokens.tolist() == tokenizer.encode(text)
        monkeypatch.setattr(tokens_module, "IN_MEMORY", {kind: -1})


@pytest.mark.parametrize("kind", ["characters", "bytes", "subwords"])
@pytest.mark.parametrize("least", [1, 40, 700])
def test_the_tokens_do_not_depend_on_where_the_pieces_are_cut(monkeypatch, kind, least):
    monkeypatch.setattr(tokens_module, "_LEAST_TO_CUT", least)
    text = (VERSE + "<|endoftext|>" + "x" * 300 + "  \n\n ' 's") * 8
    tokenizer = tokenizer_for(kind, text)
    pieces = [text[i : i + 97] for i in range(0, len(text), 97)]
    found = [int(token) for part in encode_stream(tokenizer, pieces) if not isinstance(part, bytes) for token in part]
    if kind != "subwords" or least == 700:
        assert found == tokenizer.encode(text)
    assert tokenizer.decode(found) == text


def test_documents_meet_in_the_separator_where_the_vocabulary_has_one():
    stream = ["To", " be", DOCUMENT_END, "or", DOCUMENT_END, "not"]
    for tokenizer, between in ((tokenizer_for("bytes"), [255]), (CharTokenizer.from_text("To beornt"), [])):
        found = [
            int(token) for part in encode_stream(tokenizer, stream) if not isinstance(part, bytes) for token in part
        ]
        assert found == [
            *tokenizer.encode("To be"),
            *between,
            *tokenizer.encode("or"),
            *between,
            *tokenizer.encode("not"),
        ]


def test_examples_of_a_file_are_those_of_memory(corpus, in_files, tmp_path):
    tokenizer = CharTokenizer.from_text(VERSE)
    ours = TokenDataset(tokenize(corpus, tokenizer, cache=tmp_path).tokens, 20, tokenizer)
    theirs = TokenDataset(torch.tensor(tokenizer.encode(VERSE * 30)), 20, tokenizer)
    indices = torch.tensor([0, 5, len(theirs) - 1])
    for dataset in (ours, pickle.loads(pickle.dumps(ours))):
        assert len(dataset) == len(theirs)
        for a, b in zip(dataset.batch(indices), theirs.batch(indices), strict=True):
            assert torch.equal(a, b) and a.dtype == torch.int64


def test_tokens_are_made_once_for_each_text_and_vocabulary(corpus, in_files, monkeypatch, tmp_path):
    made = []
    write = tokens_module._write
    monkeypatch.setattr(tokens_module, "_write", lambda path, *rest: made.append(path) or write(path, *rest))
    tokenizer, cache = CharTokenizer.from_text(VERSE), tmp_path / "cache"
    for _ in range(3):
        tokenize(corpus, tokenizer, cache=cache)
    assert len(made) == 1
    tokenize(corpus, CharTokenizer(sorted(set(VERSE), reverse=True)), cache=cache)
    tokenize(corpus, tokenizer, 5, cache=cache)
    (tmp_path / "text.txt").write_text(VERSE * 30 + "and")
    tokenize(Corpus(str(tmp_path / "text.txt")), tokenizer, cache=cache)
    assert len(set(made)) == len(made) == 4


@pytest.mark.parametrize("damage", ["tokens cut", "facts cut", "facts gone"])
def test_a_damaged_token_file_is_made_again(corpus, in_files, tmp_path, damage):
    tokenizer = CharTokenizer.from_text(VERSE)
    expected = tokenize(corpus, tokenizer, cache=tmp_path).tokens[:]
    (tokens,), (facts,) = tmp_path.glob("*.tokens"), tmp_path.glob("*.json")
    if damage == "facts gone":
        facts.unlink()
    else:
        damaged = tokens if damage == "tokens cut" else facts
        damaged.write_bytes(damaged.read_bytes()[:-7])
    assert torch.equal(tokenize(corpus, tokenizer, cache=tmp_path).tokens[:], expected)
    assert json.loads(facts.read_text())["tokens"] == len(expected)


def test_a_token_file_may_be_removed_while_it_is_read(corpus, in_files, tmp_path):
    tokens = tokenize(corpus, ByteTokenizer(), cache=tmp_path).tokens
    tokens.path.unlink()
    assert bytes(tokens[:10].tolist()) == VERSE.encode()[:10]


def test_a_failing_write_leaves_nothing_that_looks_whole(corpus, in_files, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"token file .* cannot be written: .* \(--token-cache names another directory\)"):
        tokenize(corpus, ByteTokenizer(), cache=tmp_path / "file")
    with pytest.raises(ValueError, match="not in the vocabulary"):
        tokenize(corpus, CharTokenizer("abc"), cache=tmp_path / "cache")
    corpus.scan  # noqa: B018  the text is measured, then grows
    (tmp_path / "text.txt").write_text(VERSE * 29)
    with pytest.raises(ValueError, match="changed while it was read"):
        tokenize(corpus, ByteTokenizer(), cache=tmp_path / "cache")
    assert not [*(tmp_path / "cache").glob("*.tokens"), *(tmp_path / "cache").glob("*.json")]


def test_one_of_several_that_need_the_same_tokens_makes_them(corpus, in_files, monkeypatch, tmp_path):
    pytest.importorskip("fcntl")
    made, write = [], tokens_module._write

    def slowly(path, *rest):
        made.append(path)
        time.sleep(0.2)
        return write(path, *rest)

    monkeypatch.setattr(tokens_module, "_write", slowly)
    _ = corpus.scan
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: tokenize(corpus, ByteTokenizer(), cache=tmp_path).tokens[:], range(4)))
    assert len(made) == 1 and all(torch.equal(tokens, found[0]) for tokens in found)


def test_the_cache_is_where_the_system_keeps_such_things(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "sliding-gqa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "sliding-gqa"


MEASURE = """
import resource, sys, torch
from train import tokens
tokens.IN_MEMORY = {"characters": 0}
from train.data import TokenDataset, load_data, training_batches
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def resident():
    try:
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20
    except FileNotFoundError:  # not Linux
        return 0
load_data(sys.argv[2], cache=sys.argv[3])
before = peak()
data = load_data(sys.argv[1], cache=sys.argv[3])
batches = training_batches(TokenDataset(data.training.tokens, 128, data.tokenizer), 16, seed=0)
next(batches)
made = resident()
for _ in range(300):
    x, y = next(batches)
print(len(data.training.tokens), peak() - before, resident() - made)
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    """What 28 MB take beyond what 4 MB took: read whole, or as tokens in memory, they would take 24 MB more.

    Nor does it grow as they are read: a file that stayed mapped would be resident after these batches.
    """
    random.seed(0)
    lines = [" ".join(random.choices(VERSE.split(), k=8)) for _ in range(1000)]
    for name, size in (("large", 28), ("small", 4)):
        with open(tmp_path / name, "w") as file:
            while file.tell() < size * 10**6:
                file.write("\n".join(random.choices(lines, k=10_000)) + "\n")
    files = [str(tmp_path / name) for name in ("large", "small", "cache")]
    shown = subprocess.run([sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    tokens, grown, grown_by_reading = map(int, shown.stdout.split())
    assert tokens > 24 * 10**6
    assert grown < 10 and grown_by_reading < 5


def test_characters_of_the_validation_text_must_be_in_the_vocabulary(corpus, tmp_path):
    (tmp_path / "other.txt").write_text("Über " * 50)
    with pytest.raises(ValueError, match="'Ü' not in the vocabulary of"):
        load_data(str(tmp_path / "text.txt"), str(tmp_path / "other.txt"))
    data = load_data(str(tmp_path / "text.txt"), str(tmp_path / "other.txt"), embedding_type="byte")
    assert len(data.training.tokens) == corpus.scan.bytes and data.held_out.characters == 250
    assert data.record["validation"]["characters"] == 250


def test_a_bpe_vocabulary_is_learnt_from_the_training_part_alone(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "text.txt").write_text("abcabc " * 900 + "xyzxyz " * 100)
    corpus = Corpus(str(tmp_path / "text.txt"))
    tokenizer = make_tokenizer(corpus, "bpe", vocab_size=270, stop=corpus.boundary())
    assert len(tokenizer.encode(" abcabc")) == 1 and len(tokenizer.encode(" xyzxyz")) == 7
    assert encoder(tokenizer)("xyz").tolist() == tokenizer.encode("xyz")
