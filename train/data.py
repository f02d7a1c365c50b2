"""Text in, batches of token ids out: the text, its held-out part, the data set, the order of its examples.

    text = load_text("shakespeare")                     # or "tinyshakespeare", or the path of any UTF-8 file
    training_text, held_out_text = split(text)          # by position: the last 10 % is never trained on
    dataset = CharDataset(training_text, block_size=64)
    for x, y in training_batches(dataset, batch_size=12, seed=0): ...

Shapes: B examples of T tokens; y is x one character further on.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from model.tokenizer import CharTokenizer

from .order import stream
from .shakespeare import COLLECTIONS, plays

HELD_OUT = 0.1  # nanoGPT's split, so that losses on the same text compare


def load_text(source: str) -> str:
    """The text that `--data` names: a collection of Shakespeare's plays, or a UTF-8 file ("\\r\\n" read as "\\n").

    Raises OSError for a file that cannot be read, ValueError for one that is empty or not UTF-8, ModuleNotFoundError
    where the plays are not installed; each in one line that says what to do.
    """
    if source in COLLECTIONS:
        return plays(source)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"data file {source} does not exist: give a text file, or {' or '.join(COLLECTIONS)}")
    if path.is_dir():
        raise IsADirectoryError(f"data {source} is a directory: give one UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data file {source} is not UTF-8 text (byte {error.object[error.start]:#04x} at offset {error.start}): "
            f"convert it, for example with iconv -t utf-8"
        ) from None
    except OSError as error:
        raise type(error)(f"data file {source} cannot be read: {error.strerror}") from None
    if not text:
        raise ValueError(f"data file {source} is empty: give a text of more characters than one context")
    return text


def split(text: str, held_out: float = HELD_OUT) -> tuple[str, str]:
    """(training text, held-out text): the last `held_out` of the characters is kept out, by position."""
    boundary = int(len(text) * (1 - held_out))
    return text[:boundary], text[boundary:]


class CharDataset:
    """Next-character examples of a text: item i is (x, y), characters i .. i + block_size - 1 and those one further on.

    text: what is read; block_size: characters per example, the model's context length; tokenizer: the vocabulary to
    use (default: the text's own characters, sorted). len(dataset) is the number of examples, one at every position
    that has a whole one. x and y are int64 (block_size,); `batch` makes many examples in one indexing call.
    Raises ValueError for a text shorter than one example, or with characters that `tokenizer` does not have.
    """

    def __init__(self, text: str, block_size: int, tokenizer: CharTokenizer | None = None):
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, wanted at least 1 character")
        if len(text) <= block_size:
            raise ValueError(
                f"text has {len(text)} characters, one example of context size {block_size} needs {block_size + 1}: "
                f"give a longer text or a smaller context"
            )
        self.block_size = block_size
        self.tokenizer = CharTokenizer.from_text(text) if tokenizer is None else tokenizer
        self.tokens = encode_fast(text, self.tokenizer)  # (len(text),), fewer if the tokenizer has longer pieces
        if len(self.tokens) <= block_size:
            raise ValueError(
                f"text has {len(self.tokens)} tokens, one example of context size {block_size} needs {block_size + 1}: "
                f"give a longer text or a smaller context"
            )

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def stoi(self) -> dict[str, int]:
        """Character to token id."""
        return self.tokenizer.stoi

    @property
    def itos(self) -> dict[int, str]:
        """Token id to character."""
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


def encode_fast(text: str, tokenizer) -> torch.Tensor:
    """`tokenizer.encode(text)`, of characters as one table look-up: token ids, uint8 or int32, whichever is enough.

    Raises the tokenizer's own ValueError for characters that it does not have.
    """
    if not isinstance(tokenizer, CharTokenizer):
        return torch.tensor(tokenizer.encode(text), dtype=torch.int32)
    table = np.full(0x110000, -1, dtype=np.int32)
    for character, token in tokenizer.stoi.items():
        table[ord(character)] = token
    tokens = table[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)]
    if tokens.size and tokens.min() < 0:
        tokenizer.encode(text)
    return torch.from_numpy(tokens.astype(np.uint8) if tokenizer.vocab_size <= 256 else tokens)


def training_batches(dataset, batch_size: int, seed: int, first_batch: int = 0, num_workers: int = 0):
    """Batches (x, y) without end, in the shuffled order of train/order.py, beginning with number `first_batch`.

    dataset: anything with a length and items (x, y). One with a `batch` method, as CharDataset, is asked for whole
    batches here; another is read item by item in `num_workers` processes (0: in this one).
    """
    if hasattr(dataset, "batch"):
        for indices in _batch_indices(len(dataset), batch_size, seed, first_batch):
            yield dataset.batch(indices)
    else:
        indices = _batch_indices(len(dataset), batch_size, seed, first_batch)
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


def _batch_indices(length, batch_size, seed, batch):
    """Index lists of the batches from number `batch` on; drawn for many batches at a time, which costs the same."""
    while True:
        yield from stream(batch * batch_size, 64 * batch_size, length, seed).reshape(64, batch_size).tolist()
        batch += 64


def fingerprint(text: str) -> str:
    """SHA-256 of a text, by which a later command knows that it has not changed."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
