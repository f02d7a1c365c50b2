"""Token ids in batches: the texts of a run, the examples of a data set, and their shuffled order.

    data = load_data("shakespeare")                     # or a file, a folder, a glob: train/corpus.py
    dataset = TokenDataset(data.training.tokens, 64, data.tokenizer)
    dataset = CharDataset(text, block_size=64)          # a text in memory
    for x, y in training_batches(dataset, batch_size=12, seed=0): ...    # both (B, T) int64; y is x shifted by one

The order needs no stored state. The training stream is one permutation of all examples per epoch, and each value of a
permutation is computed from seed, epoch and position. So seed and step give the batch: a run resumes with the very next
batch, and a billion examples need no list of indices.
"""

from dataclasses import dataclass

import numpy as np
import torch

from model.tokenizer import ByteTokenizer, CharTokenizer, SubwordTokenizer

from .corpus import HELD_OUT, Corpus, make_tokenizer, require_unchanged
from .tokens import Encoded, as_tensor, encoder, fingerprint, tokenize


@dataclass(frozen=True)
class TextData:
    """The training tokens, the held-out tokens and the vocabulary of a run.

    record: JSON values that identify them: source, characters, bytes, sha256, files; documents, their number, if they
    are kept apart; vocabulary: kind, size, sha256; validation: the same as for the text, if another text is held out.
    `corpus.require_unchanged` compares two records.
    """

    tokenizer: CharTokenizer | ByteTokenizer | SubwordTokenizer
    training: Encoded
    held_out: Encoded
    record: dict


def load_data(
    source: str,
    held_out_source: str | None = None,
    *,
    tokenizer=None,
    embedding_type: str = "shakespearean",
    vocab_size: int | None = None,
    cache=None,
    documents: bool | None = None,
    recorded: dict | None = None,
) -> TextData:
    """The texts that --data and --val-data name, as tokens. `cache` is the directory of train/tokens.py.

    Without held_out_source the last 10 % of the characters are held out, by position, and never trained on; where
    documents are kept apart, the last documents (`Corpus.boundary`). documents: as for `Corpus`. tokenizer: a given
    vocabulary; None makes the one of `embedding_type`. recorded: the record of a run to resume, which must match.
    Raises ValueError, OSError or ModuleNotFoundError, in one line, for unusable texts and vocabularies.
    """
    corpus = Corpus(source, documents)
    record = _describe(corpus)
    held_out_corpus = None if held_out_source is None else Corpus(held_out_source, corpus.in_documents)
    if held_out_corpus is not None:
        record["validation"] = _describe(held_out_corpus)
    if recorded is not None:
        require_unchanged(recorded, record)  # the texts, before anything is made from another one
    boundary = corpus.boundary() if held_out_corpus is None else corpus.scan.characters
    if tokenizer is None:
        tokenizer = make_tokenizer(corpus, embedding_type, vocab_size=vocab_size, stop=boundary)
    training = tokenize(corpus, tokenizer, 0, boundary, cache=cache)
    sha256 = fingerprint(tokenizer.to_json())
    record["vocabulary"] = {"kind": tokenizer.kind, "size": tokenizer.vocab_size, "sha256": sha256}
    if recorded is not None:
        require_unchanged(recorded, record)  # the vocabulary as well
    held_out = tokenize(held_out_corpus or corpus, tokenizer, 0 if held_out_corpus else boundary, cache=cache)
    return TextData(tokenizer, training, held_out, record)


def _describe(corpus):
    scan = corpus.scan
    facts = {"characters": scan.characters, "bytes": scan.bytes, "sha256": scan.sha256}
    facts |= {"documents": len(scan.ends)} if corpus.in_documents else {}
    return {"source": corpus.source, "files": len(corpus.parts), **facts}


def split(text: str, held_out: float = HELD_OUT) -> tuple[str, str]:
    """(training text, held-out text): the last `held_out` of the characters is held out, by position."""
    boundary = int(len(text) * (1 - held_out))
    return text[:boundary], text[boundary:]


class TokenDataset:
    """Next-token examples: item i is (x, y), tokens i .. i + T - 1 and tokens i + 1 .. i + T, both (T,) int64.

    tokens (N,): a tensor or a TokenFile; context_length: T. There is one example for every start position: N - T.
    `batch` reads many examples in one indexing call. Raises ValueError if N <= T.
    """

    def __init__(self, tokens, context_length: int, tokenizer):
        if context_length < 1:
            raise ValueError(f"context length (block_size) is {context_length}, wanted at least 1 token")
        self.tokens, self.context_length, self.tokenizer = tokens, context_length, tokenizer
        if len(tokens) <= context_length:
            unit = "characters" if isinstance(tokenizer, CharTokenizer) else "tokens"
            raise ValueError(
                f"text has {len(tokens)} {unit}, one example of context length {context_length} needs "
                f"{context_length + 1}: give a longer text or a smaller context"
            )

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def stoi(self) -> dict[str, int]:
        """Character to token id; for a character vocabulary only."""
        return self.tokenizer.stoi

    @property
    def itos(self) -> dict[int, str]:
        """Token id to character; for a character vocabulary only."""
        return self.tokenizer.itos

    def __len__(self) -> int:
        return len(self.tokens) - self.context_length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a data set of {len(self)}")
        return tuple(tensor[0] for tensor in self.batch([index % len(self)]))

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """The examples `indices` (B,): x and y, both (B, T) int64."""
        starts = torch.as_tensor(indices)
        chunk = self.tokens[starts[:, None] + torch.arange(self.context_length + 1)].long()  # (B, T + 1)
        return chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


class CharDataset(TokenDataset):
    """The examples of a text in memory. block_size: tokens of an example, the model's context length.

    tokenizer: the vocabulary; None takes the text's own characters, sorted.
    """

    def __init__(self, text: str, block_size: int, tokenizer=None):
        tokenizer = CharTokenizer.from_text(text or " ") if tokenizer is None else tokenizer
        super().__init__(as_tensor(encoder(tokenizer)(text), tokenizer.vocab_size), block_size, tokenizer)


def training_batches(
    dataset, batch_size: int, seed: int, first_batch: int = 0, num_workers: int = 0, part: tuple[int, int] = (0, 1)
):
    """Endless batches (x, y) in shuffled order, from batch number `first_batch` on.

    dataset: anything with a length and items (x, y), or (x, y, starts) as in train/documents.py. If it has a `batch`
    method, as CharDataset has, that gives whole batches; otherwise a DataLoader reads the items in `num_workers`
    processes (0: in this one). part: (i, n) yields the i-th of n equal parts of each batch, for one of n processes; n
    must divide batch_size.
    """
    indices = _batch_indices(len(dataset), batch_size, seed, first_batch, part)
    if hasattr(dataset, "batch"):
        yield from map(dataset.batch, indices)
    else:
        # with its own generator, the loader leaves the global one, which dropout uses, alone
        yield from torch.utils.data.DataLoader(
            dataset, batch_sampler=indices, num_workers=num_workers, generator=torch.Generator()
        )


def evaluation_batches(dataset, batch_size: int, examples: int):
    """Batches (x, y) of at most `examples` examples, spread evenly over a data set; the same ones at every call."""
    indices = torch.linspace(0, len(dataset) - 1, min(examples, len(dataset)), dtype=torch.float64).long()
    for some in indices.split(batch_size):
        if hasattr(dataset, "batch"):
            yield dataset.batch(some)
        else:
            yield torch.utils.data.default_collate([dataset[int(index)] for index in some])


def _batch_indices(length, batch_size, seed, batch, part):
    """Index lists of the batches from number `batch` on; computing 64 at a time takes as long as one."""
    size = batch_size // part[1]
    mine = slice(part[0] * size, (part[0] + 1) * size)
    while True:
        drawn = stream(batch * batch_size, 64 * batch_size, length, seed).reshape(64, batch_size)
        yield from drawn[:, mine].tolist()
        batch += 64


def stream(start: int, count: int, length: int, seed: int) -> np.ndarray:
    """Indices (count,) int64 at positions start .. start + count - 1 of the shuffled stream over `length` examples.

    Position p holds index permuted(p % length) of epoch p // length.
    """
    positions = np.arange(start, start + count)
    epochs = positions // length
    return np.concatenate(
        [
            permuted(positions[epochs == epoch] % length, length, seed, epoch)
            for epoch in range(start // length, (start + count - 1) // length + 1)
        ]
    )


_ROUNDS = 6  # with 4, a test of 400 permutations still finds a trace of the unshuffled order
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: spreads a product into the high bits


def permuted(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """The values at `positions` of the epoch's permutation of 0 .. length - 1.

    A Feistel network (Luby and Rackoff, 1988) permutes the numbers below the next power of two.
    """
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
    bits = max(2, (length - 1).bit_length())
    examples = _feistel(positions.astype(np.uint64), bits, keys)
    # a value past the end follows its cycle until it is below `length` again: still one to one
    while (outside := examples >= length).any():
        examples[outside] = _feistel(examples[outside], bits, keys)
    return examples.astype(np.int64)


def _feistel(values, bits, keys):
    """A keyed permutation of [0, 2**bits), elementwise: each half in turn is combined with a hash of the other."""
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    low, high = values & low_mask, values >> np.uint64(low_bits)
    for key in keys:
        # the halves swap each round; after an even number of rounds they are in their own places
        low, high, low_mask, high_mask = high, low ^ (_hash(high, key) & low_mask), high_mask, low_mask
    return high << np.uint64(low_bits) | low


def _hash(values, key):
    """32 well-mixed bits of each value under a 64-bit key."""
    mixed = (values ^ key) * _MULTIPLIER
    return ((mixed ^ mixed >> np.uint64(29)) * _MULTIPLIER) >> np.uint64(32)
