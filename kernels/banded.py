"""Sliding-window attention in PyTorch with a cost linear in the length: the backend for machines without Triton.

The queries are cut into blocks of L positions, and the query heads of one KV head are stacked into the rows of a block.
Each block meets the one stretch of keys that it sees in two dense products with a softmax between. L=2, window=3:

    keys      0 1 2 3 4 5
    block 0   1
              1 1                 Only the corners of a stretch are masked, by one small triangle each that is
    block 1   1 1 1               the same for every block; a stretch that would begin before the first key is
                1 1 1             cut short.
    block 2       1 1 1
                    1 1 1

Full stretches lie L keys apart, so those of many blocks are one overlapping view of the keys: no copy, and one batched
product. The backward pass computes the probabilities again, as FlashAttention does (arXiv:2307.08691): of the T x S
matrix, the scores of one step are all that ever exists. They fit a core's cache, which is where the speed comes from.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch

from .rope import turn

STEP_SCORES_PER_THREAD = 256 * 1024  # fp32 scores of one step: 1 MB, a core's L2 cache; smaller steps cost calls
WINDOW_BLOCK = 32  # query positions of a block
DENSE_BLOCK = 128  # the same where no window bounds the keys


class Step(NamedTuple):
    """A batch of products of (G * L) query rows with (N) keys: `blocks` row blocks of some sequences and KV heads."""

    batch: slice
    heads: slice
    blocks: int
    first_row: int
    rows: int  # L
    first_key: int  # of the first block; the next ones are L further on each
    keys: int  # N
    left: int  # columns from the left that some row of the block does not see

    def queries(self, x):
        """The step's part of x (B, Hkv, G, T, ...), as a view (b, h, blocks, G, L, ...)."""
        x = x[self.batch, self.heads, :, self.first_row : self.first_row + self.blocks * self.rows]
        return x.unflatten(3, (self.blocks, self.rows)).transpose(2, 3)

    def stretches(self, x):
        """The step's keys of x (B, Hkv, S, D), (b * h * blocks, N, D): overlapping views where b * h is 1."""
        x = x[self.batch, self.heads, self.first_key : self.first_key + (self.blocks - 1) * self.rows + self.keys]
        return x.unfold(2, self.keys, self.rows).mT.flatten(0, 2)

    def add_to_stretches(self, x, summands):
        """x (B, Hkv, S, D) += summands (n, N, D), each at its block's keys."""
        x, L, n = x[self.batch, self.heads], self.rows, self.blocks
        summands = summands.view(*x.shape[:2], n, self.keys, -1)
        # stretches overlap, but their first L keys do not, nor do the next L
        width = L if n > 1 else self.keys
        for piece in range(0, self.keys, width):
            first = self.first_key + piece
            x[:, :, first : first + n * width].unflatten(2, (n, width)).add_(summands[:, :, :, piece : piece + width])


@lru_cache(maxsize=256)
def plan(B, Hkv, G, T, S, window, threads):
    """The steps of one call: every query row is in exactly one, with every key that it sees."""
    L = block_length(T, window)
    full = S if window is None else -(-(L + window - 1) // L) * L  # keys of a whole stretch, in pieces of L
    early = max(0, full - L - (S - T)) if window is not None else T  # rows before the first whole stretch
    # they are few: longer blocks, which compute more keys in vain, are dearer only where the sequence is short
    early_block = L if window is None else -(-max(L, window // 2) // L) * L
    most = max(1, STEP_SCORES_PER_THREAD * threads // max(1, G * L * min(full, S)))  # products in one step
    steps, row = [], 0
    while row < T:
        whole = row >= early and T - row >= L
        rows = L if whole else min(early_block, T - row, early - row if row < early else L)
        last = S - T + row + rows  # one past the newest key of the block
        first = last - full if whole else 0 if window is None else max(0, last - rows - window + 1)
        left = 0 if window is None else max(0, last - window - first)
        blocks = (T - row) // L if whole else 1
        shape = (rows, first, last - first, left)
        if B * Hkv * blocks <= most:  # all in one
            steps.append(Step(slice(0, B), slice(0, Hkv), blocks, row, *shape))
        elif min(blocks, most) > B * Hkv:  # blocks of one head at a time
            for b, h in product(range(B), range(Hkv)):
                for i in range(0, blocks, most):
                    n, moved = min(most, blocks - i), i * L
                    shifted = (row + moved, L, first + moved, full, left)
                    steps.append(Step(slice(b, b + 1), slice(h, h + 1), n, *shifted))
        else:  # one block of as many heads as fit
            blocks, batches, heads = 1, max(1, most // Hkv), min(most, Hkv)
            for b, h in product(range(0, B, batches), range(0, Hkv, heads)):
                some = slice(b, min(B, b + batches)), slice(h, min(Hkv, h + heads))
                steps.append(Step(*some, 1, row, *shape))
        row += blocks * rows
    return steps


def block_length(T, window):
    """L. Short blocks compute few keys in vain (L of L + window), long ones need fewer and larger products."""
    return max(1, min(T, DENSE_BLOCK if window is None else WINDOW_BLOCK))


class _Scratch:
    """Buffers that all steps of a call share: fresh ones would be mapped and cleared by the system at every step."""

    def __init__(self, dtype, device):
        self.buffers, self.dtype, self.device = {}, dtype, device

    def __call__(self, name, *shape):
        size = 1
        for n in shape:
            size *= n
        if self.buffers.get(name) is None or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.buffers[name][:size].view(shape)


class _Band:
    """What forward and backward share: the steps, the rotated keys, and one step's rows and scores."""

    def __init__(self, q, k, v, window, scale, softcap, rope):
        self.B, Hq, self.T, self.D = q.shape
        self.Hkv, self.S = k.shape[1], k.shape[2]
        self.G = Hq // self.Hkv
        if window is not None and window >= self.S:
            window = None
        self.scale, self.softcap, self.rope = scale, softcap, None
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.steps = plan(self.B, self.Hkv, self.G, self.T, self.S, window, torch.get_num_threads())
        self.scratch = _Scratch(self.dtype, q.device)
        self.q, self.k, self.v = self.grouped(q), k.to(self.dtype), v.to(self.dtype)
        if rope is not None:
            self.rope = cos, sin = tuple(table[: self.S].to(self.dtype) for table in rope)
            self.k = turn(self.k, cos, sin, torch.empty(k.shape, dtype=self.dtype, device=k.device))
        if self.B > 1:  # sequences and heads of a (B, T, H, D) tensor are no single batch dimension of a product
            self.k, self.v = self.k.contiguous(), self.v.contiguous()

    def grouped(self, x):
        """(B, Hq, ...) viewed as (B, Hkv, G, ...)."""
        return x.unflatten(1, (self.Hkv, self.G))

    def tables(self, step):
        """cos and sin of the step's query rows, to go with its (b, h, blocks, G, L, R / 2)."""
        first = self.S - self.T + step.first_row
        part = slice(first, first + step.blocks * step.rows)
        return tuple(table[part].view(step.blocks, 1, step.rows, -1) for table in self.rope)

    def rows(self, name, step, x, rotated=False):
        """The step's rows of x (B, Hkv, G, T, D), stacked: (n, G * L, D) scratch of the wide dtype."""
        x = step.queries(x)
        out = self.scratch(name, x.shape[:3].numel(), self.G * step.rows, self.D)
        if rotated and self.rope is not None:
            turn(x.to(self.dtype), *self.tables(step), out.view(x.shape))
        else:
            out.view(x.shape).copy_(x)
        return out

    def product(self, name, a, b, scale=1.0):
        """scale * a b in scratch, batched; the scale rides on the product."""
        out = self.scratch(name, a.shape[0], a.shape[1], b.shape[2])
        return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)

    def scores(self, step, q):
        """Masked scores (n, G * L, N) of stacked rows q; with a softcap, also their derivative."""
        s, slope = self.product("s", q, step.stretches(self.k).mT, self.scale), None
        if self.softcap is not None:
            s.div_(self.softcap).tanh_()
            slope = torch.mul(s, s, out=self.scratch("slope", *s.shape)).neg_().add_(1.0)
            s.mul_(self.softcap)
        corners = s.unflatten(1, (self.G, step.rows))
        left, right = _triangles(step.rows, step.left, self.dtype, s.device)
        if step.left:
            corners[..., : step.left].add_(left)
        if step.rows > 1:
            corners[..., step.keys - step.rows + 1 :].add_(right)
        return s, slope


@lru_cache(maxsize=32)
def _triangles(rows, left, dtype, device):
    """What is added to the first `left` columns and the last rows - 1 columns of a block's scores: 0 or -inf.

    Row r of the block no longer sees the first left - (rows - 1) + r columns, and does not yet see the last
    rows - 1 - r.
    """
    row = torch.arange(rows, device=device)[:, None]
    gone = torch.arange(left, device=device) < left - (rows - 1) + row
    ahead = torch.arange(rows - 1, device=device) >= row
    return tuple(torch.zeros(x.shape, dtype=dtype, device=device).masked_fill_(x, float("-inf")) for x in (gone, ahead))


def attention_forward(q, k, v, window=None, *, scale, softcap=None, sinks=None, rope=None, with_lse=True):
    """(out, lse) of `sliding_gqa_attention`: out in q's dtype and layout, lse (B, Hq, T) fp32 (fp64 for fp64).

    Without with_lse, which sinks need, lse has no elements: the backward pass does without.
    """
    band = _Band(q, k, v, window, scale, softcap, rope)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3] if with_lse else 0, dtype=band.dtype, device=q.device)
    for step in band.steps:
        rows = band.rows("q", step, band.q, rotated=True)
        s, _ = band.scores(step, rows)
        if with_lse:
            largest = s.amax(-1)
        torch.softmax(s, dim=-1, out=s)
        target = step.queries(band.grouped(out))
        target.copy_(band.product("o", s, step.stretches(band.v)).view(target.shape))
        if with_lse:  # from the largest score and its probability: no second pass of exponentials
            target = step.queries(band.grouped(lse))
            target.copy_(largest.sub_(s.amax(-1).log_()).view(target.shape))
    if sinks is not None:
        with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out.mul_((lse - with_sinks).exp_()[..., None])
        lse = with_sinks
    return out, lse


def attention_backward(
    grad_out, grad_lse, q, k, v, out, lse, window=None, *, scale, softcap=None, sinks=None, rope=None
):
    """(dq, dk, dv, dsinks) for the gradients of both results; grad_lse may be None, dsinks is None without sinks.

    ds_ij = p_ij (do_i . v_j - do_i . o_i + dlse_i);  dq = scale ds k,  dk = scale ds^T q,  dv = p^T do
    """
    band = _Band(q, k, v, window, scale, softcap, rope)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(k.shape, dtype=band.dtype, device=k.device) for _ in range(2))
    for step in band.steps:
        rows = band.rows("q", step, band.q, rotated=True)
        do = band.rows("do", step, band.grouped(grad_out))
        p, slope = band.scores(step, rows)
        if sinks is None:
            torch.softmax(p, dim=-1, out=p)
        else:
            p.sub_(step.queries(band.grouped(lse)).reshape(*p.shape[:2], 1)).exp_()
        step.add_to_stretches(dv, band.product("sums", p.mT, do))
        ds = band.product("ds", do, step.stretches(band.v).mT)
        # p * (dp - sum(p * dp)) in one pass; the sum is do . o
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
        if grad_lse is not None:
            ds.addcmul_(p, step.queries(band.grouped(grad_lse)).reshape(*p.shape[:2], 1))
        if slope is not None:
            ds.mul_(slope)
        step.add_to_stretches(dk, band.product("sums", ds.mT, rows, scale))
        target = step.queries(band.grouped(dq))
        step_dq = band.product("o", ds, step.stretches(band.k), scale).view(target.shape)
        if rope is not None:
            cos, sin = band.tables(step)
            step_dq = turn(step_dq, cos, -sin, band.scratch("turned", *target.shape))
        target.copy_(step_dq)
    if rope is not None:
        cos, sin = band.rope
        dk = turn(dk, cos, -sin, torch.empty_like(k, dtype=band.dtype))
    dsinks = None
    if sinks is not None:
        # the sink's probability times its ds, whose do . v is zero
        delta = (grad_out * out).sum(-1, dtype=lse.dtype)
        ds = (sinks.to(lse.dtype)[:, None] - lse).exp_() * (-delta if grad_lse is None else grad_lse - delta)
        dsinks = ds.sum((0, 2)).to(sinks.dtype)
    return dq, torch.empty_like(k).copy_(dk), torch.empty_like(v).copy_(dv), dsinks
