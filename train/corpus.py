"""The text that `--data` names, and the vocabulary for it. A text of any size is read in bounded memory.

    corpus = Corpus("shakespeare")          # or "tinyshakespeare", a UTF-8 file, a folder, a glob such as "books/*.txt"
    corpus.scan.characters                  # one pass: size, SHA-256, the characters that occur
    for piece in corpus.pieces(): ...       # the text in pieces, with DOCUMENT_END between two documents
    make_tokenizer(corpus, "bpe", vocab_size=8192)

A document is a file, a line of a .jsonl file (train/jsonl.py), or a play of a collection that is read in documents. A
folder means the .txt, .text, .md and .jsonl files in it and below it. Files are read in the order of their paths; empty
files and documents are skipped. A byte order mark is dropped, and in files of text "\\r\\n" and "\\r" are read as
"\\n". Positions count the characters of all documents, one after the other.
"""

import codecs
import glob
import hashlib
import io
import itertools
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from model.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, SubwordTokenizer, load_tokenizer

from . import jsonl
from .shakespeare import COLLECTIONS, plays

HELD_OUT = 0.1  # nanoGPT's split, so that losses on the same text compare
# what stands between the texts of `Corpus.pieces`, with a byte that no UTF-8 text has: the SHA-256 depends on them too
DOCUMENT_END, PROMPT_END = b"\xff", b"\xfe"
SUFFIXES = (".txt", ".text", ".md", jsonl.SUFFIX)

_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Scan:
    """What one pass over a text finds.

    alphabet   the characters that occur, sorted by code point
    ends       (N,) int64: the position after each document
    prompts    whether a document has a prompt
    """

    characters: int
    bytes: int
    sha256: str
    alphabet: str
    ends: np.ndarray
    prompts: bool


class Corpus:
    """The documents that a source names.

    documents: whether they are kept apart (train/documents.py) or one stream; a collection is one document in a stream,
    else each play is one. None keeps apart the lines of .jsonl files, and files if there are several.
    Raises, in one line: OSError for files that cannot be read, ValueError for a source without text (from `pieces` and
    `scan` also for a file that is not UTF-8, and a line that is no document), ModuleNotFoundError if the plays are not
    installed.
    """

    def __init__(self, source: str, documents: bool | None = False):
        self.name = source
        if source in COLLECTIONS:
            self.source, self.parts = source, plays(source)
            self.in_documents = bool(documents)
            self.parts = self.parts if self.in_documents else ["".join(self.parts)]
        else:
            self.source, self.parts = str(Path(source).resolve()), _files(source)
            several = len(self.parts) > 1 or _is_jsonl(self.parts[0])
            self.in_documents = several if documents is None else documents

    def boundary(self) -> int:
        """The position where the held-out part begins: the last HELD_OUT of the characters.

        Where documents are kept apart, the end of a document that is nearest to that; a single one is cut.
        """
        at = int(self.scan.characters * (1 - HELD_OUT))
        ends = self.scan.ends
        ends = ends[(0 < ends) & (ends < self.scan.characters)]
        return int(ends[np.abs(ends - at).argmin()]) if self.in_documents and len(ends) else at

    def pieces(self, start: int = 0, stop: int | None = None):
        """The characters start .. stop - 1 in pieces, DOCUMENT_END between documents and PROMPT_END after a prompt.

        An end at `stop` is included, one at `start` is not: adjacent parts have each end once.
        """
        position = 0
        for number, document in enumerate(self._documents()):
            for piece in document if number == 0 else itertools.chain([DOCUMENT_END], document):
                if isinstance(piece, bytes):
                    if start < position and (stop is None or position <= stop):
                        yield piece
                    continue
                if stop is not None and position >= stop:
                    return
                if position + len(piece) > start:
                    yield piece[max(0, start - position) : None if stop is None else stop - position]
                position += len(piece)

    def _documents(self):
        """The pieces of each document."""
        for part in self.parts:
            if _is_jsonl(part):
                for prompt, text in jsonl.read_documents(part):
                    if prompt:
                        yield [*_slices(prompt), PROMPT_END, *_slices(text)]
                    elif text:
                        yield _slices(text)
            else:
                yield _slices(part) if isinstance(part, str) else _read(part)

    @cached_property
    def scan(self) -> Scan:
        """One pass over the text."""
        characters, size, digest, seen = 0, 0, hashlib.sha256(), np.zeros(0x110000, dtype=bool)
        ends, prompts = array("q"), False
        for piece in self.pieces():
            if isinstance(piece, bytes):
                digest.update(piece)
                if piece == DOCUMENT_END:
                    ends.append(characters)
                prompts |= piece == PROMPT_END
                continue
            encoded = piece.encode()
            digest.update(encoded)
            characters, size = characters + len(piece), size + len(encoded)
            seen[code_points(piece)] = True
        if characters == 0:
            raise ValueError(f"data file {self.name} is empty: give a text of more characters than one context")
        ends = np.array([*ends, characters], dtype=np.int64)
        return Scan(characters, size, digest.hexdigest(), "".join(map(chr, np.flatnonzero(seen))), ends, prompts)


def code_points(text: str) -> np.ndarray:
    """The code point of every character, (len(text),): uint8 for plain ASCII, else uint32."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _files(source):
    """The files of a path or a glob, sorted by path."""
    path = Path(source)
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES]
        wanted = f"a file that ends in {', '.join(SUFFIXES)} (a glob such as '{source}/*.csv' takes others)"
    elif path.exists() or not glob.has_magic(source):
        found, wanted = [path], ""
    else:
        found, wanted = [Path(name) for name in glob.glob(source, recursive=True)], "a file of that pattern"
    if not path.exists() and not wanted:
        raise FileNotFoundError(
            f"data file {source} does not exist: give a text file, a folder, a glob, or {' or '.join(COLLECTIONS)}"
        )
    if path.exists() and not wanted and not path.is_file():
        raise ValueError(f"data {source} is no regular file, which can be read twice: write the text into one")
    files = sorted((file for file in found if file.is_file()), key=lambda file: file.parts)
    if not files:
        raise FileNotFoundError(f"data {source} does not hold {wanted}")
    return files if len(files) == 1 else [file for file in files if file.stat().st_size > 0] or files[:1]


def _is_jsonl(part):
    """Whether this file of a source holds a document a line."""
    return isinstance(part, Path) and part.suffix.lower() == jsonl.SUFFIX


def _slices(text):
    return (text[start : start + _PIECE_BYTES] for start in range(0, len(text), _PIECE_BYTES))


def _read(path):
    """The text of a file in pieces."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    try:
        with open(path, "rb") as file:
            while True:
                block = file.read(_PIECE_BYTES)
                try:
                    piece = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    # error.object holds the bytes left over from the block before, then this block
                    offset = file.tell() - len(error.object) + error.start
                    raise ValueError(
                        f"data file {path} is not UTF-8 text (byte {error.object[error.start]:#04x} at offset "
                        f"{offset}): convert it, for example with iconv -t utf-8"
                    ) from None
                if piece:
                    yield piece
                if not block:
                    return
    except OSError as error:
        raise type(error)(f"data file {path} cannot be read: {error.strerror}") from None


def require_unchanged(recorded: dict, current: dict) -> None:
    """Raises ValueError unless two records (`data.TextData.record`) have the same texts and vocabulary.

    A vocabulary that one of them lacks is not compared, and the path of a text does not matter.
    """
    for name, flag in ((None, "--data"), ("validation", "--val-data")):
        old, new = (record if name is None else record.get(name) for record in (recorded, current))
        if (old is None) != (new is None):
            raise ValueError(f"this run was made {'with' if old else 'without'} {flag}: do the same to resume it")
        if old is not None and old["sha256"] != new["sha256"]:
            sizes = f"{old['characters']:,} characters then, {new['characters']:,} now"
            raise ValueError(
                f"{flag} {new['source']} is not the text this run was made with ({sizes}, SHA-256 "
                f"{old['sha256'][:8]} and {new['sha256'][:8]}): restore that one, or start a new run"
            )
    old, new = recorded.get("vocabulary"), current.get("vocabulary")
    if old and new and old["sha256"] != new["sha256"]:
        raise ValueError(
            f"the vocabulary is not the one this run was made with ({old['kind']} of {old['size']:,} then, "
            f"{new['kind']} of {new['size']:,} now): give the same --embedding-type, --vocab-size and --tokenizer"
        )


DEFAULT_VOCAB_SIZE = 4096
SMALLEST_BPE = 257  # the bytes and <|endoftext|>
# Characters that BPE counts words in: enough for good counts. More cost time, and memory for every rare word.
BPE_SAMPLE = 2**26
_SLICE = 2**14  # characters of a string: tokenizers reads 256 strings ahead, and takes 190 bytes a character


def make_tokenizer(corpus: Corpus, embedding_type: str, *, vocab_size: int | None = None, stop: int | None = None):
    """The tokenizer for a text; where documents are kept apart, it has a token that ends them.

    "shakespearean": all characters that occur in the text, the held-out part included; "byte": the 256 bytes; "bpe":
    pieces of words, trained on the characters before `stop`. Raises ValueError for an impossible vocab_size.
    """
    if embedding_type == "shakespearean":
        return CharTokenizer(corpus.scan.alphabet, end=corpus.in_documents)
    if embedding_type == "byte":
        return ByteTokenizer()
    stop = corpus.scan.characters if stop is None else stop
    return train_bpe(_sample(corpus, stop), DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size)


def train_bpe(texts, vocab_size: int) -> SubwordTokenizer:
    """A byte-level BPE with GPT-2's split into words: it encodes every text, and decodes it unchanged.

    texts: an iterable of strings. Token 0 is <|endoftext|>, the next 256 are the bytes. Too few different words make a
    vocabulary smaller than vocab_size. Raises ValueError without the package `tokenizers`.
    """
    if vocab_size < SMALLEST_BPE:
        raise ValueError(f"vocab_size is {vocab_size}, wanted at least {SMALLEST_BPE}: the bytes and {END_OF_TEXT}")
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("embedding type bpe needs a package: pip install tokenizers") from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return SubwordTokenizer(tokenizer.to_str())


def given_tokenizer(file: str):
    """The tokenizer of a tokenizer.json file, or of a model directory with one."""
    path = Path(file)
    if not path.exists() or (path.is_file() and path.suffix != ".json"):
        what = "is no .json file" if path.exists() else "does not exist"
        raise ValueError(f"tokenizer {file} {what}: give a tokenizer.json, or a directory with one")
    return load_tokenizer(file)


def _sample(corpus, stop):
    """The text before `stop`; of a long text every n-th piece, so that about BPE_SAMPLE characters remain."""
    every = -(-stop // BPE_SAMPLE)
    pieces = (piece for piece in corpus.pieces(0, stop) if isinstance(piece, str))
    for number, piece in enumerate(pieces):
        if number % every == 0:
            for text in piece.split(END_OF_TEXT):  # already a token, not a word to learn
                yield from (text[start : start + _SLICE] for start in range(0, len(text), _SLICE))
