"""Documents: how they are read, divided and packed into rows in which every target counts exactly once."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from model import ByteTokenizer, CharTokenizer
from train import tokens as tokens_module
from train.corpus import DOCUMENT_END, PROMPT_END, Corpus, make_tokenizer
from train.data import load_data, training_batches
from train.documents import PackedDataset, best_fit, find_documents
from train.tokens import Encoded, TokenFile, tokenize

END, LENGTH = 9999, 16


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def chats(tmp_path):
    lines = [{"prompt": f"What is {i}?", "completion": f" It is {i * i}."} for i in range(20)]
    return write(tmp_path / "chats.jsonl", *lines, "", {"text": "To be, or not to be."}, {"text": ""})


def shown(corpus, *part):
    signs = {DOCUMENT_END: "|", PROMPT_END: ">"}
    return "".join(signs.get(piece, piece) for piece in corpus.pieces(*part))


def test_a_line_is_a_document_and_empty_ones_are_skipped(tmp_path):
    lines = [{"text": "a\r\nb", "id": 1}, "  ", {"prompt": "q", "completion": "ä"}, {"text": ""}]
    lines += [{"prompt": "", "completion": "c"}, {"prompt": "p", "completion": ""}]
    corpus = Corpus(write(tmp_path / "x.jsonl", *lines), None)
    assert corpus.in_documents and corpus.scan.prompts
    assert shown(corpus) == "a\r\nb|q>ä|c|p>"
    assert corpus.scan.ends.tolist() == [4, 6, 7, 8] and corpus.scan.bytes == 9
    for at in (4, 6, 7):
        assert shown(corpus, 0, at) + shown(corpus, at) == shown(corpus)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"it is not JSON \(Expecting property name enclosed in double quotes at column 2\)"),
        ('{"text": "cut', r"it is not JSON \([\w ]+ at column 1\d\)"),
        ("[1, 2]", 'it is no object, wanted "text", or "prompt" and "completion"'),
        ({"body": "x", "id": 1}, "its fields are 'body', 'id', wanted \"text\", or"),
        ({"prompt": "x"}, "its fields are 'prompt', wanted \"text\", or"),
        ({"text": "x", "completion": "y"}, "its fields are 'completion', 'text', wanted"),
        ({}, "its fields are none, wanted"),
        ({"text": ["x"]}, r'its text is \["x"\], wanted a text in quotes'),
        ({"prompt": "x", "completion": None}, "its completion is null, wanted a text in quotes"),
        ('{"text": "\\ud83d"}', r"a text in it holds half of a surrogate pair, '\\ud83d'"),
        ("[" * 200_000, "it is nested too deeply"),
    ],
)
def test_a_bad_line_is_named_in_one_line(tmp_path, line, message):
    path = write(tmp_path / "x.jsonl", {"text": "good"}, "", line)
    with pytest.raises(ValueError, match=rf"^data file .*x\.jsonl, line 3: {message}") as raised:
        load_data(path)
    assert "\n" not in str(raised.value)


def test_a_line_that_is_not_utf8_and_a_file_without_documents_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "good"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: it is not UTF-8 text \(byte 0xe9 at offset 13\)"):
        load_data(str(path))
    for content in ("", "\n\n", '{"text": ""}\n'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"data file .*x\.jsonl is empty"):
            load_data(str(path))


@pytest.mark.parametrize(
    ("names", "apart"),
    [(["a.txt"], False), (["a.jsonl"], True), (["a.txt", "b.md"], True), (["a.md", "b.jsonl"], True)],
)
def test_lines_of_jsonl_and_several_files_are_kept_apart_unless_told_otherwise(tmp_path, names, apart):
    for name in names:
        (tmp_path / name).write_text('{"text": "some text"}' * 3 if name.endswith("txt") else '{"text": "some text"}\n')
    assert Corpus(str(tmp_path), None).in_documents is apart
    assert Corpus(str(tmp_path), not apart).in_documents is not apart


def test_plays_are_a_stream_and_documents_when_asked_for():
    stream, apart = Corpus("tinyshakespeare", None), Corpus("tinyshakespeare", True)
    assert not stream.in_documents and len(apart.scan.ends) == 9
    assert shown(apart).replace("|", "") == shown(stream)
    assert apart.scan.sha256 != stream.scan.sha256


def test_the_last_documents_are_held_out_whole(tmp_path):
    texts = [chr(97 + i) * (i % 7 + 1) for i in range(26)]
    corpus = Corpus(write(tmp_path / "x.jsonl", *({"text": text} for text in texts)), None)
    boundary, total = corpus.boundary(), corpus.scan.characters
    assert boundary in corpus.scan.ends and abs(boundary - 0.9 * total) <= 3.5
    data = load_data(str(tmp_path / "x.jsonl"))
    assert shown(corpus, 0, boundary).strip("|").split("|") + shown(corpus, boundary).split("|") == texts
    both = [data.tokenizer.decode(part.tokens) for part in (data.training, data.held_out)]
    assert both[0] + both[1] == "".join(text + "<|endoftext|>" for text in texts)
    assert data.record["documents"] == 26 and data.training.in_documents


def test_a_single_document_is_cut_and_has_no_end_at_the_cut(tmp_path):
    data = load_data(write(tmp_path / "x.txt", "0123456789" * 10), documents=True)
    assert data.tokenizer.decode(data.training.tokens) == "0123456789" * 9
    assert data.tokenizer.decode(data.held_out.tokens) == "0123456789\n<|endoftext|>"


def test_a_vocabulary_without_an_end_and_prompts_in_a_stream_are_refused_in_one_line(tmp_path, chats):
    with pytest.raises(
        ValueError, match=r"the vocabulary has no <\|endoftext\|> .*: give another .* or --no-documents$"
    ):
        load_data(chats, tokenizer=CharTokenizer(Corpus(chats).scan.alphabet))
    with pytest.raises(ValueError, match=r"chats.jsonl has prompts, which are not trained on: leave out --no-doc"):
        load_data(chats, documents=False)


@pytest.mark.parametrize("kind", ["characters", "bytes", "subwords"])
def test_a_token_file_of_documents_holds_what_memory_would(tmp_path, chats, monkeypatch, kind):
    corpus = Corpus(chats, None)
    if kind == "subwords":
        pytest.importorskip("tokenizers")
    name = {"characters": "shakespearean", "bytes": "byte", "subwords": "bpe"}[kind]
    tokenizer = make_tokenizer(corpus, name, vocab_size=300 if kind == "subwords" else None)
    expected = tokenize(corpus, tokenizer)
    monkeypatch.setattr(tokens_module, "IN_MEMORY", {kind: -1})
    found = tokenize(corpus, tokenizer, cache=tmp_path / "cache")
    assert isinstance(found.tokens, TokenFile) and found.tokens[:].tolist() == expected.tokens.tolist()
    assert (found.prompts, found.in_documents) == (expected.prompts, True) and len(found.prompts) == 20
    assert [tokenizer.decode(found.tokens[a:b]) for a, b in found.prompts] == [f"What is {i}?" for i in range(20)]
    rows = [PackedDataset(encoded, LENGTH, tokenizer) for encoded in (found, expected)]
    for a, b in zip(*(data.batch(range(len(rows[0]))) for data in rows), strict=True):
        assert torch.equal(a, b)


def test_an_end_that_is_written_out_divides_a_document(tmp_path):
    path = write(
        tmp_path / "x.jsonl", {"text": "ab<|endoftext|>cde"}, {"prompt": "f<|endoftext|>gh", "completion": "i"}
    )
    for tokenizer in (ByteTokenizer(), CharTokenizer("abcdefghi", end=True)):
        encoded = tokenize(Corpus(path, None), tokenizer)
        documents = find_documents(encoded, tokenizer.end_of_text)
        assert documents.tolist() == [[0, 3, 0], [3, 7, 3], [7, 9, 9], [9, 13, 11]]
        x, y, starts = PackedDataset(encoded, 7, tokenizer).batch([0, 1])
        pairs = {(tokenizer.decode([a]), tokenizer.decode([b])) for a, b in zip(x[y >= 0], y[y >= 0], strict=True)}
        last = "<|endoftext|>"
        assert pairs == {("a", "b"), ("b", last), ("c", "d"), ("d", "e"), ("e", last), ("h", "i"), ("i", last)}


class Numbers:
    end_of_text, vocab_size = END, END + 1


def numbered(*documents):
    """Encoded documents (tokens, tokens of the prompt) in which no token but the end comes twice."""
    tokens, prompts = [], []
    for length, prompt in documents:
        if prompt:
            prompts.append([len(tokens), len(tokens) + prompt])
        tokens += [*range(len(tokens), len(tokens) + length - 1), END]
    return Encoded(torch.tensor(tokens), 0, 0, prompts, True)


HARD = [
    (1, 0),
    (2, 0),
    (2, 1),
    (16, 0),
    (17, 0),
    (18, 0),
    (18, 17),
    (33, 0),
    (34, 0),
    (60, 0),
    (60, 40),
    (5, 2),
    (3, 0),
]


@pytest.mark.parametrize("stride", [None, 1, 5, 15])
def test_every_token_of_a_document_but_the_first_and_its_prompt_is_a_target_exactly_once(stride):
    encoded = numbered(*HARD)
    data, tokens, wanted, end = PackedDataset(encoded, LENGTH, Numbers, stride), encoded.tokens.tolist(), Counter(), 0
    for length, prompt in HARD:
        begin, end = end, end + length
        wanted.update((tokens[i - 1], tokens[i]) for i in range(begin + max(1, prompt), end))
    x, y, starts = data.batch(range(len(data)))
    assert starts.dtype == torch.int32 and x.dtype == y.dtype == torch.int64
    assert Counter(zip(x[y >= 0].tolist(), y[y >= 0].tolist(), strict=True)) == wanted
    for row in range(len(data)):
        assert (y[row] >= 0).any()
        for start in set(starts[row].tolist()):
            inside = (starts[row] == start).nonzero()[:, 0]
            assert inside.tolist() == list(range(start, start + len(inside)))  # a document is one run
            if (y[row, inside] >= 0).any():
                assert (x[row, inside].diff() == 1).all()  # of one document, in its order
            else:
                assert x[row, inside].eq(END).all() and inside[-1] == LENGTH - 1  # padding
    assert data.padding == pytest.approx(x.eq(END).float().mean().item())


def test_a_short_stride_gives_every_target_the_context_that_it_promises():
    data = PackedDataset(numbered((60, 0)), LENGTH, Numbers, stride=4)
    x, y, starts = data.batch(range(len(data)))
    column = torch.arange(LENGTH).expand_as(x)
    seen = (column - starts + 1)[y >= 0]
    position = torch.where(y == END, 59, y)[y >= 0]  # a token's number is its position
    assert (seen >= position.clamp(max=LENGTH - 4 + 1)).all() and len(seen) == 59


@pytest.mark.parametrize("seed", range(4))
def test_best_fit_fills_rows_and_never_overfills_one(seed):
    sizes = np.random.default_rng(seed).integers(1, 65, 1000)
    rows = best_fit(sizes, 64)
    filled = np.bincount(rows, weights=sizes)
    assert filled.max() <= 64 and filled.min() > 0
    assert len(filled) <= 1.03 * max(sizes.sum() / 64, (sizes > 32).sum())  # no packing is below the maximum
    assert np.sort(filled)[:2].sum() > 64  # no two rows fit into one


def test_best_fit_takes_the_fullest_row_with_room():
    assert best_fit(np.array([6, 7, 3, 4, 10]), 10).tolist() == [2, 1, 1, 2, 0]
    assert best_fit(np.array([5, 6, 3, 2, 2]), 8).tolist() == [1, 0, 1, 0, 2]


def test_items_are_rows_of_batches_and_the_seed_orders_them():
    data = PackedDataset(numbered(*HARD * 3), LENGTH, Numbers)
    for a, b in zip(data[3], (part[1] for part in data.batch([0, 3])), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(data[-1][0], data[len(data) - 1][0])
    epoch = [next(iter(training_batches(data, len(data), seed)))[0] for seed in (0, 0, 1)]
    assert torch.equal(epoch[0], epoch[1]) and not torch.equal(epoch[0], epoch[2])
    assert sorted(epoch[0].tolist()) == sorted(epoch[2].tolist()) == sorted(data.batch(range(len(data)))[0].tolist())


def test_a_text_without_targets_and_a_wrong_stride_are_refused():
    with pytest.raises(ValueError, match="text has no document of two tokens"):
        PackedDataset(numbered((1, 0), (1, 0)), LENGTH, Numbers)
    with pytest.raises(ValueError, match="stride is 17, wanted 1 to the context length, 16"):
        PackedDataset(numbered((9, 0)), LENGTH, Numbers, 17)
