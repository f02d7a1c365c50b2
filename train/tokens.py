"""Text to tokens, made once: in memory for a short text, in a memory-mapped file for a long one.

    encoded = tokenize(corpus, tokenizer, stop=corpus.boundary())
    encoded.tokens[positions]                # int64, whatever the stored dtype

Text and tokens are processed in pieces, so memory does not grow with them. The name of a token file is a hash of the
text, the part of it and the vocabulary: later runs find the same tokens, and a changed text or vocabulary gets another
file. The files lie in `cache_directory()` and may be removed at any time.
"""

import hashlib
import json
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model.checkpoint import replacing
from model.command import cache_directory
from model.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer

from .corpus import DOCUMENT_END, Corpus, code_points
from .lock import only_one

VERSION = 1  # of the file format: a new number makes all files again
# Texts up to this size, in bytes, are encoded in memory at every start. That takes half a second for characters;
# subwords take 20 times as long.
IN_MEMORY = {"characters": 2**25, "bytes": 2**25, "subwords": 2**20}
_LEAST_TO_CUT = 2**16  # characters


@dataclass(frozen=True)
class Encoded:
    """The tokens of a part of a text, and its number of characters and UTF-8 bytes (separators not counted).

    tokens (N,): a torch tensor or a `TokenFile`. Both take an index tensor of any shape. prompts: [first token, token
    after the last] of each prompt, which is not trained on. in_documents: whether each document ends with the
    vocabulary's <|endoftext|> and is kept apart.
    """

    tokens: "torch.Tensor | TokenFile"
    characters: int
    bytes: int
    prompts: list = field(default_factory=list)
    in_documents: bool = False


def tokenize(corpus: Corpus, tokenizer, start: int = 0, stop: int | None = None, *, cache=None) -> Encoded:
    """The tokens of the characters start .. stop - 1, with the separator between documents.

    Where the documents are kept apart, it follows the last one too. cache: the directory of token files (None:
    `cache_directory()`). Raises ValueError if the tokenizer cannot encode the text or the end of a document, the text
    changes during the call, or prompts are read as one stream; OSError if the token file cannot be written.
    """
    stop = corpus.scan.characters if stop is None else stop
    if corpus.in_documents and tokenizer.end_of_text is None:
        raise ValueError(
            f"data {corpus.name} is read in documents, but the vocabulary has no {END_OF_TEXT} to end them: give "
            "another --tokenizer, or --no-documents"
        )
    if corpus.scan.prompts and not corpus.in_documents:
        raise ValueError(f"data {corpus.name} has prompts, which are not trained on: leave out --no-documents")
    if corpus.scan.bytes <= IN_MEMORY[tokenizer.kind]:
        return _in_memory(corpus, tokenizer, start, stop)
    directory = cache_directory() if cache is None else Path(cache)
    made_from = [VERSION, corpus.scan.sha256, start, stop, fingerprint(tokenizer.to_json())]
    made_from += ["documents"] if corpus.in_documents else []
    path = directory / f"{fingerprint(json.dumps(made_from))[:32]}.tokens"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with only_one(path.with_suffix(".lock")):  # one process of a run makes the file, the others wait
            return _read(path) or _write(path, corpus, tokenizer, start, stop)
    except OSError as error:
        if error.errno is None:  # the message is complete
            raise
        raise type(error)(
            f"token file {path} cannot be written: {error.strerror} (--token-cache names another directory)"
        ) from None


class TokenFile:
    """A file of tokens, (N,), that reads like a tensor: file[positions] and file[start:stop] are int64 tensors.

    Each read maps the file again: one lasting map would keep every page that was read, the whole file after an epoch.
    The file stays open, so it can be removed while it is read.
    """

    def __init__(self, path, dtype):
        self.path, self.dtype = Path(path), np.dtype(dtype)
        self._file = open(path, "rb")  # noqa: SIM115
        self._length = os.fstat(self._file.fileno()).st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index) -> torch.Tensor:
        if torch.is_tensor(index):
            index = index.numpy()
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, dtype=self.dtype)
            try:
                return torch.from_numpy(np.asarray(view[index], dtype=np.int64).copy())
            finally:
                del view  # a map with a view cannot be closed

    def __reduce__(self):
        return TokenFile, (self.path, self.dtype.str)


def encode_stream(tokenizer, pieces):
    """Arrays of the tokens of `Corpus.pieces`. The tokens do not depend on where the pieces were cut.

    Between documents comes the tokenizer's <|endoftext|>, if it has one. A prompt is encoded apart from what follows,
    as it is when a model is sampled from. DOCUMENT_END and PROMPT_END come after the tokens before them.
    """
    encode, rest = encoder(tokenizer), ""
    for piece in pieces:
        if isinstance(piece, bytes):
            yield encode(rest)
            rest = ""
            if piece == DOCUMENT_END and tokenizer.end_of_text is not None:
                yield np.array([tokenizer.end_of_text])
            yield piece
            continue
        rest += piece
        if len(rest) >= _LEAST_TO_CUT:
            at = tokenizer.cut(rest)
            yield encode(rest[:at])
            rest = rest[at:]
    yield encode(rest)


def encoder(tokenizer):
    """A function from a text to the array (N,) of its tokens; for characters it is one table look-up.

    It raises the tokenizer's ValueError for a character that is not in the vocabulary.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return lambda text: np.frombuffer(tokenizer.encode_to_bytes(text), dtype=np.uint8)
    if not isinstance(tokenizer, CharTokenizer):
        return lambda text: np.frombuffer(tokenizer.encode_to_bytes(text), dtype=np.int32)
    table, end = np.full(0x110000, -1, dtype=np.int32), tokenizer.end_of_text
    for character, token in tokenizer.stoi.items():
        table[ord(character)] = token

    def encode(text):
        if end is not None and END_OF_TEXT in text:
            return np.array(tokenizer.encode(text), dtype=np.int32)
        tokens = table[code_points(text)]
        if tokens.size and tokens.min() < 0:
            tokenizer.encode(text)
        return tokens

    return encode


def as_tensor(tokens: np.ndarray, vocab_size: int) -> torch.Tensor:
    """The tokens as a tensor: uint8 or int32, since torch supports few operations on uint16."""
    return torch.from_numpy(tokens.astype(np.uint8 if vocab_size <= 2**8 else np.int32))


def fingerprint(text: str) -> str:
    """The SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


class _Encoding:
    """An iterator over arrays of the tokens of start .. stop - 1, which counts what `Encoded` holds."""

    def __init__(self, corpus, tokenizer, start, stop):
        self.corpus, self.tokenizer, self.start, self.stop = corpus, tokenizer, start, stop
        self.tokens, self.characters, self.bytes, self.prompts = 0, 0, 0, []

    def __iter__(self):
        name, document = self.corpus.name, 0
        try:
            for part in encode_stream(self.tokenizer, self._pieces()):
                if not isinstance(part, bytes):
                    self.tokens += len(part)
                    yield part
                elif part == DOCUMENT_END:
                    document = self.tokens
                else:
                    self.prompts.append([document, self.tokens])
        except ValueError as error:
            raise ValueError(str(error) if name in str(error) else f"data {name}: {error}") from None
        if self.characters != self.stop - self.start:
            raise ValueError(f"data {name} changed while it was read: start again when it is complete")

    def _pieces(self):
        for piece in self.corpus.pieces(self.start, self.stop):
            if isinstance(piece, str):
                self.characters += len(piece)
                self.bytes += len(piece) if piece.isascii() else len(piece.encode())
            yield piece
        if self.corpus.in_documents and self.stop == self.corpus.scan.characters:
            yield DOCUMENT_END

    def encoded(self, tokens):
        return Encoded(tokens, self.characters, self.bytes, self.prompts, self.corpus.in_documents)


def _in_memory(corpus, tokenizer, start, stop):
    encoding = _Encoding(corpus, tokenizer, start, stop)
    tokens = np.concatenate(list(encoding))
    return encoding.encoded(as_tensor(tokens, tokenizer.vocab_size))


def _write(path, corpus, tokenizer, start, stop):
    """Writes the token file, then a JSON file about it: a token file without that one is not used."""
    encoding, dtype = _Encoding(corpus, tokenizer, start, stop), np.min_scalar_type(tokenizer.vocab_size - 1)
    with (
        replacing(path, path.with_suffix(".json")) as (temporary, about),
        tqdm(total=stop - start, unit="char", unit_scale=True, desc="making tokens", leave=False) as bar,
    ):
        with open(temporary, "wb") as file:
            for part in encoding:
                file.write(part.astype(dtype).tobytes())
                bar.update(encoding.characters - bar.n)
        facts = {"source": corpus.source, "sha256": corpus.scan.sha256, "start": start, "stop": stop}
        facts |= {"tokens": encoding.tokens, "dtype": dtype.str, "characters": encoding.characters}
        facts |= {"bytes": encoding.bytes, "prompts": encoding.prompts, "in_documents": corpus.in_documents}
        about.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return _read(path)


def _read(path):
    """The tokens of a complete file, else None."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        tokens = TokenFile(path, facts["dtype"])
    except (FileNotFoundError, ValueError, KeyError):
        return None
    made = Encoded(
        tokens, facts["characters"], facts["bytes"], facts.get("prompts", []), facts.get("in_documents", False)
    )
    return made if len(tokens) == facts["tokens"] else None
