"""How the banded backend cuts its work: regions of row blocks of one shape, and steps that take a few blocks at a time.

Six queries, L=2, window=3:

    keys      0 1 2 3 4 5
    block 0   1               the first region: a row block whose key slice is cut short
              1 1
    block 1   1 1 1           the second: blocks with a full key slice, each L keys further on
                1 1 1
    block 2       1 1 1
                    1 1 1

A step is a batch of products: some blocks of one region, in some sequences and KV heads, so many that their scores stay
in a core's caches.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch

from .rope import rotate_pairs_back

BLOCK_LENGTHS = (16, 32, 64, 128)  # L: short blocks compute few masked scores, long ones need fewer and larger products
STEP_SCORES_PER_THREAD = 512 * 1024  # scores of one step: 2 MB in fp32; smaller steps cost calls, larger ones caches
# What a cut is weighed by, in multiply-adds: measured on two cores of an AMD EPYC (Zen 4)
STEP_WORK = 2**23  # the calls of one step, forward and backward
ROW_WORK = 9  # what a score costs besides its products, over the rows of its block: adding its keys' gradients


class Region(NamedTuple):
    """Row blocks of one shape, in all sequences and KV heads: each a product of (L * G) query rows with N keys."""

    blocks: int
    first_row: int
    rows: int  # L
    first_key: int  # of the first block; the next ones are L further on each
    keys: int  # N
    left: int  # columns from the left that some row of the block does not see

    def scores(self, B, Hkv, G):
        return B * Hkv * self.blocks * self.rows * G * self.keys


class Step(NamedTuple):
    """The blocks first .. first + blocks - 1 of a region, of some sequences and KV heads: one batch of products."""

    region: Region
    batch: slice
    heads: slice
    first: int
    blocks: int

    def rows(self, x, G):
        """The step's part of x (B, Hkv * G, T, D), as a view (b, h, n, L, G, D)."""
        L, (b, h, t, d) = self.region.rows, x.stride()
        offset = self.batch.start * b + self.heads.start * G * h + (self.region.first_row + self.first * L) * t
        size = (*self.pairs, self.blocks, L, G, x.shape[3])
        return x.as_strided(size, (b, G * h, L * t, t, h, d), x.storage_offset() + offset)

    def read(self, x, G, out):
        """The same, copied into out (b * h * n, L * G, D)."""
        x = self.rows(x, G)
        out.view(x.shape).copy_(x)
        return out

    def write(self, x, G, values, rotation=None):
        """values (b * h * n, L * G, D) to the step's rows of x; rotated back if they are rotated."""
        x = self.rows(x, G)
        values = values.view(x.shape)
        x.copy_(values) if rotation is None else rotate_pairs_back(values, rotation, x)

    def numbers(self, x, G):
        """The same of one number a row: x (B, Hkv * G, T) as (b * h * n, L * G, 1)."""
        return self.rows(x[..., None], G).reshape(-1, self.region.rows * G, 1)

    def keys(self, x):
        """The step's key slices of x (B, Hkv, S, D), (b * h * n, N, D): overlapping views where b * h is 1."""
        return self.pieces(x, 0, self.region.keys).flatten(0, 2)

    def pieces(self, x, first, width):
        """Keys first .. first + width - 1 of each block, as a view (b, h, n, width, D)."""
        L, (b, h, s, d) = self.region.rows, x.stride()
        offset = self.batch.start * b + self.heads.start * h + (self.region.first_key + self.first * L + first) * s
        size = (*self.pairs, self.blocks, width, x.shape[3])
        return x.as_strided(size, (b, h, L * s, s, d), x.storage_offset() + offset)

    def copy_keys(self, x, out):
        """The step's key slices, into out (b * h * n, N, D)."""
        slices = self.pieces(x, 0, self.region.keys)
        out.view(slices.shape).copy_(slices)
        return out

    def add_to_keys(self, x, summands):
        """x (B, Hkv, S, D) += summands (b * h * n, N, D), each at its block's keys."""
        L, (b, h, t, d) = self.region.rows, x.stride()
        # the key slices of blocks overlap, but their first L keys do not, nor do the next L
        width = L if self.blocks > 1 else self.region.keys
        pieces = self.region.keys // width
        offset = self.batch.start * b + self.heads.start * h + (self.region.first_key + self.first * L) * t
        size = (pieces, *self.pairs, self.blocks, width, x.shape[3])
        targets = x.as_strided(size, (width * t, b, h, L * t, t, d), x.storage_offset() + offset)
        summands = summands.view(*self.pairs, self.blocks, pieces, width, -1)
        for target, summand in zip(targets.unbind(0), summands.unbind(3), strict=True):
            target.add_(summand)

    def rotation(self, rotation, offset):
        """The rotation (S, R / 2) of the step's rows, (n, L, 1, R / 2); offset: the position of row 0."""
        first = offset + self.region.first_row + self.first * self.region.rows
        part = rotation[first : first + self.blocks * self.region.rows]
        return part.view(self.blocks, self.region.rows, 1, -1)

    def mask(self, scores, G):
        """Adds -inf to the scores (b * h * n, L * G, N) of keys that a row does not see."""
        region = self.region
        corners = scores.view(-1, region.rows, G, region.keys)
        left, right = _triangles(region.rows, region.left, scores.dtype, scores.device)
        if region.left:
            corners[..., : region.left].add_(left)
        if region.rows > 1:
            corners[..., region.keys - region.rows + 1 :].add_(right)

    @property
    def length(self):
        return self.region.rows

    @property
    def width(self):
        return self.region.keys

    @property
    def pairs(self):
        """(sequences, KV heads)"""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start

    @property
    def products(self):
        sequences, heads = self.pairs
        return sequences * heads * self.blocks


@lru_cache(maxsize=32)
def _triangles(rows, left, dtype, device):
    """What is added to the first `left` columns and the last rows - 1 columns of a block's scores: 0 or -inf.

    Row r of the block no longer sees the first left - (rows - 1) + r columns, and does not yet see the last
    rows - 1 - r. Shapes (rows, 1, columns): the heads of a position are neighbours.
    """
    row = torch.arange(rows, device=device)[:, None, None]
    gone = torch.arange(left, device=device) < left - (rows - 1) + row
    ahead = torch.arange(rows - 1, device=device) >= row
    return tuple(torch.zeros(x.shape, dtype=dtype, device=device).masked_fill_(x, float("-inf")) for x in (gone, ahead))


@lru_cache(maxsize=256)
def regions(B, Hkv, G, T, S, window, D):
    """The cheapest way to cut T queries of S keys into regions, by a small model: scores, and calls."""
    lengths = sorted({min(T, n) for n in BLOCK_LENGTHS})
    if window is None:
        cuts = [_regions(T, S, S, L, L) for L in lengths]
    else:
        parts = [(L, -(-window // (L * n)) * L) for L in lengths for n in (1, 2, 4)]
        cuts = [_regions(T, S, window, L, early_block) for L, early_block in parts]
    return min(cuts, key=lambda cut: _work(cut, B, Hkv, G, D))


def _regions(T, S, window, L, early_block):
    """Blocks of L rows, and of early_block those before the first full key slice, which are few and see less."""
    full = -(-(L + window - 1) // L) * L  # keys of a full slice, in pieces of L
    early = min(T, max(0, full - L - (S - T)))
    cut, row = [], 0
    while row < T:
        whole = row >= early and T - row >= L
        rows = L if whole else min(early_block, early - row) if row < early else T - row
        last = S - T + row + rows  # one past the newest key of the block
        first = last - full if whole else max(0, last - rows - window + 1)
        blocks = (T - row) // L if whole else 1
        cut.append(Region(blocks, row, rows, first, last - first, max(0, last - window - first)))
        row += blocks * rows
    return cut


def _work(cut, B, Hkv, G, D):
    """Multiply-adds of all products forward and backward, with all else counted as such."""
    return sum(STEP_WORK + 7 * D * r.scores(B, Hkv, G) * (1 + ROW_WORK / (r.rows * G)) for r in cut)


@lru_cache(maxsize=256)
def plan(B, Hkv, G, T, S, window, D, threads):
    """The steps of one call: every query row is in exactly one, with every key that it sees."""
    steps = []
    for region in regions(B, Hkv, G, T, S, window, D) if B and T else ():
        blocks = region.blocks
        most = max(1, most_scores(threads) // (region.rows * G * region.keys))  # products in one step
        batch, heads, n = _share(B, most // (Hkv * blocks)), _share(Hkv, most // blocks), _share(blocks, most)
        if n < blocks:  # as many for each thread, and steps of one length
            n = -(-n // threads) * threads
        for b, h, first in product(range(0, B, batch), range(0, Hkv, heads), range(0, blocks, n)):
            some = slice(b, min(B, b + batch)), slice(h, min(Hkv, h + heads))
            steps.append(Step(region, *some, first, min(n, blocks - first)))
    return steps


def most_scores(threads):
    """The scores of one step."""
    return STEP_SCORES_PER_THREAD * threads


def _share(total, most):
    """The size of the parts of `total` that are at most so large, and all about one size."""
    return -(-total // -(-total // max(1, min(total, most))))


def steps_of(q, k, window, threads):
    """`plan` for q (B, Hq, T, D) and k (B, Hkv, S, D)."""
    # numbers, which a plan is remembered for; in a fake implementation sizes may be symbols
    (B, Hq, T, D), (Hkv, S) = map(int, q.shape), map(int, k.shape[1:3])
    return plan(B, Hkv, Hq // Hkv, T, S, None if window is None or window >= S else int(window), D, threads)
