"""Attention of the banded backend: cost and memory linear in the length.

The queries are cut into blocks of L positions, and the query heads of one KV head are stacked into the rows of a block.
Each block meets the keys that it sees, one slice of them, in two dense products with a softmax between. L=2, window=3:

    keys      0 1 2 3 4 5
    block 0   1
              1 1                 Only the corners of a block are masked, by one small triangle each that is
    block 1   1 1 1               the same for every block; a key slice that would begin before the first key
                1 1 1             is cut short.
    block 2       1 1 1
                    1 1 1

Full key slices lie L keys apart, so those of many blocks are one overlapping view of the keys, and one batched product.
A step is one batch of blocks. Its scores stay in a core's caches, which is where the speed comes from.

What is rounded: fp32, fp16 and fp64 inputs are computed in fp32 or fp64, and results are rounded once. On CPUs that
multiply bf16, the factors and results of products are bf16 for bf16 inputs: rotated q and k, the scaled scores before
the mask, probabilities, their gradients before and after the softmax's derivative, and a step's share of dk and dv. The
softmax, lse and the sums of dk and dv over steps and blocks are fp32.

The backward pass needs the probabilities again. Where the window is short compared with the head size, they take little
memory, linear in T. The forward pass then keeps them, and the stacked queries: that saves one of seven products, a
softmax and a rotation (keeping.py). Otherwise they are recomputed, as FlashAttention does (arXiv:2307.08691), and
the scores of one step are all that ever exists.

Inside, rotated queries and keys have the two elements of a pair next to each other, where one complex product rotates
them. That changes no score, and it is two to six times as fast as rotating halves.

plan.py cuts the rows into blocks, gathered.py those with documents. short.py takes sequences of a few dozen tokens.
"""

import torch

from ...cpu import has_bf16_products, onednn_is_exact, through_onednn
from .gathered import gathered_steps, is_gathered, padded_length, several_documents
from .plan import steps_of
from .rope import rotate_pairs, rotate_pairs_back, rotation_of
from .scratch import scratch
from .short import is_short, short_backward, short_forward


def product_dtype(q):
    """The dtype of the factors and results of products: bf16 for bf16 on CPUs that multiply it, else at least fp32."""
    if q.dtype == torch.bfloat16 and q.is_cpu and has_bf16_products():
        return q.dtype
    return torch.promote_types(q.dtype, torch.float32)


def steps_in(q, k, starts, window, right, threads):
    """The steps of one call; documents and windows to both sides have gathered ones."""
    if starts is None and right == 0:
        return steps_of(q, k, window, threads)
    return gathered_steps(q, k, starts, window, right, threads)


class _Band:
    """What forward and backward share: the steps, the rotated keys, and one step's rows and scores.

    Products are in `dtype`, see `product_dtype`; all else is in `wide`, fp32 or fp64.
    """

    def __init__(self, q, k, v, starts, window, right, scale, softcap, rope, threads, rotated_k=None):
        self.T, self.S, self.D, self.G = q.shape[2], k.shape[2], q.shape[3], q.shape[1] // k.shape[1]
        self.scale, self.softcap, self.rotation, self.device = scale, softcap, None, q.device
        self.dtype, self.wide = product_dtype(q), torch.promote_types(q.dtype, torch.float32)
        self.steps = steps_in(q, k, starts, window, right, threads or torch.get_num_threads())
        self.gathered = is_gathered(self.steps)
        self.padded = padded_length(self.S, self.steps) if self.gathered else self.S
        # oneDNN takes overlapping slices of the keys only by copying them, transposed: a plain copy is faster
        dense = q.is_cpu and (self.dtype == torch.bfloat16 or onednn_is_exact()) and self.dtype.itemsize <= 4
        self.copy_keys = dense or self.gathered
        self.views = {}
        if rope is not None:
            self.rotation = rotation_of(rope, self.S, self.wide)
        self.k = self.laid_out(k, self.rotation) if rope is None or rotated_k is None else rotated_k
        self.v = self.laid_out(v)

    def laid_out(self, x, rotation=None):
        """Keys or values x (B, Hkv, S, D), rotated if there is a rotation; gathered steps take whole pieces, dense."""
        if rotation is None and (not self.gathered or (x.is_contiguous() and self.padded == self.S)):
            return x.to(self.dtype)
        shape = *x.shape[:2], self.padded, self.D
        whole = torch.empty(shape, dtype=self.dtype if rotation is None else self.wide, device=x.device)
        whole[:, :, self.S :] = 0  # keys that no row sees, but 0 * NaN is NaN
        if rotation is None:
            whole[:, :, : self.S] = x
        else:
            rotate_pairs(x.to(self.wide), rotation, whole[:, :, : self.S])
        return whole.to(self.dtype)

    def scratch(self, name, *shape, wide=False):
        view = self.views.get((name, shape, wide))
        if view is None:
            view = scratch(name, shape, self.wide if wide else self.dtype, self.device)
            self.views[name, shape, wide] = view
        return view

    def widened(self, x):
        """x in the wide dtype: itself, or a copy in scratch."""
        return x if x.dtype == self.wide else self.scratch("wide", *x.shape, wide=True).copy_(x)

    def queries(self, step, q, out):
        """The step's rows of q, rotated, stacked into `out` (b * h * n, L * G, D)."""
        if self.rotation is None:
            return step.read(q, self.G, out)
        q = self.widened(step.rows(q, self.G))
        rotated = out if out.dtype == self.wide else self.scratch("rotated", *out.shape, wide=True)
        rotate_pairs(q, step.rotation(self.rotation, self.S - self.T), rotated.view(q.shape))
        return out if out is rotated else out.copy_(rotated)

    def keys(self, step, x):
        """The step's key slices of x (B, Hkv, S, D), as a factor (b * h * n, N, D)."""
        if not self.copy_keys:
            return step.keys(x)
        return step.copy_keys(x, self.scratch("keys", step.products, step.width, self.D))

    def row_buffer(self, name, step):
        return self.scratch(name, step.products, step.length * self.G, self.D)

    def product(self, name, a, b, scale=1.0):
        """scale * a b in scratch, batched; the scale rides on the product."""
        out = self.scratch(name, a.shape[0], a.shape[1], b.shape[2])
        return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)

    def scores(self, step, q, out):
        """Masked scores (b * h * n, L * G, N) of stacked rows q, wide; with a softcap, also their derivative.

        Their product is written to `out`, which the result is too if that is wide.
        """
        slope = None
        s = self.widened(torch.baddbmm(out, q, self.keys(step, self.k).mT, beta=0, alpha=self.scale, out=out))
        if self.softcap is not None:
            s.div_(self.softcap).tanh_()
            slope = torch.mul(s, s, out=self.scratch("slope", *s.shape, wide=True)).neg_().add_(1.0)
            s.mul_(self.softcap)
        step.mask(s, self.G)
        return s, slope

    def score_buffer(self, step):
        return self.scratch("s", step.products, step.length * self.G, step.width)


def forward(q, k, v, starts, window, right, scale, softcap, sinks, rope, with_lse, threads=0):
    """(out, lse, kept) of `sliding_gqa_attention`: out in q's dtype and layout, lse (B, Hq, T) fp32.

    Sums and lse are fp64 for fp64 inputs. Without with_lse, which sinks need, lse has no elements: the backward pass
    does without. threads: for how many the work is cut, if what keeping.py lists is to be kept; 0 if nothing is.
    """
    starts = several_documents(starts)
    if starts is None and right == 0 and softcap is None and sinks is None and is_short(q, k):
        return short_forward(q, k, v, window, scale, rope, with_lse, threads)
    return _forward_in_blocks(q, k, v, starts, window, right, scale, softcap, sinks, rope, with_lse, threads)


@through_onednn
def _forward_in_blocks(q, k, v, starts, window, right, scale, softcap, sinks, rope, with_lse, threads):
    band = _Band(q, k, v, starts, window, right, scale, softcap, rope, threads)
    # what gathered steps write was zero
    out = torch.zeros_like(q) if band.gathered else torch.empty_like(q)
    lse = torch.zeros(q.shape[:3] if with_lse else 0, dtype=band.wide, device=q.device)
    kept = []
    for step in band.steps:
        p, rows = band.score_buffer(step), band.row_buffer("q", step)
        if threads:
            # tensors a step, not one for all: the system would map and clear a large one at every call
            p, rows = torch.empty_like(p), torch.empty_like(rows)
            kept += [p, rows]
        s, _ = band.scores(step, band.queries(step, q, rows), p)
        if with_lse:
            largest = s.amax(-1)
        torch.softmax(s, dim=-1, out=s)
        p = p if p is s else p.copy_(s)
        step.write(out, band.G, band.product("o", p, band.keys(step, band.v)))
        if with_lse:  # from the largest score and its probability: no second pass of exponentials
            step.write(lse[..., None], band.G, largest.sub_(s.amax(-1).log_()))
    if sinks is not None:
        with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out.mul_((lse - with_sinks).exp_()[..., None])
        lse = with_sinks
    if threads and band.steps and rope is not None:
        kept.append(band.k)
    return out, lse, kept


def backward(
    grad_out, grad_lse, q, k, v, out, lse, starts, window, right, scale, softcap, sinks, rope, kept=(), threads=0,
):  # fmt: skip
    """(dq, dk, dv, dsinks) for the gradients of both results; grad_lse may be None, dsinks is None without sinks.

    kept, threads: those of the forward pass, if it kept anything.

    ds_ij = p_ij (do_i . v_j - do_i . o_i + dlse_i);  dq = scale ds k,  dk = scale ds^T q,  dv = p^T do
    """
    starts = several_documents(starts)
    if kept and starts is None and right == 0 and is_short(q, k):
        if grad_lse is None:
            return *short_backward(grad_out, q, k, v, out, kept, window, scale, rope), None
        kept = ()
    return _backward_in_blocks(
        grad_out, grad_lse, q, k, v, out, lse, starts, window, right, scale, softcap, sinks, rope, kept, threads
    )


@through_onednn
def _backward_in_blocks(
    grad_out, grad_lse, q, k, v, out, lse, starts, window, right, scale, softcap, sinks, rope, kept, threads
):  # fmt: skip
    band = _Band(q, k, v, starts, window, right, scale, softcap, rope, threads, kept[-1] if kept else None)
    G, S = band.G, band.S
    dq = torch.zeros_like(q) if band.gathered else torch.empty_like(q)
    # head by head, so that the keys of a block are one run of memory
    shape = *k.shape[:2], band.padded, band.D
    if band.gathered and grad_out.stride(3) != 1:  # one number for all, as sum().backward() makes it
        grad_out = grad_out.contiguous()
    dk_sums, dv_sums = (band.scratch(name, *shape, wide=True).zero_() for name in ("dk", "dv"))
    for index, step in enumerate(band.steps):
        do = step.read(grad_out, G, band.row_buffer("do", step))
        slope = None
        if kept:
            p, rows = kept[2 * index : 2 * index + 2]
        else:
            rows = band.queries(step, q, band.row_buffer("q", step))
            p = band.score_buffer(step)
            s, slope = band.scores(step, rows, p)
            if sinks is None:
                torch.softmax(s, dim=-1, out=s)
            else:
                s.sub_(step.numbers(lse, G)).exp_()
            p = p if p is s else p.copy_(s)
        step.add_to_keys(dv_sums, band.widened(band.product("sums", p.mT, do)))
        ds = band.product("ds", do, band.keys(step, band.v).mT)
        # p * (dp - sum(p * dp)) in one pass; the sum is do . o
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
        if grad_lse is not None:
            ds.addcmul_(p, step.numbers(grad_lse, G))
        if slope is not None:
            ds.mul_(slope)
        step.add_to_keys(dk_sums, band.widened(band.product("sums", ds.mT, rows, scale)))
        step_dq = band.product("o", ds, band.keys(step, band.k), scale)
        if rope is None:
            step.write(dq, G, step_dq)
        else:
            step.write(dq, G, band.widened(step_dq), step.rotation(band.rotation, S - band.T))
    dk, dv = torch.empty_like(k), torch.empty_like(v).copy_(dv_sums[:, :, :S])
    if rope is None:
        dk.copy_(dk_sums[:, :, :S])
    else:
        rotate_pairs_back(dk_sums[:, :, :S], band.rotation, dk)
    dsinks = None
    if sinks is not None:
        # the sink's probability times its ds, whose do . v is zero
        delta = (grad_out * out).sum(-1, dtype=lse.dtype)
        ds = (sinks.to(lse.dtype)[:, None] - lse).exp_() * (-delta if grad_lse is None else grad_lse - delta)
        dsinks = ds.sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks


def attend(q, k, v, window=None, *, scale, right=0, starts=None, softcap=None, sinks=None, rope=None, with_lse=True):
    """(out, lse): see kernels/backends/__init__.py."""
    return forward(q, k, v, starts, window, right, scale, softcap, sinks, rope, with_lse)[:2]


def attend_backward(
    grad_out, grad_lse, q, k, v, out, lse, window=None, *, scale, right=0, starts=None, softcap=None, sinks=None,
    rope=None,
):  # fmt: skip
    """(dq, dk, dv, dsinks) from recomputed probabilities: see kernels/backends/__init__.py."""
    return backward(grad_out, grad_lse, q, k, v, out, lse, starts, window, right, scale, softcap, sinks, rope)
