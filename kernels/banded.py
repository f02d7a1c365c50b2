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
from typing import NamedTuple

import torch

from .rope import turn

STEP_SCORES_PER_THREAD = 128 * 1024  # fp32 scores of one step: half a megabyte, which a core's L2 cache holds
DENSE_BLOCK = 128  # rows of a block where no window bounds the keys


class Step(NamedTuple):
    """A batch of products of (G * L) query rows with (N) keys.

    Either one row block of whole sequences `batch` (head = None), or `blocks` row blocks of one sequence and KV head.
    """

    batch: slice
    head: int | None
    blocks: int
    first_row: int
    rows: int  # L
    first_key: int
    keys: int  # N
    left: int  # columns from the left, and from the right, that some row of the block does not see
    right: int

    def queries(self, x):
        """The step's part of x (B, Hkv, G, T, ...): a view (..., G, L, ...) whose leading dimensions are its batch."""
        if self.head is None:
            return x[self.batch, :, :, self.first_row : self.first_row + self.rows]
        x = x[self.batch.start, self.head, :, self.first_row : self.first_row + self.blocks * self.rows]
        return x.unflatten(1, (self.blocks, self.rows)).transpose(0, 1)

    def stretches(self, x):
        """The step's keys of x (B, Hkv, S, D), as a view (n, N, D); those of several blocks overlap."""
        if self.head is None:
            return x[self.batch, :, self.first_key : self.first_key + self.keys].flatten(0, 1)
        row = x.stride(2)
        x = x[self.batch.start, self.head, self.first_key :]
        return x.as_strided((self.blocks, self.keys, x.shape[-1]), (self.rows * row, row, 1))

    def add_to_stretches(self, x, parts):
        """x (B, Hkv, S, D) += parts (n, N, D), each at its block's keys; overlaps add up."""
        if self.head is None:
            x[self.batch, :, self.first_key : self.first_key + self.keys] += parts.view(
                -1, x.shape[1], *parts.shape[1:]
            )
            return
        L = self.rows
        x = x[self.batch.start, self.head, self.first_key :]
        for first in range(0, self.keys, L):  # blocks lie L keys apart: pieces of L never overlap each other
            piece = parts[:, first : first + L]
            x[first : first + (self.blocks - 1) * L + piece.shape[1]].unfold(0, piece.shape[1], L).mT.add_(piece)


@lru_cache(maxsize=256)
def plan(B, Hkv, G, T, S, window, threads):
    """The steps of one call, every query row in exactly one."""
    L = block_length(T, G, window)
    full = S if window is None else L + window - 1  # keys of a whole stretch
    most = max(1, STEP_SCORES_PER_THREAD * threads // max(1, G * L * min(full, S)))  # products in one step
    by_head = window is not None and B * Hkv < min(most, 2 * threads)
    steps, row = [], 0
    while row < T:
        rows = min(L, T - row)
        last = S - T + row + rows  # one past the newest key of the block
        first = 0 if window is None else max(0, S - T + row - window + 1)
        left = 0 if window is None else max(0, S - T + row + rows - window - first)
        whole = (T - row) // L if by_head and last - first == full and rows == L else 0
        shape = (row, rows, first, last - first, left, rows - 1)
        if whole:
            for b in range(B):
                for h in range(Hkv):
                    for i in range(0, whole, most):
                        blocks = min(most, whole - i)
                        steps.append(Step(slice(b, b + 1), h, blocks, row + i * L, L, first + i * L, *shape[3:]))
            row += whole * L
        else:
            batches = max(1, most // Hkv)
            for b in range(0, B, batches):
                steps.append(Step(slice(b, min(B, b + batches)), None, 1, *shape))
            row += rows
    return steps


def block_length(T, G, window):
    """L. Short blocks compute few keys in vain (L of L + window), long ones make efficient products."""
    if window is None:
        return min(T, DENSE_BLOCK)
    return max(1, min(T, 32 if G > 1 else 64))


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
    """What forward and backward share: the steps, the rotated keys, and one step's rows and probabilities."""

    def __init__(self, q, k, v, window, scale, softcap, sinks, rope):
        self.B, Hq, self.T, self.D = q.shape
        self.Hkv, self.S = k.shape[1], k.shape[2]
        self.G = Hq // self.Hkv
        if window is not None and window >= self.S:
            window = None
        self.window, self.scale, self.softcap = window, scale, softcap
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.steps = plan(self.B, self.Hkv, self.G, self.T, self.S, window, torch.get_num_threads())
        self.scratch = _Scratch(self.dtype, q.device)
        self.q, self.v = self.grouped(q), v.to(self.dtype)
        if self.B > 1:  # sequences and heads of a (B, T, H, D) tensor are no single batch dimension of a product
            self.v = self.v.contiguous()
        self.sinks = None if sinks is None else sinks.to(self.dtype).view(self.Hkv, self.G, 1)
        self.q_rope = self.k_rope = None
        if rope is not None:
            cos, sin = (table.to(self.dtype) for table in rope)
            self.q_rope = cos[self.S - self.T : self.S], sin[self.S - self.T : self.S]
            self.k_rope = cos[: self.S], sin[: self.S]
            self.k = turn(k.to(self.dtype), *self.k_rope, torch.empty(k.shape, dtype=self.dtype, device=k.device))
        else:
            self.k = k.to(self.dtype)
            if self.B > 1:
                self.k = self.k.contiguous()

    def grouped(self, x):
        """(B, Hq, ...) viewed as (B, Hkv, G, ...)."""
        return x.unflatten(1, (self.Hkv, self.G))

    def tables(self, step):
        """cos and sin of the step's query rows, broadcastable against its (..., G, L, R / 2)."""
        part = slice(step.first_row, step.first_row + step.blocks * step.rows)
        return tuple(table[part].view(step.blocks, 1, step.rows, -1) for table in self.q_rope)

    def packed(self, name, x):
        """A step's view (..., G, L, D), copied into (n, G * L, D) scratch of the wide dtype."""
        G, L, D = x.shape[-3:]
        out = self.scratch(name, x.numel() // (G * L * D), G * L, D)
        out.view(x.shape).copy_(x)
        return out

    def rows(self, step):
        """The step's query rows, rotated and scaled: (n, G * L, D)."""
        x = step.queries(self.q)
        if self.q_rope is None:
            return self.packed("q", x).mul_(self.scale)
        out = self.scratch("q", x.numel() // (self.G * step.rows * self.D), self.G * step.rows, self.D)
        turn(x.to(self.dtype), *self.tables(step), out.view(x.shape))
        return out.mul_(self.scale)

    def scores(self, step, q):
        """Masked scores (n, G * L, N) of packed rows q; with a softcap, also its derivative."""
        s = torch.bmm(q, step.stretches(self.k).mT, out=self.scratch("s", q.shape[0], q.shape[1], step.keys))
        slope = None
        if self.softcap is not None:
            s.div_(self.softcap).tanh_()
            slope = torch.mul(s, s, out=self.scratch("slope", *s.shape)).neg_().add_(1.0)
            s.mul_(self.softcap)
        corners = s.unflatten(1, (self.G, step.rows))
        left, right = _triangles(step.rows, step.left, self.dtype, s.device)
        if step.left:
            corners[..., : step.left].add_(left)
        if step.right:
            corners[..., step.keys - step.right :].add_(right)
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


def attention_forward(q, k, v, window=None, *, scale, softcap=None, sinks=None, rope=None):
    """(out, lse) of `sliding_gqa_attention`: out in q's dtype and layout, lse (B, Hq, T) fp32 (fp64 for fp64)."""
    band = _Band(q, k, v, window, scale, softcap, sinks, rope)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=band.dtype, device=q.device)
    grouped_out, grouped_lse = band.grouped(out), band.grouped(lse)
    for step in band.steps:
        rows = band.rows(step)
        s, _ = band.scores(step, rows)
        # lse from the largest score and its probability: no second pass of exponentials
        largest = s.amax(-1)
        torch.softmax(s, dim=-1, out=s)
        step_lse = largest - s.amax(-1).log_()
        o = torch.bmm(s, step.stretches(band.v), out=band.scratch("o", *rows.shape))
        target = step.queries(grouped_out)
        target_lse = step.queries(grouped_lse)
        target.copy_(o.view(target.shape))
        target_lse.copy_(step_lse.view(target_lse.shape))
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
    band = _Band(q, k, v, window, scale, softcap, sinks, rope)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=band.dtype) for x in (k, v))
    grouped_dq, grouped_do, grouped_lse = band.grouped(dq), band.grouped(grad_out), band.grouped(lse)
    for step in band.steps:
        rows = band.rows(step)
        do = band.packed("do", step.queries(grouped_do))
        p, slope = band.scores(step, rows)
        if sinks is None:
            torch.softmax(p, dim=-1, out=p)
        else:
            p.sub_(step.queries(grouped_lse).reshape(*p.shape[:2], 1)).exp_()
        keys, values = step.stretches(band.k), step.stretches(band.v)
        step.add_to_stretches(dv, torch.bmm(p.mT, do, out=band.scratch("dk", *keys.shape)))
        ds = torch.bmm(do, values.mT, out=band.scratch("ds", *p.shape))
        # p * (dp - sum(p * dp)) in one pass; the sum is do . o
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
        if grad_lse is not None:
            ds.addcmul_(p, step.queries(band.grouped(grad_lse)).reshape(*p.shape[:2], 1))
        if slope is not None:
            ds.mul_(slope)
        step.add_to_stretches(dk, torch.bmm(ds.mT, rows, out=band.scratch("dk", *keys.shape)))
        step_dq = torch.bmm(ds, keys, out=band.scratch("o", *rows.shape)).mul_(scale)
        target = step.queries(grouped_dq)
        step_dq = step_dq.view(target.shape)
        if rope is not None:
            cos, sin = band.tables(step)
            step_dq = turn(step_dq, cos, -sin, band.scratch("turned", *target.shape))
        target.copy_(step_dq)
    if rope is not None:
        cos, sin = band.k_rope
        dk = turn(dk, cos, -sin, torch.empty_like(dk))
    dsinks = None
    if sinks is not None:
        # the sink's probability times its ds, whose do . v is zero
        delta = (grad_out * out).sum(-1, dtype=lse.dtype)
        ds = (sinks.to(lse.dtype)[:, None] - lse).exp_() * (-delta if grad_lse is None else grad_lse - delta)
        dsinks = ds.sum((0, 2)).to(sinks.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks
