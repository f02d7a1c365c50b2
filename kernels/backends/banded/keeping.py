"""Attention that keeps its probabilities for the backward pass, where they take little memory.

Operators of the same kind as those of kernels/attention.py, with `kept` between them, and `threads`, for how many the
work is cut.
"""

import torch
from torch import library
from torch.utils.flop_counter import register_flop_formula

from ...band import attention_flops
from ...namespace import NAMESPACE, OPERATORS
from .attention import backward, forward, product_dtype, steps_in
from .gathered import gathered_steps, is_gathered, padded_length, several_documents
from .plan import steps_of
from .short import is_short

KEPT_KEYS = 8  # what is kept for the backward pass takes at most about 8 times the memory of q


def attend_keeping(q, k, starts, window, right, sinks, softcap):
    """A differentiable attention that keeps its probabilities for the backward pass; None where it should not.

    Its arguments are those of `kernels.attention._Attention.apply`. Nothing is kept with sinks or a softcap.
    """
    if sinks is not None or softcap is not None or not (starts is None or _readable(starts)):
        return None
    starts = several_documents(starts)
    steps = steps_in(q, k, starts, window, right, torch.get_num_threads())
    if is_gathered(steps):
        keys = sum(step.products * step.length * step.width for step in steps) / (len(q) * k.shape[1] * q.shape[2])
    else:
        keys = max((step.width for step in steps), default=0)
    return _KeepingAttention.apply if keys <= KEPT_KEYS * q.shape[3] else None


def _readable(x):
    """Whether x has elements: a fake tensor has none."""
    return type(x) is torch.Tensor and x.device.type != "meta"


library.define(
    f"{NAMESPACE}::banded_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor? cos, Tensor? sin, SymInt? window, SymInt? right, "
    "float scale, bool with_lse, int threads, int[]? stacks=None) -> (Tensor out, Tensor lse, Tensor[] kept)",
)
library.define(
    f"{NAMESPACE}::banded_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] kept, "
    "Tensor? starts, Tensor? cos, Tensor? sin, SymInt? window, SymInt? right, float scale, int threads) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
)


@library.impl(f"{NAMESPACE}::banded_forward", "default")
def _forward_op(q, k, v, starts, cos, sin, window, right, scale, with_lse, threads, stacks=None):
    rope = None if cos is None else (cos, sin)
    with torch.autocast(q.device.type, enabled=False):
        return forward(q, k, v, starts, window, right, scale, None, None, rope, with_lse, threads)


@library.register_fake(f"{NAMESPACE}::banded_forward")
def _forward_fake(q, k, v, starts, cos, sin, window, right, scale, with_lse, threads, stacks=None):
    lse = q.new_empty(q.shape[:3] if with_lse else 0, dtype=torch.promote_types(q.dtype, torch.float32))
    shapes = _kept_shapes(q, k, window, cos, threads, stacks)
    return torch.empty_like(q), lse, [q.new_empty(shape, dtype=product_dtype(q)) for shape in shapes]


def _kept_shapes(q, k, window, rope, threads, stacks):
    """Of the probabilities and the stacked queries of each step, then of the rotated keys."""
    D, G = q.shape[3], q.shape[1] // k.shape[1]
    if stacks is not None:
        keys, *stacks = stacks
        stacks = zip(stacks[::3], stacks[1::3], stacks[2::3], strict=True)
    elif is_short(q, k):
        return [q.shape[:3], *([q.shape, k.shape] if rope is not None else [])]
    else:
        keys, stacks = k.shape[2], _stacks(steps_of(q, k, window, threads), G)
    shapes = [shape for n, rows, width in stacks for shape in ((n, rows, width), (n, rows, D))]
    return shapes + ([(*k.shape[:2], keys, D)] if rope is not None and shapes else [])


def _stacks(steps, G):
    return [(step.products, step.length * G, step.width) for step in steps]


def stacks_of(q, k, starts, window, right, threads):
    """What banded_forward keeps in gathered steps, which only starts' elements tell: S in whole pieces, and (products,
    rows, keys) of each step, as one list; None without such steps.
    """
    starts = several_documents(starts)
    if starts is None and right == 0:
        return None
    steps = gathered_steps(q, k, starts, window, right, threads)
    whole = padded_length(k.shape[2], steps) if steps else 0
    return [whole, *(n for stack in _stacks(steps, q.shape[1] // k.shape[1]) for n in stack)]


@library.impl(f"{NAMESPACE}::banded_backward", "default")
def _backward_op(grad_out, grad_lse, q, k, v, out, lse, kept, starts, cos, sin, window, right, scale, threads):
    rope = None if cos is None else (cos, sin)
    with torch.autocast(q.device.type, enabled=False):
        return backward(
            grad_out, grad_lse, q, k, v, out, lse, starts, window, right, scale, None, None, rope, kept, threads
        )[:3]


@library.register_fake(f"{NAMESPACE}::banded_backward")
def _backward_fake(grad_out, grad_lse, q, k, v, out, lse, kept, starts, cos, sin, window, right, scale, threads):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@register_flop_formula(OPERATORS.banded_forward)
def _forward_flops(q_shape, k_shape, v_shape, starts, cos, sin, window, right, *args, **kwargs):
    return attention_flops(q_shape, k_shape, window, right, products=2)


@register_flop_formula(OPERATORS.banded_backward)
def _backward_flops(
    grad_out, grad_lse, q_shape, k_shape, v_shape, out, lse, kept, starts, cos, sin, window, right, *args, **kwargs
):  # fmt: skip
    return attention_flops(q_shape, k_shape, window, right, products=5)


class _KeepingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, starts, sinks, cos, sin, window, right, scale, softcap, backend, with_lse):
        ctx.options = window, right, scale, torch.get_num_threads()
        stacks = stacks_of(q, k, starts, window, right, ctx.options[-1])
        out, lse, kept = OPERATORS.banded_forward(
            q, k, v, starts, cos, sin, window, right, scale, with_lse, ctx.options[-1], stacks
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, starts, cos, sin, *kept)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, starts, cos, sin, *kept = ctx.saved_tensors
        if grad_out is None:  # only lse was used
            grad_out = torch.zeros_like(out)
        grads = OPERATORS.banded_backward(grad_out, grad_lse, q, k, v, out, lse, kept, starts, cos, sin, *ctx.options)
        return *grads, *[None] * 10
