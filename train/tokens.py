"""Text to tokens, made once: in memory for a short text, in a memory-mapped file for a long one.

    encoded = tokenize(corpus, tokenizer, stop=corpus.boundary())
    encoded.tokens[positions]                # int64, whatever the stored dtype

Text and tokens are processed in pieces, so memory does not grow with them. The name of a token file is a hash of the
text, the part of it and the vocabulary: later runs find the same tokens, and a changed text or vocabulary gets another
file. The files lie in `default_cache()` and may be removed at any time.
"""

import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model.checkpoint import replacing
from model.tokenizer import ByteTokenizer, CharTokenizer

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

    tokens (N,): a torch tensor or a `TokenFile`. Both take an index tensor of any shape.
    """

    tokens: "torch.Tensor | TokenFile"
    characters: int
    bytes: int


def default_cache() -> Path:
    """$XDG_CACHE_HOME/sliding-gqa, or ~/.cache/sliding-gqa."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sliding-gqa"


def tokenize(corpus: Corpus, tokenizer, start: int = 0, stop: int | None = None, *, cache=None) -> Encoded:
    """The tokens of the characters start .. stop - 1, with the separator between documents.

    cache: the directory of token files (None: `default_cache()`). Raises ValueError if the tokenizer cannot encode the
    text, or the text changes during the call; OSError if the token file cannot be written.
    """
    stop = corpus.scan.characters if stop is None else stop
    if corpus.scan.bytes <= IN_MEMORY[tokenizer.kind]:
        return _in_memory(corpus, tokenizer, start, stop)
    directory = default_cache() if cache is None else Path(cache)
    made_from = [VERSION, corpus.scan.sha256, start, stop, fingerprint(tokenizer.to_json())]
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

    Between documents comes the tokenizer's <|endoftext|>, if it has one.
    """
    encode, rest = encoder(tokenizer), ""
    for piece in pieces:
        if piece is DOCUMENT_END:
            yield encode(rest)
            rest = ""
            if tokenizer.end_of_text is not None:
                yield np.array([tokenizer.end_of_text])
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
    table = np.full(0x110000, -1, dtype=np.int32)
    for character, token in tokenizer.stoi.items():
        table[ord(character)] = token

    def encode(text):
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


def _encoded_parts(corpus, tokenizer, start, stop, counts, bar=None):
    """Arrays of the tokens of start .. stop - 1; adds their size to counts, [characters, bytes]."""

    def counted():
        for piece in corpus.pieces(start, stop):
            if piece is not DOCUMENT_END:
                counts[0] += len(piece)
                counts[1] += len(piece) if piece.isascii() else len(piece.encode())
                if bar is not None:
                    bar.update(len(piece))
            yield piece

    try:
        yield from encode_stream(tokenizer, counted())
    except ValueError as error:
        raise ValueError(str(error) if corpus.name in str(error) else f"data {corpus.name}: {error}") from None
    if counts[0] != stop - start:
        raise ValueError(f"data {corpus.name} changed while it was read: start again when it is complete")


def _in_memory(corpus, tokenizer, start, stop):
    counts = [0, 0]
    parts = list(_encoded_parts(corpus, tokenizer, start, stop, counts))
    return Encoded(as_tensor(np.concatenate(parts), tokenizer.vocab_size), *counts)


def _write(path, corpus, tokenizer, start, stop):
    """Writes the token file, then a JSON file about it: a token file without that one is not used."""
    counts, count, dtype = [0, 0], 0, np.min_scalar_type(tokenizer.vocab_size - 1)
    with (
        replacing(path, path.with_suffix(".json")) as (temporary, about),
        tqdm(total=stop - start, unit="char", unit_scale=True, desc="making tokens", leave=False) as bar,
    ):
        with open(temporary, "wb") as file:
            for part in _encoded_parts(corpus, tokenizer, start, stop, counts, bar):
                file.write(part.astype(dtype).tobytes())
                count += len(part)
        facts = {"source": corpus.source, "sha256": corpus.scan.sha256, "start": start, "stop": stop}
        facts |= {"tokens": count, "dtype": dtype.str, "characters": counts[0], "bytes": counts[1]}
        about.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return _read(path)


def _read(path):
    """The tokens of a complete file, else None."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        tokens = TokenFile(path, facts["dtype"])
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return Encoded(tokens, facts["characters"], facts["bytes"]) if len(tokens) == facts["tokens"] else None
