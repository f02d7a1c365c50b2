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
softmax and a rotation (`attend_keeping`). Otherwise they are recomputed, as FlashAttention does (arXiv:2307.08691), and
the scores of one step are all that ever exists.

Inside, rotated queries and keys have the two elements of a pair next to each other, where one complex product rotates
them. That changes no score, and it is two to six times as fast as rotating halves.

plan.py cuts the rows into blocks. short.py takes sequences of a few dozen tokens.
"""

import math
import threading
from functools import lru_cache

import torch
from torch import library
from torch.utils.flop_counter import register_flop_formula

from ...band import attention_flops
from ...cpu import has_bf16_products, onednn_is_exact, through_onednn
from ...namespace import NAMESPACE, OPERATORS
from .plan import steps_of
from .rope import rotate_pairs, rotate_pairs_back, rotation_of
from .short import is_short, short_backward, short_forward

KEPT_KEYS = 8  # what is kept for the backward pass takes at most about 8 times the memory of q


class _Scratch(threading.local):
    """A thread's buffers, shared by all steps of all its calls: the system would map and clear new ones every time."""

    KEPT_BYTES = 2**22  # a thread of PyTorch: larger buffers, which only long windows need, are freed after the call

    def __init__(self):
        self.buffers = {}

    def __call__(self, name, shape, dtype, device):
        size = math.prod(shape)
        key = name, dtype, device
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside of it
                buffer = torch.empty(size, dtype=dtype, device=device)
            if device.type == "cpu" and buffer.nbytes <= self.KEPT_BYTES * torch.get_num_threads():
                self.buffers[key] = buffer
        return buffer[:size].view(shape)


_scratch = _Scratch()


def product_dtype(q):
    """The dtype of the factors and results of products: bf16 for bf16 on CPUs that multiply it, else at least fp32."""
    if q.dtype == torch.bfloat16 and q.is_cpu and has_bf16_products():
        return q.dtype
    return torch.promote_types(q.dtype, torch.float32)


class _Band:
    """What forward and backward share: the steps, the rotated keys, and one step's rows and scores.

    Products are in `dtype`, see `product_dtype`; all else is in `wide`, fp32 or fp64.
    """

    def __init__(self, q, k, v, window, scale, softcap, rope, threads, rotated_k=None):
        self.T, self.S, self.D, self.G = q.shape[2], k.shape[2], q.shape[3], q.shape[1] // k.shape[1]
        self.scale, self.softcap, self.rotation, self.device = scale, softcap, None, q.device
        self.dtype, self.wide = product_dtype(q), torch.promote_types(q.dtype, torch.float32)
        # oneDNN takes overlapping slices of the keys only by copying them, transposed: a plain copy is faster
        self.copy_keys = q.is_cpu and (self.dtype == torch.bfloat16 or onednn_is_exact()) and self.dtype.itemsize <= 4
        self.steps = steps_of(q, k, window, threads or torch.get_num_threads())
        self.k, self.v, self.views = k.to(self.dtype), v.to(self.dtype), {}
        if rope is not None:
            self.rotation = rotation_of(rope, self.S, self.wide)
            if rotated_k is None:
                rotated_k = torch.empty(k.shape, dtype=self.wide, device=k.device)
                rotated_k = rotate_pairs(k.to(self.wide), self.rotation, rotated_k).to(self.dtype)
            self.k = rotated_k

    def scratch(self, name, *shape, wide=False):
        view = self.views.get((name, shape, wide))
        if view is None:
            view = _scratch(name, shape, self.wide if wide else self.dtype, self.device)
            self.views[name, shape, wide] = view
        return view

    def widened(self, x):
        """x in the wide dtype: itself, or a copy in scratch."""
        return x if x.dtype == self.wide else self.scratch("wide", *x.shape, wide=True).copy_(x)

    def step_rotation(self, step):
        """The rotation of the step's query rows, to go with its (b, h, n, L, G, R / 2)."""
        first = self.S - self.T + step.region.first_row + step.first * step.region.rows
        part = self.rotation[first : first + step.blocks * step.region.rows]
        return part.view(step.blocks, step.region.rows, 1, -1)

    def rows(self, step, x, out):
        """The step's rows of x (B, Hq, T, D), stacked, into `out` (b * h * n, L * G, D)."""
        x = step.rows(x, self.G)
        out.view(x.shape).copy_(x)
        return out

    def queries(self, step, q, out):
        """The same, rotated."""
        if self.rotation is None:
            return self.rows(step, q, out)
        q = self.widened(step.rows(q, self.G))
        rotated = out if out.dtype == self.wide else self.scratch("rotated", *out.shape, wide=True)
        rotate_pairs(q, self.step_rotation(step), rotated.view(q.shape))
        return out if out is rotated else out.copy_(rotated)

    def keys(self, step, x):
        """The step's key slices of x (B, Hkv, S, D), as a factor (b * h * n, N, D)."""
        if not self.copy_keys:
            return step.keys(x)
        slices = step.pieces(x, 0, step.region.keys)
        out = self.scratch("keys", *slices.shape)
        return out.copy_(slices).view(step.products, step.region.keys, -1)

    def row_buffer(self, name, step):
        return self.scratch(name, step.products, step.region.rows * self.G, self.D)

    def product(self, name, a, b, scale=1.0):
        """scale * a b in scratch, batched; the scale rides on the product."""
        out = self.scratch(name, a.shape[0], a.shape[1], b.shape[2])
        return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)

    def scores(self, step, q, out):
        """Masked scores (b * h * n, L * G, N) of stacked rows q, wide; with a softcap, also their derivative.

        Their product is written to `out`, which the result is too if that is wide.
        """
        region, slope = step.region, None
        s = self.widened(torch.baddbmm(out, q, self.keys(step, self.k).mT, beta=0, alpha=self.scale, out=out))
        if self.softcap is not None:
            s.div_(self.softcap).tanh_()
            slope = torch.mul(s, s, out=self.scratch("slope", *s.shape, wide=True)).neg_().add_(1.0)
            s.mul_(self.softcap)
        corners = s.view(-1, region.rows, self.G, region.keys)
        left, right = _triangles(region.rows, region.left, self.wide, s.device)
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


def _forward(q, k, v, window, scale, softcap, sinks, rope, with_lse, threads=0):
    """(out, lse, kept) of `sliding_gqa_attention`: out in q's dtype and layout, lse (B, Hq, T) fp32.

    Sums and lse are fp64 for fp64 inputs. Without with_lse, which sinks need, lse has no elements: the backward pass
    does without. threads: for how many the work is cut, if what `_kept_shapes` lists is to be kept; 0 if nothing is.
    """
    if softcap is None and sinks is None and is_short(q, k):
        return short_forward(q, k, v, window, scale, rope, with_lse, threads)
    return _forward_in_blocks(q, k, v, window, scale, softcap, sinks, rope, with_lse, threads)


@through_onednn
def _forward_in_blocks(q, k, v, window, scale, softcap, sinks, rope, with_lse, threads):
    band = _Band(q, k, v, window, scale, softcap, rope, threads)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3] if with_lse else 0, dtype=band.wide, device=q.device)
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
        target = step.rows(out, band.G)
        target.copy_(band.product("o", p, band.keys(step, band.v)).view(target.shape))
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


def _backward(
    grad_out, grad_lse, q, k, v, out, lse, window, scale, softcap, sinks, rope, kept=(), threads=0,
):  # fmt: skip
    """(dq, dk, dv, dsinks) for the gradients of both results; grad_lse may be None, dsinks is None without sinks.

    kept, threads: those of the forward pass, if it kept anything.

    ds_ij = p_ij (do_i . v_j - do_i . o_i + dlse_i);  dq = scale ds k,  dk = scale ds^T q,  dv = p^T do
    """
    if kept and is_short(q, k):
        if grad_lse is None:
            return *short_backward(grad_out, q, k, v, out, kept, window, scale, rope), None
        kept = ()
    return _backward_in_blocks(
        grad_out, grad_lse, q, k, v, out, lse, window, scale, softcap, sinks, rope, kept, threads
    )


@through_onednn
def _backward_in_blocks(
    grad_out, grad_lse, q, k, v, out, lse, window, scale, softcap, sinks, rope, kept, threads
):  # fmt: skip
    band = _Band(q, k, v, window, scale, softcap, rope, threads, kept[-1] if kept else None)
    G, dq = band.G, torch.empty_like(q)
    # head by head, so that the keys of a block are one run of memory
    dk_sums, dv_sums = (band.scratch(name, *k.shape, wide=True).zero_() for name in ("dk", "dv"))
    for index, step in enumerate(band.steps):
        do = band.rows(step, grad_out, band.row_buffer("do", step))
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
        target = step.rows(dq, G)
        step_dq = band.product("o", ds, band.keys(step, band.k), scale).view(target.shape)
        if rope is None:
            target.copy_(step_dq)
        else:
            rotate_pairs_back(band.widened(step_dq), band.step_rotation(step), target)
    dk, dv = torch.empty_like(k), torch.empty_like(v).copy_(dv_sums)
    if rope is None:
        dk.copy_(dk_sums)
    else:
        rotate_pairs_back(dk_sums, band.rotation, dk)
    dsinks = None
    if sinks is not None:
        # the sink's probability times its ds, whose do . v is zero
        delta = (grad_out * out).sum(-1, dtype=lse.dtype)
        ds = (sinks.to(lse.dtype)[:, None] - lse).exp_() * (-delta if grad_lse is None else grad_lse - delta)
        dsinks = ds.sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks


def attend(q, k, v, window=None, *, scale, right=0, starts=None, softcap=None, sinks=None, rope=None, with_lse=True):
    """(out, lse): see kernels/backends/__init__.py."""
    return _forward(q, k, v, window, scale, softcap, sinks, rope, with_lse)[:2]


def attend_backward(
    grad_out, grad_lse, q, k, v, out, lse, window=None, *, scale, right=0, starts=None, softcap=None, sinks=None,
    rope=None,
):  # fmt: skip
    """(dq, dk, dv, dsinks) from recomputed probabilities: see kernels/backends/__init__.py."""
    return _backward(grad_out, grad_lse, q, k, v, out, lse, window, scale, softcap, sinks, rope)


# Attention that keeps its probabilities for the backward pass: operators of the same kind as those of
# kernels/attention.py, with `kept` between them, and `threads`, for how many the work is cut.


def attend_keeping(q, k, starts, window, right, sinks, softcap):
    """A differentiable attention that keeps its probabilities for the backward pass; None where it should not.

    Its arguments are those of `kernels.attention._Attention.apply`. Nothing is kept with sinks or a softcap.
    """
    longest = max((step.region.keys for step in steps_of(q, k, window, 1)), default=0)
    if starts is None and right == 0 and sinks is None and softcap is None and longest <= KEPT_KEYS * q.shape[3]:
        return _KeepingAttention.apply
    return None


library.define(
    f"{NAMESPACE}::banded_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, SymInt? window, float scale, bool with_lse, "
    "int threads) -> (Tensor out, Tensor lse, Tensor[] kept)",
)
library.define(
    f"{NAMESPACE}::banded_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] kept, "
    "Tensor? cos, Tensor? sin, SymInt? window, float scale, int threads) -> (Tensor dq, Tensor dk, Tensor dv)",
)


@library.impl(f"{NAMESPACE}::banded_forward", "default")
def _forward_op(q, k, v, cos, sin, window, scale, with_lse, threads):
    rope = None if cos is None else (cos, sin)
    with torch.autocast(q.device.type, enabled=False):
        return _forward(q, k, v, window, scale, None, None, rope, with_lse, threads)


@library.register_fake(f"{NAMESPACE}::banded_forward")
def _forward_fake(q, k, v, cos, sin, window, scale, with_lse, threads):
    lse = q.new_empty(q.shape[:3] if with_lse else 0, dtype=torch.promote_types(q.dtype, torch.float32))
    shapes = _kept_shapes(q, k, window, cos, threads)
    return torch.empty_like(q), lse, [q.new_empty(shape, dtype=product_dtype(q)) for shape in shapes]


def _kept_shapes(q, k, window, rope, threads):
    """Of the probabilities and the stacked queries of each step, then of the rotated keys."""
    D, G = q.shape[3], q.shape[1] // k.shape[1]
    if is_short(q, k):
        return [q.shape[:3], *([q.shape, k.shape] if rope is not None else [])]
    stacks = [(s.products, s.region.rows * G, s.region.keys) for s in steps_of(q, k, window, threads)]
    shapes = [shape for n, rows, keys in stacks for shape in ((n, rows, keys), (n, rows, D))]
    return shapes + ([k.shape] if rope is not None and shapes else [])


@library.impl(f"{NAMESPACE}::banded_backward", "default")
def _backward_op(grad_out, grad_lse, q, k, v, out, lse, kept, cos, sin, window, scale, threads):
    rope = None if cos is None else (cos, sin)
    with torch.autocast(q.device.type, enabled=False):
        return _backward(grad_out, grad_lse, q, k, v, out, lse, window, scale, None, None, rope, kept, threads)[:3]


@library.register_fake(f"{NAMESPACE}::banded_backward")
def _backward_fake(grad_out, grad_lse, q, k, v, out, lse, kept, cos, sin, window, scale, threads):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@register_flop_formula(OPERATORS.banded_forward)
def _forward_flops(q_shape, k_shape, v_shape, cos, sin, window, *args, **kwargs):
    return attention_flops(q_shape, k_shape, window, 0, products=2)


@register_flop_formula(OPERATORS.banded_backward)
def _backward_flops(grad_out, grad_lse, q_shape, k_shape, v_shape, out, lse, kept, cos, sin, window, *args, **kwargs):
    return attention_flops(q_shape, k_shape, window, 0, products=5)


class _KeepingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, starts, sinks, cos, sin, window, right, scale, softcap, backend, with_lse):
        ctx.options = window, scale, torch.get_num_threads()
        out, lse, kept = OPERATORS.banded_forward(q, k, v, cos, sin, window, scale, with_lse, ctx.options[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, cos, sin, *kept)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, cos, sin, *kept = ctx.saved_tensors
        if grad_out is None:  # only lse was used
            grad_out = torch.zeros_like(out)
        grads = OPERATORS.banded_backward(grad_out, grad_lse, q, k, v, out, lse, kept, cos, sin, *ctx.options)
        return *grads, *[None] * 10
