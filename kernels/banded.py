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
product. The scores of one step, a batch of blocks, fit a core's cache, which is where the speed comes from.

The backward pass needs the probabilities again. Where the window is short beside the head size, they take little
memory, linear in T, and the forward pass keeps them, and the stacked queries: that saves one of seven products, a
softmax and a rotation. Otherwise they are computed again, as FlashAttention does (arXiv:2307.08691), and the scores of
one step are all that ever exists.

Inside, rotated queries and keys have the two elements of a pair side by side, where one complex product turns them.
That changes no score, and it is two to six times as fast as turning halves.

How the rows are cut into blocks is in banded_plan.py; sequences of a few dozen tokens are left to banded_short.py.
"""

from functools import lru_cache

import torch

from .banded_plan import steps_of
from .banded_rope import rotation_of, turn_pairs, turn_pairs_back
from .banded_short import is_short, short_backward, short_forward

KEPT_KEYS = 8  # what is kept for the backward pass takes at most about 8 times the memory of q


def keeps(q, k, window):
    """Whether the forward pass is to keep the probabilities, and what goes with them, for the backward pass."""
    longest = max((step.region.keys for step in steps_of(q, k, window, 1)), default=0)
    return longest <= KEPT_KEYS * q.shape[3]


def kept_shapes(q, k, window, rope, threads):
    """The shapes of what it keeps: probabilities and stacked queries of each step, then the rotated keys."""
    D, G = q.shape[3], q.shape[1] // k.shape[1]
    if is_short(q, k):
        return [q.shape[:3], *([q.shape, k.shape] if rope is not None else [])]
    stacks = [(s.products, s.region.rows * G, s.region.keys) for s in steps_of(q, k, window, threads)]
    shapes = [shape for n, rows, keys in stacks for shape in ((n, rows, keys), (n, rows, D))]
    return shapes + ([k.shape] if rope is not None and shapes else [])


class _Scratch:
    """Buffers that all steps of a call share: fresh ones would be mapped and cleared by the system at every step."""

    def __init__(self, dtype, device):
        self.buffers, self.dtype, self.device = {}, dtype, device

    def __call__(self, name, *shape):
        size = 1
        for n in shape:
            size *= n
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return buffer[:size].view(shape)


class _Band:
    """What forward and backward share: the steps, the rotated keys, and one step's rows and scores."""

    def __init__(self, q, k, v, window, scale, softcap, rope, threads, rotated_k=None):
        self.T, self.S, self.D, self.G = q.shape[2], k.shape[2], q.shape[3], q.shape[1] // k.shape[1]
        self.scale, self.softcap, self.rotation = scale, softcap, None
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.steps = steps_of(q, k, window, threads or torch.get_num_threads())
        self.scratch = _Scratch(self.dtype, q.device)
        self.k, self.v = k.to(self.dtype), v.to(self.dtype)
        if rope is not None:
            self.rotation = rotation_of(rope, self.S, self.dtype)
            if rotated_k is None:
                rotated_k = turn_pairs(self.k, self.rotation, torch.empty(k.shape, dtype=self.dtype, device=k.device))
            self.k = rotated_k

    def step_rotation(self, step):
        """The rotation of the step's query rows, to go with its (b, h, n, L, G, R / 2)."""
        first = self.S - self.T + step.region.first_row + step.first * step.region.rows
        part = self.rotation[first : first + step.blocks * step.region.rows]
        return part.view(step.blocks, step.region.rows, 1, -1)

    def rows(self, step, x, out):
        """The step's rows of x (B, Hq, T, D), stacked, into `out` (b * h * n, L * G, D) of the wide dtype."""
        x = step.rows(x, self.G)
        out.view(x.shape).copy_(x)
        return out

    def queries(self, step, q, out):
        """The same, rotated."""
        if self.rotation is None:
            return self.rows(step, q, out)
        q = step.rows(q, self.G)
        turn_pairs(q.to(self.dtype), self.step_rotation(step), out.view(q.shape))
        return out

    def row_buffer(self, name, step):
        return self.scratch(name, step.products, step.region.rows * self.G, self.D)

    def product(self, name, a, b, scale=1.0):
        """scale * a b in scratch, batched; the scale rides on the product."""
        out = self.scratch(name, a.shape[0], a.shape[1], b.shape[2])
        return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)

    def scores(self, step, q, out):
        """Masked scores (b * h * n, L * G, N) of stacked rows q, in `out`; with a softcap, also their derivative."""
        region, slope = step.region, None
        s = torch.baddbmm(out, q, step.stretches(self.k).mT, beta=0, alpha=self.scale, out=out)
        if self.softcap is not None:
            s.div_(self.softcap).tanh_()
            slope = torch.mul(s, s, out=self.scratch("slope", *s.shape)).neg_().add_(1.0)
            s.mul_(self.softcap)
        corners = s.view(-1, region.rows, self.G, region.keys)
        left, right = _triangles(region.rows, region.left, self.dtype, s.device)
        if region.left:
            corners[..., : region.left].add_(left)
        if region.rows > 1:
            corners[..., region.keys - region.rows + 1 :].add_(right)
        return s, slope

    def score_buffer(self, step):
        return self.scratch("s", step.products, step.region.rows * self.G, step.region.keys)


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


def attention_forward(q, k, v, window=None, *, scale, softcap=None, sinks=None, rope=None, with_lse=True, threads=0):
    """(out, lse, kept) of `sliding_gqa_attention`: out in q's dtype and layout, lse (B, Hq, T) fp32.

    Sums and lse are fp64 for fp64 inputs. Without with_lse, which sinks need, lse has no elements: the backward pass
    does without. threads: for how many the work is cut, if what `kept_shapes` lists is to be kept; 0 if nothing is.
    """
    if softcap is None and sinks is None and is_short(q, k):
        return short_forward(q, k, v, window, scale, rope, with_lse, threads)
    band = _Band(q, k, v, window, scale, softcap, rope, threads)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3] if with_lse else 0, dtype=band.dtype, device=q.device)
    kept = []
    for step in band.steps:
        s, rows = band.score_buffer(step), band.row_buffer("q", step)
        if threads:
            # tensors a step, not one for all: the system would map and clear a large one anew at every call
            s, rows = torch.empty_like(s), torch.empty_like(rows)
            kept += [s, rows]
        band.scores(step, band.queries(step, q, rows), s)
        if with_lse:
            largest = s.amax(-1)
        torch.softmax(s, dim=-1, out=s)
        target = step.rows(out, band.G)
        target.copy_(band.product("o", s, step.stretches(band.v)).view(target.shape))
        if with_lse:  # from the largest score and its probability: no second pass of exponentials
            target = step.rows(lse[..., None], band.G)
            target.copy_(largest.sub_(s.amax(-1).log_()).view(target.shape))
    if sinks is not None:
        with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out.mul_((lse - with_sinks).exp_()[..., None])
        lse = with_sinks
    if threads and band.steps and rope is not None:
        kept.append(band.k)
    return out, lse, kept


def attention_backward(
    grad_out, grad_lse, q, k, v, out, lse, window=None, *, scale, softcap=None, sinks=None, rope=None,
    kept=(), threads=0,
):  # fmt: skip
    """(dq, dk, dv, dsinks) for the gradients of both results; grad_lse may be None, dsinks is None without sinks.
    kept, threads: those of the forward pass, if it kept anything.

    ds_ij = p_ij (do_i . v_j - do_i . o_i + dlse_i);  dq = scale ds k,  dk = scale ds^T q,  dv = p^T do
    """
    if kept and is_short(q, k):
        if grad_lse is None:
            return *short_backward(grad_out, q, k, v, out, kept, window, scale, rope), None
        kept = ()
    band = _Band(q, k, v, window, scale, softcap, rope, threads, kept[-1] if kept else None)
    G, dq = band.G, torch.empty_like(q)
    dk, dv = (torch.zeros_like(x) for x in (band.k, band.v))
    for index, step in enumerate(band.steps):
        do = band.rows(step, grad_out, band.row_buffer("do", step))
        slope = None
        if kept:
            p, rows = kept[2 * index : 2 * index + 2]
        else:
            rows = band.queries(step, q, band.row_buffer("q", step))
            p, slope = band.scores(step, rows, band.score_buffer(step))
            if sinks is None:
                torch.softmax(p, dim=-1, out=p)
            else:
                p.sub_(step.numbers(lse, G)).exp_()
        step.add_to_stretches(dv, band.product("sums", p.mT, do))
        ds = band.product("ds", do, step.stretches(band.v).mT)
        # p * (dp - sum(p * dp)) in one pass; the sum is do . o
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
        if grad_lse is not None:
            ds.addcmul_(p, step.numbers(grad_lse, G))
        if slope is not None:
            ds.mul_(slope)
        step.add_to_stretches(dk, band.product("sums", ds.mT, rows, scale))
        target = step.rows(dq, G)
        step_dq = band.product("o", ds, step.stretches(band.k), scale).view(target.shape)
        if rope is None:
            target.copy_(step_dq)
        else:
            turn_pairs_back(step_dq, band.step_rotation(step), target)
    if rope is not None:
        dk = turn_pairs_back(dk, band.rotation, torch.empty_like(k))
    dsinks = None
    if sinks is not None:
        # the sink's probability times its ds, whose do . v is zero
        delta = (grad_out * out).sum(-1, dtype=lse.dtype)
        ds = (sinks.to(lse.dtype)[:, None] - lse).exp_() * (-delta if grad_lse is None else grad_lse - delta)
        dsinks = ds.sum((0, 2)).to(sinks.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks
