"""The operators behind `apply_rope(..., norm=)`: q and k normalised and rotated, forward and backward.

    y = rotate(x / sqrt(mean(x^2) + eps) * weight)

Each pass reads every element once and writes it once; the backward normalises again, so nothing is kept but q and k.
"""

import torch
from torch import library

from .backend import backend_module
from .checks import check_reach
from .namespace import NAMESPACE, OPERATORS

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, float eps, Tensor cos, Tensor sin, Tensor? positions, "
    "SymInt offset, bool interleaved, str backend"
)
library.define(f"{NAMESPACE}::norm_rotate", f"({_ARGUMENTS}) -> (Tensor q, Tensor k)")
library.define(
    f"{NAMESPACE}::norm_rotate_backward",
    f"(Tensor grad_q, Tensor grad_k, {_ARGUMENTS}) -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)",
)


def norm_rotation(q, k, q_weight, k_weight, eps, cos, sin, positions, offset, interleaved, backend):
    """`apply_rope` with a norm, on a named backend, its arguments checked. positions: a tensor, or None for offset."""
    return _NormRotation.apply(q, k, q_weight, k_weight, eps, cos, sin, positions, offset, interleaved, backend)


def positions_in(cos, positions, offset):
    """What a backend takes: positions, or offset where they are None.

    Raises ValueError for positions that the tables lack, where reading them does not wait for a GPU.
    """
    if positions is None:
        return offset
    if positions.is_cpu and positions.numel():
        for position in torch.aminmax(positions):
            check_reach(cos.shape[0], position.item())
    return positions


@library.impl(f"{NAMESPACE}::norm_rotate", "default")
def _forward(q, k, q_weight, k_weight, eps, cos, sin, positions, offset, interleaved, backend):
    options = {"positions": positions_in(cos, positions, offset), "interleaved": interleaved}
    with torch.autocast(q.device.type, enabled=False):
        return backend_module(backend).norm_rotate(q, k, (q_weight, k_weight, eps), cos, sin, **options)


@library.register_fake(f"{NAMESPACE}::norm_rotate")
def _forward_fake(q, k, q_weight, k_weight, eps, cos, sin, positions, offset, interleaved, backend):
    return torch.empty_like(q), torch.empty_like(k)


@library.impl(f"{NAMESPACE}::norm_rotate_backward", "default")
def _backward(grad_q, grad_k, q, k, q_weight, k_weight, eps, cos, sin, positions, offset, interleaved, backend):
    options = {"positions": positions_in(cos, positions, offset), "interleaved": interleaved}
    with torch.autocast(q.device.type, enabled=False):
        *grads, dq_weight, dk_weight = backend_module(backend).norm_rotate_backward(
            grad_q, grad_k, q, k, (q_weight, k_weight, eps), cos, sin, **options
        )
    # an operator's result is a tensor: without a weight, one of no elements
    return *grads, *(q.new_empty(0) if grad is None else grad for grad in (dq_weight, dk_weight))


@library.register_fake(f"{NAMESPACE}::norm_rotate_backward")
def _backward_fake(grad_q, grad_k, q, k, q_weight, k_weight, eps, cos, sin, positions, offset, interleaved, backend):
    of_weights = (q.new_empty(0) if weight is None else torch.empty_like(weight) for weight in (q_weight, k_weight))
    return torch.empty_like(q), torch.empty_like(k), *of_weights


class _NormRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, eps, cos, sin, positions, *options):
        ctx.eps, ctx.options = eps, options
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, positions)
        return OPERATORS.norm_rotate(q, k, q_weight, k_weight, eps, cos, sin, positions, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_q, grad_k):
        q, k, q_weight, k_weight, *tables = ctx.saved_tensors
        dq, dk, dq_weight, dk_weight = OPERATORS.norm_rotate_backward(
            grad_q, grad_k, q, k, q_weight, k_weight, ctx.eps, *tables, *ctx.options
        )
        of_weights = None if q_weight is None else dq_weight, None if k_weight is None else dk_weight
        return dq, dk, *of_weights, *[None] * 7
