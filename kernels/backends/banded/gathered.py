"""Steps for rows of several documents, and for windows to both sides: the key slices of a step lie anywhere.

Row blocks begin at the multiples of L, wherever documents begin, and the keys are cut into pieces of L. A block meets
the pieces that its rows see; a mask hides what a row does not. L=2, window=3, documents of 3, 1 and 4 tokens:

    keys      0 1 2 3 4 5 6 7
    block 0   1                 one piece
              1 1
    block 1   1 1 1             two pieces, two documents
                    1
    block 2           1         one piece
                      1 1
    block 3           1 1 1     two pieces
                        1 1 1

Blocks of about as many pieces are one batch of products, in whatever sequences they lie. So short documents share a
block, and long ones a step. Rows, key slices and their gradients move by index, which costs what a strided copy does.
"""

import math
from functools import lru_cache

import torch

from .plan import BLOCK_LENGTHS, most_scores
from .rope import rotate_pairs_back
from .scratch import scratch

# What a cut is weighed by, in multiply-adds, as in plan.py: measured on two cores of an AMD EPYC (Zen 5)
STEP_WORK = 2**25
ROW_WORK = 24  # keys and their gradients move by index


class GatheredStep:
    """Row blocks of one length with key slices of one width, of some KV heads: what `plan.Step` is to regions."""

    def __init__(self, heads, first_row, length, pieces, piece, sequence, block, first_piece, left, right, device):
        self.heads, self.length, self.pieces, self.piece, self.width = heads, length, pieces, piece, pieces * piece
        row = first_row + block[:, None] * piece + torch.arange(length)
        sequence, first_piece = sequence[:, None], first_piece[:, None]  # (n, 1), as all are (n, something)
        # the first and the last key that a row sees, counted in its key slice
        left, right = (side[sequence, row] - first_piece * piece for side in (left, right))
        gone, ahead = int(left.max()), self.width - 1 - int(right.min())
        apart = gone + ahead < self.width
        # the columns that some row does not see
        self.masked = [slice(0, gone), slice(self.width - ahead, self.width)] if apart else [slice(0, self.width)]
        self.row, self.sequence, self.first_piece, self.left, self.right = (
            x.to(device) for x in (row, sequence, first_piece, left, right)
        )
        self.indices = {}  # of memory layouts

    @property
    def products(self):
        return (self.heads.stop - self.heads.start) * len(self.row)

    def rows(self, x, G):
        """The step's part of x (B, Hkv * G, T, D), as scratch (h, n, L, G, D)."""
        shape = self.products, self.length * G, x.shape[3]
        out = self.read(x, G, scratch("rows", shape, x.dtype, x.device))
        return out.view(-1, len(self.row), self.length, G, x.shape[3])

    def read(self, x, G, out):
        """The same, copied into out (h * n, L * G, D)."""
        if x.dtype != out.dtype:
            return out.copy_(self.rows(x, G).view(out.shape))
        memory, index = self._memory(x, G)
        torch.index_select(memory, 0, index, out=out.view(-1, memory.shape[1]))
        return out

    def write(self, x, G, values, rotation=None):
        """values (h * n, L * G, D) to the step's rows of x, which are zeros; rotated back if they are rotated."""
        if rotation is not None:
            values = values.view(-1, len(self.row), self.length, G, x.shape[3])
            values = rotate_pairs_back(values, rotation, scratch("rows", values.shape, x.dtype, x.device))
        memory, index = self._memory(x, G)
        # three times as fast as index_copy_
        memory.index_add_(0, index, values.to(x.dtype).view(-1, memory.shape[1]))

    def numbers(self, x, G):
        """Of one number a row: x (B, Hkv * G, T) as (h * n, L * G, 1)."""
        return self.rows(x[..., None], G).view(-1, self.length * G, 1)

    def _memory(self, x, G):
        """x's memory as a matrix, whose row i is G * D (or D) elements, and which of its rows are the step's."""
        (B, H, T, D), (b, h, t, d) = x.shape, x.stride()
        assert d == 1 or D == 1
        key = G, D, b, h, t
        if key not in self.indices:
            together = 1 if h == D or G == 1 else G  # heads of a group that are not one run of memory
            unit = math.gcd(b, h * G // together, t) or 1
            head = torch.arange(self.heads.start * together, self.heads.stop * together, device=self.row.device)
            index = (self.sequence * b + self.row * t).view(1, *self.row.shape, 1) // unit
            index = index + (head * (h * G // together // unit)).view(-1, 1, 1, together)
            self.indices[key] = index.flatten(), G * D // together, unit
        index, width, unit = self.indices[key]
        reach = (B - 1) * b + (H - 1) * h + (T - 1) * t + D
        return x.as_strided(((reach - width) // unit + 1, width), (unit, 1)), index

    def copy_keys(self, x, out):
        """The step's key slices of x (B, Hkv, pieces * L, D), dense, into out (h * n, N, D)."""
        size = self.piece * x.shape[3]
        torch.index_select(x.view(-1, size), 0, self._pieces(x), out=out.view(-1, size))
        return out

    def add_to_keys(self, x, summands):
        """x (B, Hkv, pieces * L, D), dense, += summands (h * n, N, D), each at its block's keys."""
        size = self.piece * x.shape[3]
        x.view(-1, size).index_add_(0, self._pieces(x), summands.view(-1, size))

    def _pieces(self, x):
        B, Hkv, S, _ = x.shape
        if (Hkv, S) not in self.indices:
            head = torch.arange(self.heads.start, self.heads.stop, device=self.row.device)[:, None, None]
            of_block = self.first_piece + torch.arange(self.pieces, device=self.row.device)
            self.indices[Hkv, S] = ((self.sequence * Hkv + head) * (S // self.piece) + of_block).flatten()
        return self.indices[Hkv, S]

    def rotation(self, rotation, offset):
        """The rotation (S, R / 2) of the step's rows, (n, L, 1, R / 2); offset: the position of row 0."""
        return rotation[self.row + offset][:, :, None]

    def mask(self, scores, G):
        """Adds -inf to the scores (h * n, L * G, N) of keys that a row does not see."""
        scores = scores.view(-1, len(self.row), self.length, G, self.width)
        for columns in self.masked:
            key = torch.arange(columns.start, columns.stop, device=scores.device)
            hidden = (key < self.left[..., None]).logical_or_(key > self.right[..., None])
            mask = scratch("mask", hidden.shape, scores.dtype, scores.device).zero_()
            scores[..., columns].add_(mask.masked_fill_(hidden, float("-inf"))[:, :, None])


def is_gathered(steps):
    return bool(steps) and isinstance(steps[0], GatheredStep)


def padded_length(S, steps):
    """S, rounded up to whole pieces."""
    return -(-S // steps[0].piece) * steps[0].piece


def several_documents(starts):
    """starts, or None if every row is one document; on a GPU, it waits."""
    return None if starts is None or not starts.any() else starts


def gathered_steps(q, k, starts, window, right, threads):
    """The steps of one call, for q (B, Hq, T, D) and k (B, Hkv, S, D).

    It reads starts on the host. On a GPU, where this backend is for what Triton has no tiles for, that waits, and no
    CUDA graph can hold it.
    """
    (B, Hq, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    documents = None if starts is None else starts.cpu().contiguous().numpy().tobytes()
    window, right = (None if side is None or side >= S else side for side in (window, right))
    return _plan(documents, B, Hkv, Hq // Hkv, T, S, window, right, D, threads, q.device)


@lru_cache(maxsize=8)  # for all layers of a model, forward and backward; a plan holds indices of every row
def _plan(documents, B, Hkv, G, T, S, window, right, D, threads, device):
    if B == 0 or T == 0:
        return []
    left, right = _visible_keys(documents, B, T, S, window, right)
    cuts = [_cut(left, right, S, Hkv, G, L, D, threads) for L in BLOCK_LENGTHS]
    _, L, steps = min(cuts, key=lambda cut: cut[0])
    return [
        GatheredStep(heads, first_row, length, pieces, L, *blocks, left, right, device)
        for first_row, length, pieces, blocks, heads in steps
    ]


def _visible_keys(documents, B, T, S, window, right):
    """The first and the last key that each row sees: two (B, T)."""
    position = torch.arange(S)
    if documents is None:
        first, last = position.new_zeros(B, S), position.new_full((B, S), S - 1)
    else:
        # clamped: wrong values, which only a GPU's starts may have, must read nothing outside
        starts = torch.frombuffer(bytearray(documents), dtype=torch.int32).view(B, S).long()
        first = torch.minimum(starts.clamp_(min=0), position)
        begins = torch.where(first == position, position, S)
        last = torch.full((B, S), S - 1)
        last[:, :-1] = begins.flip(1).cummin(1).values.flip(1)[:, 1:] - 1
    if window is not None:
        first = torch.maximum(first, position - window + 1)
    if right is not None:
        last = torch.minimum(last, position + right)
    return first[:, S - T :].contiguous(), last[:, S - T :].contiguous()


def _cut(left, right, S, Hkv, G, L, D, threads):
    """(work, L, steps) of blocks of L. A step is (first_row, length, pieces, (sequence, block, first_piece), heads)."""
    (B, T), work, steps = left.shape, 0, []
    offset, total = S - T, -(-S // L)
    row = 0
    while row < T:
        length = min(L - (offset + row) % L, T - row)  # shorter blocks are first or last, and have steps of their own
        count = (T - row) // L if length == L else 1
        place = slice(row, row + count * length)
        lefts, rights = (side[:, place].reshape(B * count, length) for side in (left, right))
        first = lefts.amin(1) // L
        pieces = rights.amax(1) // L + 1 - first
        # by width, and those last in which a document begins, since they have more masked columns
        order = (pieces * (S + 1) - lefts.amax(1) + lefts.amin(1)).argsort(descending=True, stable=True)
        widths = pieces[order].tolist()
        at = 0
        while at < len(widths):
            most = most_scores(threads) // (length * G * widths[at] * L)  # products in one step
            heads = min(Hkv, max(1, most))
            blocks = _alike(widths, at, max(1, most // heads), 7 * D * Hkv * length * G * L)
            chosen = order[at : at + blocks]
            place = chosen // count, chosen % count, first[chosen].clamp(max=total - widths[at])
            steps += [(row, length, widths[at], place, slice(h, min(h + heads, Hkv))) for h in range(0, Hkv, heads)]
            scores = blocks * Hkv * length * G * widths[at] * L
            work += -(-Hkv // heads) * STEP_WORK + 7 * D * scores * (1 + ROW_WORK / (length * G))
            at += blocks
        row += count * length
    return work, L, steps


def _alike(widths, at, most, piece_work):
    """How many blocks from `at` share a step: at most so many, and padding costs less than a step of their own."""
    waste, end = 0, min(len(widths), at + most)
    for i in range(at, end):
        waste += (widths[at] - widths[i]) * piece_work
        if waste > STEP_WORK:
            return i - at
    return end - at
