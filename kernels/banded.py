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

Of a few dozen tokens the calls cost more than the products: PyTorch's own CPU kernel, which is one call, takes these,
with the band as its mask.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch

from .rope import turn

STEP_SCORES_PER_THREAD = 256 * 1024  # fp32 scores of one step: 1 MB, a core's L2 cache; smaller steps cost calls
SHORT = 64  # tokens up to which PyTorch's own attention is faster
BLOCK_LENGTHS = (16, 32, 64, 128)  # L
KEPT_KEYS = 8  # probabilities are kept for at most so many keys for each element of a head: 8 times the memory of q
# What `plan` weighs, in multiply-adds: measured on two cores of an AMD EPYC (Zen 4)
STEP_WORK = 2**23  # the calls of one step, forward and backward, a thread
ROW_WORK = 9  # what a score costs beside its products, in the rows of its block: adding its gradients, softmax, copies


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

    def numbers(self, x, G):
        """The same of one number a row: x (B, Hkv * G, T) as (b * h * n, L * G, 1)."""
        return self.rows(x[..., None], G).reshape(-1, self.region.rows * G, 1)

    def stretches(self, x):
        """The step's keys of x (B, Hkv, S, D), (b * h * n, N, D): overlapping views where b * h is 1."""
        return self.pieces(x, 0, self.region.keys).flatten(0, 2)

    def pieces(self, x, first, width):
        """Keys first .. first + width - 1 of each stretch, as a view (b, h, n, width, D)."""
        L, (b, h, s, d) = self.region.rows, x.stride()
        offset = self.batch.start * b + self.heads.start * h + (self.region.first_key + self.first * L + first) * s
        size = (*self.pairs, self.blocks, width, x.shape[3])
        return x.as_strided(size, (b, h, L * s, s, d), x.storage_offset() + offset)

    def add_to_stretches(self, x, summands):
        """x (B, Hkv, S, D) += summands (b * h * n, N, D), each at its block's keys."""
        keys = self.region.keys
        summands = summands.view(*self.pairs, self.blocks, keys, -1)
        # stretches overlap, but their first L keys do not, nor do the next L
        width = self.region.rows if self.blocks > 1 else keys
        for first in range(0, keys, width):
            self.pieces(x, first, width).add_(summands[:, :, :, first : first + width])

    @property
    def pairs(self):
        """(sequences, KV heads)"""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start

    @property
    def products(self):
        sequences, heads = self.pairs
        return sequences * heads * self.blocks


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
    """Blocks of L rows, and of early_block those before the first whole stretch, which are few and see less."""
    full = -(-(L + window - 1) // L) * L  # keys of a whole stretch, in pieces of L
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
        most = max(1, STEP_SCORES_PER_THREAD * threads // (region.rows * G * region.keys))  # products in one step
        batch, heads, n = _share(B, most // (Hkv * blocks)), _share(Hkv, most // blocks), _share(blocks, most)
        if n < blocks:  # as many for each thread, and steps of one length
            n = -(-n // threads) * threads
        for b, h, first in product(range(0, B, batch), range(0, Hkv, heads), range(0, blocks, n)):
            some = slice(b, min(B, b + batch)), slice(h, min(Hkv, h + heads))
            steps.append(Step(region, *some, first, min(n, blocks - first)))
    return steps


def _share(total, most):
    """The size of the parts of `total` that are at most so large, and all about one size."""
    return -(-total // -(-total // max(1, min(total, most))))


def _steps(q, k, window, threads):
    """`plan` for q (B, Hq, T, D) and k (B, Hkv, S, D)."""
    # numbers, which a plan is remembered for; in a fake implementation sizes may be symbols
    (B, Hq, T, D), (Hkv, S) = map(int, q.shape), map(int, k.shape[1:3])
    return plan(B, Hkv, Hq // Hkv, T, S, None if window is None or window >= S else int(window), D, threads)


def keeps(q, k, window):
    """Whether the forward pass is to keep the probabilities, and what goes with them, for the backward pass."""
    longest = max((step.region.keys for step in _steps(q, k, window, 1)), default=0)
    return longest <= KEPT_KEYS * q.shape[3]


def kept_shapes(q, k, window, rope, threads):
    """The shapes of what it keeps: probabilities and stacked queries of each step, then the rotated keys."""
    D, G = q.shape[3], q.shape[1] // k.shape[1]
    if _is_short(q, k):
        return [q.shape[:3], *([q.shape, k.shape] if rope is not None else [])]
    stacks = [(s.products, s.region.rows * G, s.region.keys) for s in _steps(q, k, window, threads)]
    shapes = [shape for n, rows, keys in stacks for shape in ((n, rows, keys), (n, rows, D))]
    return shapes + ([k.shape] if rope is not None and shapes else [])


def _is_short(q, k):
    return 0 < q.shape[2] == k.shape[2] <= SHORT and q.shape[0] > 0 and q.dtype.itemsize >= 4


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
        self.steps = _steps(q, k, window, threads or torch.get_num_threads())
        self.scratch = _Scratch(self.dtype, q.device)
        self.k, self.v = k.to(self.dtype), v.to(self.dtype)
        if rope is not None:
            self.rotation = _rotation(rope, self.S, self.dtype)
            if rotated_k is None:
                rotated_k = _rotate(self.k, self.rotation, torch.empty(k.shape, dtype=self.dtype, device=k.device))
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
        _rotate(q.to(self.dtype), self.step_rotation(step), out.view(q.shape))
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


def _rotation(rope, length, dtype):
    """cos + i sin of the first positions: (length, R / 2)."""
    cos, sin = (table[:length].to(dtype) for table in rope)
    return torch.complex(cos, sin)


def _rotate(x, rotation, out):
    """x (..., D) turned into `out`, which x must not share memory with, partners side by side. Returns out.

    (x[i], x[i + R/2]) is a complex number; (out[2i], out[2i + 1]) is its product with the rotation. Heads of an odd
    size have no complex view: there halves stay halves.
    """
    half = rotation.shape[-1]
    if x.shape[-1] % 2:
        return turn(x, rotation.real, rotation.imag, out)
    pairs = torch.view_as_complex(out[..., : 2 * half].unflatten(-1, (half, 2)))
    torch.complex(x[..., :half], x[..., half : 2 * half], out=pairs).mul_(rotation)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :].copy_(x[..., 2 * half :])
    return out


def _rotate_back(grad, rotation, out):
    """The transpose of `_rotate`: a wide gradient of its result, which is overwritten, into `out` of any dtype."""
    half = rotation.shape[-1]
    if grad.shape[-1] % 2:
        return out.copy_(turn(grad, rotation.real, -rotation.imag, torch.empty_like(grad)))
    pairs = grad[..., : 2 * half].unflatten(-1, (half, 2))
    torch.view_as_complex(pairs).mul_(rotation.conj().resolve_conj())
    out[..., :half].copy_(pairs[..., 0])
    out[..., half : 2 * half].copy_(pairs[..., 1])
    if 2 * half < grad.shape[-1]:
        out[..., 2 * half :].copy_(grad[..., 2 * half :])
    return out


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
    if softcap is None and sinks is None and _is_short(q, k):
        return _short_forward(q, k, v, window, scale, rope, with_lse, threads)
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
    if kept and _is_short(q, k):
        if grad_lse is None:
            return *_short_backward(grad_out, q, k, v, out, kept, window, scale, rope), None
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
            _rotate_back(step_dq, band.step_rotation(step), target)
    if rope is not None:
        dk = _rotate_back(dk, band.rotation, torch.empty_like(k))
    dsinks = None
    if sinks is not None:
        # the sink's probability times its ds, whose do . v is zero
        delta = (grad_out * out).sum(-1, dtype=lse.dtype)
        ds = (sinks.to(lse.dtype)[:, None] - lse).exp_() * (-delta if grad_lse is None else grad_lse - delta)
        dsinks = ds.sum((0, 2)).to(sinks.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks


@lru_cache(maxsize=32)
def _band_mask(T, window, dtype, device):
    """(T, T): 0 where a query sees a key, -inf elsewhere; None if the mask is just causal."""
    if window is None or window >= T:
        return None
    unseen = torch.ones(T, T, dtype=torch.bool, device=device)
    unseen = unseen.triu(1) | unseen.tril(-window)
    return torch.zeros(T, T, dtype=dtype, device=device).masked_fill_(unseen, float("-inf"))


def _short_options(q, window, scale):
    """How PyTorch's kernel is to drop, mask and scale."""
    mask = _band_mask(q.shape[2], window, q.dtype, q.device)
    return (0.0, mask is None), {"attn_mask": mask, "scale": scale}


def _short_forward(q, k, v, window, scale, rope, with_lse, threads):
    causal, options = _short_options(q, window, scale)
    like, rotated = q, []
    if rope is not None:
        rotation = _rotation(rope, q.shape[2], q.dtype)
        q, k = rotated = [_rotate(x, rotation, torch.empty(x.shape, dtype=x.dtype)) for x in (q, k)]
    result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, *causal, **options)
    out = result if result.stride() == like.stride() else torch.empty_like(like).copy_(result)
    lse = lse.contiguous()
    # where nothing else asks for lse, it is what the backward pass needs; an operator's results share no memory
    kept = [lse.clone() if with_lse else lse, *rotated] if threads else []
    return out, lse if with_lse else lse.new_empty(0), kept


def _short_backward(grad_out, q, k, v, out, kept, window, scale, rope):
    causal, options = _short_options(q, window, scale)
    lse, *rotated = kept
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, *(rotated or (q, k)), v, out, lse, *causal, **options
    )
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    if rope is None:
        dq.copy_(grads[0]), dk.copy_(grads[1])
    else:
        rotation = _rotation(rope, q.shape[2], q.dtype)
        _rotate_back(grads[0], rotation, dq), _rotate_back(grads[1], rotation, dk)
    return dq, dk, dv.copy_(grads[2])
