"""Texts in, batches of token ids out: the texts of a run, its data sets, the order of the examples.

    data = load_data("shakespeare")                     # or a file, a folder, a glob: train/corpus.py
    dataset = TokenDataset(data.training.tokens, 64, data.tokenizer)
    dataset = CharDataset(training_text, block_size=64)                 # or of a text that is in memory
    for x, y in training_batches(dataset, batch_size=12, seed=0): ...

Shapes: B examples of T tokens; y is x one token further on.
"""

from dataclasses import dataclass

import numpy as np
import torch

from model.tokenizer import ByteTokenizer, CharTokenizer, SubwordTokenizer

from .corpus import HELD_OUT, Corpus, make_tokenizer, require_unchanged
from .tokens import Encoded, as_tensor, encoder, fingerprint, tokenize


@dataclass(frozen=True)
class TextData:
    """What a run reads: the tokens it is trained on, those held out, their vocabulary.

    record: what is written about it, JSON values: source, characters, bytes, sha256, files; vocabulary: kind, size,
    sha256; and with a text of its own for validation the same of that one. train/corpus.py compares two of them.
    """

    tokenizer: CharTokenizer | ByteTokenizer | SubwordTokenizer
    training: Encoded
    held_out: Encoded
    record: dict


def load_data(
    source: str,
    val_source: str | None = None,
    *,
    tokenizer=None,
    embedding_type: str = "shakespearean",
    vocab_size: int | None = None,
    cache=None,
    recorded: dict | None = None,
) -> TextData:
    """The texts that --data and --val-data name, as tokens (train/tokens.py says where they are kept).

    Without a text of its own for validation, the last 10 % of the characters are held out, by position: they are
    never trained on. tokenizer: a given vocabulary; otherwise the one of `embedding_type` is made. recorded: the
    record of a run to go on with, whose texts and vocabulary these must be. Raises ValueError, OSError or
    ModuleNotFoundError, in one line, for texts and vocabularies that cannot be used.
    """
    corpus = Corpus(source)
    record = describe(corpus)
    held_out_corpus = None if val_source is None else Corpus(val_source)
    if held_out_corpus is not None:
        record["validation"] = describe(held_out_corpus)
    if recorded is not None:  # before anything is made of another text
        require_unchanged({name: value for name, value in recorded.items() if name != "vocabulary"}, record)
    boundary = corpus.boundary() if val_source is None else corpus.scan.characters
    if tokenizer is None:
        tokenizer = make_tokenizer(corpus, embedding_type, vocab_size=vocab_size, stop=boundary)
    training = tokenize(corpus, tokenizer, 0, boundary, cache=cache)
    record["vocabulary"] = {
        "kind": tokenizer.kind,
        "size": tokenizer.vocab_size,
        "sha256": fingerprint(tokenizer.to_json()),
    }
    if recorded is not None:
        require_unchanged(recorded, record)
    if held_out_corpus is None:
        held_out = tokenize(corpus, tokenizer, boundary, cache=cache)
    else:
        held_out = tokenize(held_out_corpus, tokenizer, cache=cache)
    return TextData(tokenizer, training, held_out, record)


def describe(corpus: Corpus) -> dict:
    """By what a later command finds a text again, and knows that it has not changed."""
    scan = corpus.scan
    facts = {"characters": scan.characters, "bytes": scan.bytes, "sha256": scan.sha256}
    return {"source": corpus.source, "files": len(corpus.documents), **facts}


def split(text: str, held_out: float = HELD_OUT) -> tuple[str, str]:
    """(training text, held-out text): the last `held_out` of the characters is kept out, by position."""
    boundary = int(len(text) * (1 - held_out))
    return text[:boundary], text[boundary:]


class TokenDataset:
    """Next-token examples: item i is (x, y), tokens i .. i + block_size - 1 and those one further on.

    tokens (N,): a tensor, or a TokenFile; block_size: tokens per example, the model's context length. len(dataset) is
    the number of examples, one at every position that has a whole one. x and y are int64 (block_size,); `batch` makes
    many examples in one indexing call. Raises ValueError for a text shorter than one example.
    """

    def __init__(self, tokens, block_size: int, tokenizer):
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, wanted at least 1 token")
        self.tokens, self.block_size, self.tokenizer = tokens, block_size, tokenizer
        if len(tokens) <= block_size:
            unit = "characters" if isinstance(tokenizer, CharTokenizer) else "tokens"
            raise ValueError(
                f"text has {len(tokens)} {unit}, one example of context size {block_size} needs {block_size + 1}: "
                f"give a longer text or a smaller context"
            )

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def stoi(self) -> dict[str, int]:
        """Character to token id; of characters only."""
        return self.tokenizer.stoi

    @property
    def itos(self) -> dict[int, str]:
        """Token id to character; of characters only."""
        return self.tokenizer.itos

    def __len__(self) -> int:
        return len(self.tokens) - self.block_size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a data set of {len(self)}")
        x, y = self.batch([index % len(self)])
        return x[0], y[0]

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Examples `indices` (B,) at once: x and y, int64 (B, block_size)."""
        starts = torch.as_tensor(indices)
        chunk = self.tokens[starts[:, None] + torch.arange(self.block_size + 1)].long()  # (B, block_size + 1)
        return chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


class CharDataset(TokenDataset):
    """The examples of a text that is in memory; `tokenizer` is the vocabulary (default: its own characters, sorted)."""

    def __init__(self, text: str, block_size: int, tokenizer=None):
        tokenizer = CharTokenizer.from_text(text or " ") if tokenizer is None else tokenizer
        super().__init__(as_tensor(encoder(tokenizer)(text), tokenizer.vocab_size), block_size, tokenizer)


def training_batches(
    dataset, batch_size: int, seed: int, first_batch: int = 0, num_workers: int = 0, part: tuple[int, int] = (0, 1)
):
    """Batches (x, y) without end, in the shuffled order of train/order.py, beginning with number `first_batch`.

    part: (i, n) gives the i-th of n equal parts of every batch, for one of n processes; n divides batch_size.
    dataset: anything with a length and items (x, y). One with a `batch` method, as CharDataset, is asked for whole
    batches here; another is read item by item in `num_workers` processes (0: in this one).
    """
    if hasattr(dataset, "batch"):
        for indices in _batch_indices(len(dataset), batch_size, seed, first_batch, part):
            yield dataset.batch(indices)
    else:
        indices = _batch_indices(len(dataset), batch_size, seed, first_batch, part)
        # a generator of its own: the loader would otherwise draw from the global one, which dropout uses
        yield from torch.utils.data.DataLoader(
            dataset, batch_sampler=indices, num_workers=num_workers, generator=torch.Generator()
        )


def evaluation_batches(dataset, batch_size: int, examples: int):
    """Batches (x, y) of at most `examples` examples spread evenly over a data set: the same ones at every call."""
    indices = torch.linspace(0, len(dataset) - 1, min(examples, len(dataset)), dtype=torch.float64).long()
    for some in indices.split(batch_size):
        if hasattr(dataset, "batch"):
            yield dataset.batch(some)
        else:
            yield torch.utils.data.default_collate([dataset[int(index)] for index in some])


def _batch_indices(length, batch_size, seed, batch, part):
    """Index lists of the batches from number `batch` on; drawn for many batches at a time, which costs the same."""
    size = batch_size // part[1]
    mine = slice(part[0] * size, (part[0] + 1) * size)
    while True:
        drawn = stream(batch * batch_size, 64 * batch_size, length, seed).reshape(64, batch_size)
        yield from drawn[:, mine].tolist()
        batch += 64


#

_ROUNDS = 6  # with 4, a test of 400 permutations still finds a trace of the unshuffled order
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: products spread into the high bits


def stream(start: int, count: int, length: int, seed: int) -> np.ndarray:
    """Examples (count,) int64 at positions start .. start + count - 1 of the shuffled stream over `length` examples."""
    positions = np.arange(start, start + count)
    epochs = positions // length
    return np.concatenate(
        [
            permuted(positions[epochs == epoch] % length, length, seed, epoch)
            for epoch in range(start // length, (start + count - 1) // length + 1)
        ]
    )


def permuted(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's permutation of 0 .. length - 1 at `positions`: distinct positions give distinct examples."""
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
    bits = max(2, (length - 1).bit_length())
    examples = _feistel(positions.astype(np.uint64), bits, keys)
    # values past the end walk on along their cycle, which comes back below `length`: still one to one
    while (outside := examples >= length).any():
        examples[outside] = _feistel(examples[outside], bits, keys)
    return examples.astype(np.int64)


def _feistel(values, bits, keys):
    """A keyed one-to-one map of [0, 2**bits) onto itself, element by element: each half in turn scrambles the other."""
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    low, high = values & low_mask, values >> np.uint64(low_bits)
    for key in keys:
        # after an even number of rounds the halves are back in their places
        low, high, low_mask, high_mask = high, low ^ (_mix(high, key) & low_mask), high_mask, low_mask
    return high << np.uint64(low_bits) | low


def _mix(values, key):
    """32 well-mixed bits of each value under a 64-bit key."""
    mixed = (values ^ key) * _MULTIPLIER
    return ((mixed ^ mixed >> np.uint64(29)) * _MULTIPLIER) >> np.uint64(32)
