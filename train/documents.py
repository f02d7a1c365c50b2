"""Documents packed into rows, none of which is looked across: `PackedDataset`.

    rows = PackedDataset(encoded, 8, tokenizer)        # encoded: train/tokens.py, where each document ends with <end>
    x, y, starts = rows.batch([0, 7])                  # each (B, 8)

    documents      a b c d <end>    e f <end>
    x              a b c d e f . .        inputs: the tokens that have a next one in their document
    y              b c d < f < - -        the next tokens; -1 for padding and for prompts, which are not trained on
    starts         0 0 0 0 4 4 6 6        where the document of a position begins, for GPT.forward

A document of more inputs than a row has is cut into pieces, each a document of its own: the first token of a piece was
the last target of the piece before. So every token but the first of a document is a target exactly once. Pieces without
a target, such as the beginning of a long prompt, are left out.
"""

from bisect import bisect_left, insort

import numpy as np
import torch

from .data import TokenDataset
from .tokens import Encoded

_READ = 2**22  # tokens that are searched at once


class PackedDataset(TokenDataset):
    """Rows of context_length tokens that hold whole documents. Item i is (x, y, starts), each (context_length,).

    stride: tokens from one piece of a long document to the next (None: context_length). With a smaller one pieces
    overlap, and a target counts in the first piece that reaches it.
    documents (N, 3): first token, token after the last, and token after the prompt (the first token without one).
    padding: the share of positions that hold no token. Raises ValueError for a stride outside 1 .. context_length, and
    if there is no target.
    """

    def __init__(self, encoded: Encoded, context_length: int, tokenizer, stride: int | None = None):
        stride = context_length if stride is None else stride
        if not 1 <= stride <= context_length:
            raise ValueError(f"stride is {stride}, wanted 1 to the context length, {context_length}")
        self.tokens, self.context_length, self.tokenizer = encoded.tokens, context_length, tokenizer
        self.documents = find_documents(encoded, tokenizer.end_of_text)
        pieces = cut(self.documents, context_length, stride)
        if not len(pieces):
            raise ValueError("text has no document of two tokens, at least 2 are needed to predict one from another")
        rows = best_fit(pieces[:, 1], context_length)
        order = np.argsort(rows, kind="stable")
        begin, inputs, skipped = pieces[order].T
        # row i holds pieces _first[i] .. _first[i + 1] - 1, in its first _filled[i] positions
        self._first = np.append(0, np.cumsum(np.bincount(rows)))
        before = np.append(0, np.cumsum(inputs))
        self._filled = np.diff(before[self._first])
        column = before[:-1] - before[self._first][rows[order]]
        self._pieces = np.stack([begin, inputs, skipped, column], axis=1)
        self.padding = 1 - pieces[:, 1].sum() / (len(self) * context_length)

    def __len__(self) -> int:
        return len(self._first) - 1

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows `indices` (B,): x and y int64, starts int32, all (B, T)."""
        T, rows = self.context_length, np.asarray(indices)
        of_row = [np.arange(self._first[row], self._first[row + 1]) for row in rows]
        begin, inputs, skipped, column = self._pieces[np.concatenate(of_row)].T
        first = np.repeat(np.arange(len(rows)) * T, [len(pieces) for pieces in of_row])
        # one entry for each token, piece after piece: its place in the piece, and in the batch
        within = np.arange(inputs.sum()) - np.repeat(np.cumsum(inputs) - inputs, inputs)
        at = np.repeat(first + column, inputs) + within
        position, counts = np.full(len(rows) * T, -1), np.zeros(len(rows) * T, dtype=bool)
        position[at] = np.repeat(begin, inputs) + within
        counts[at] = within >= np.repeat(skipped, inputs)
        starts = np.repeat(self._filled[rows], T).astype(np.int32)  # the padding is one more document
        starts[at] = np.repeat(column, inputs)
        x, y = self.tokens[torch.from_numpy(np.maximum(0, [position, position + 1]))].long()
        x = x.masked_fill_(torch.from_numpy(position < 0), self.tokenizer.end_of_text)
        y = y.masked_fill_(torch.from_numpy(~counts), -1)
        return tuple(tensor.view(len(rows), T) for tensor in (x, y, torch.from_numpy(starts)))


def find_documents(encoded: Encoded, end_of_text: int) -> np.ndarray:
    """(N, 3) int64: first token, token after the last, and token after the prompt, of documents of 2 tokens or more."""
    count, ends = len(encoded.tokens), []
    for first in range(0, count, _READ):
        ends.append(first + 1 + (encoded.tokens[first : first + _READ] == end_of_text).nonzero()[:, 0].numpy())
    end = np.concatenate(ends) if ends else np.zeros(0, dtype=np.int64)
    end = end if len(end) and end[-1] == count else np.append(end, count)
    begin = np.concatenate([[0], end[:-1]])
    # the prompt that holds a document's first token, if any; <|endoftext|> in a prompt divides it too
    spans = np.array(encoded.prompts, dtype=np.int64).reshape(-1, 2)
    number = np.searchsorted(spans[:, 0], begin, side="right") - 1
    stop = np.append(spans[:, 1], 0)[number]  # number -1 is the 0
    documents = np.stack([begin, end, np.clip(stop, begin, end)], axis=1)
    return documents[end - begin > 1]


def cut(documents: np.ndarray, length: int, stride: int) -> np.ndarray:
    """(P, 3) int64: first token, inputs, inputs before the first target that counts, of the pieces that have one."""
    begin, end, after_prompt = documents.T
    inputs = end - begin - 1
    pieces = np.maximum(1, -(-(inputs - (length - stride)) // stride))
    document = np.repeat(np.arange(len(documents)), pieces)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = begin[document] + number * stride
    taken = np.minimum(length, end[document] - 1 - first)
    skipped = np.maximum(np.where(number > 0, length - stride, 0), after_prompt[document] - 1 - first)
    found = np.stack([first, taken, np.maximum(0, skipped)], axis=1)
    return found[found[:, 2] < taken]


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each size, by best-fit decreasing (Johnson et al. 1974): the largest first, each into the fullest row
    that has room for it. No row holds more than `capacity`.
    """
    rows, count = np.empty(len(sizes), dtype=np.int64), 0
    rows_with, rooms = {}, []  # {room: rows}, and the rooms that some row has, sorted
    order = np.argsort(-sizes, kind="stable")
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, room, count = count, capacity, count + 1
        else:
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[at]
        rows[piece], room = row, room - size
        if room:
            if not rows_with.setdefault(room, []):
                insort(rooms, room)
            rows_with[room].append(row)
    return rows
