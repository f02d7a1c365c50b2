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
        # (P, 3): first token, inputs, inputs before the first target that counts; row i has pieces _first[i] ..
        self._pieces, rows = pieces[order], rows[order]
        self._first = np.searchsorted(rows, np.arange(rows[-1] + 2))
        self.padding = 1 - pieces[:, 1].sum() / (len(self) * context_length)

    def __len__(self) -> int:
        return len(self._first) - 1

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows `indices` (B,): x and y int64, starts int32, all (B, T)."""
        T, indices = self.context_length, np.asarray(indices)
        of_row = [np.arange(self._first[row], self._first[row + 1]) for row in indices]
        begin, inputs, skipped = self._pieces[np.concatenate(of_row)].T
        filled = np.concatenate([np.cumsum(self._pieces[some, 1]) for some in of_row])
        row = np.repeat(np.arange(len(indices)), [len(some) for some in of_row])
        # every position of a token, piece after piece: in its piece, in the text, in the batch
        within = np.arange(inputs.sum()) - np.repeat(np.cumsum(inputs) - inputs, inputs)
        start = np.repeat(filled - inputs, inputs)
        at = np.repeat(row * T, inputs) + start + within
        last = np.array([self._pieces[some, 1].sum() for some in of_row])
        starts = np.repeat(last, T)  # the padding is one document
        starts[at] = start
        position, counts = np.zeros(len(indices) * T, dtype=np.int64), np.zeros(len(indices) * T, dtype=bool)
        position[at] = np.repeat(begin, inputs) + within
        counts[at] = within >= np.repeat(skipped, inputs)
        found = self.tokens[torch.from_numpy(np.stack([position, position + 1]))].long()
        is_token = torch.zeros(len(position), dtype=torch.bool)
        is_token[torch.from_numpy(at)] = True
        x = found[0].masked_fill_(~is_token, self.tokenizer.end_of_text)
        y = found[1].masked_fill_(~torch.from_numpy(counts), -1)
        starts = torch.from_numpy(starts.astype(np.int32))
        return tuple(tensor.view(len(indices), T) for tensor in (x, y, starts))


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
