"""`sliding_gqa_attention`: its checks, the choice of a backend, and the operators that PyTorch sees.

Forward and backward are one operator each, opaque to torch.compile, with the backend as an argument. Fake
implementations, FLOP formulas and autograd stand here once; a backend is the functions `attend` and `attend_backward`.
"""

import torch
from torch import library
from torch.utils.flop_counter import register_flop_formula

from .backend import autocast_dtype, backend_module, backward_reads_lse, resolve_backend, without_autocast
from .band import attention_flops
from .checks import (
    check_heads,
    check_options,
    check_prefix,
    check_prefix_distance,
    check_rope,
    check_starts,
    check_starts_values,
    check_tensor,
    check_window,
)
from .namespace import NAMESPACE, OPERATORS
from .prefix import as_if_near, attention_prefix, merge_prefix
from .rope import rotate_alone


def sliding_gqa_attention(
    q, k, v, window=None, *, starts=None, prefix=0, prefix_distance=None, scale=None, softcap=None, sinks=None,
    rope=None, return_lse=False, backend="auto",
):  # fmt: skip
    """Attention in which each query sees the `window` newest keys, its own included; causal unless window is a pair.

    q (B, Hq, T, D); k, v (B, Hkv, S, D), S >= T, Hq % Hkv == 0. Query head h reads KV head h // (Hq / Hkv).
    Queries are the last T of S positions. window=3, T=3, S=5:      1 1 1 . .
    window=None sees every earlier key; scale defaults to D**-0.5.  . 1 1 1 .
                                                                    . . 1 1 1
    window    (left, right) also sees later keys: i - left .. i + right, None or -1 for no bound. W is (W - 1, 0).
              right other than 0 needs T = S.
    starts    (B, S) int32, for each position the first position of its document (`document_starts`): attention stays
              inside it. On a CPU, wrong values raise; on a GPU they give wrong rows, and read nothing outside.
    prefix    the first positions of each document, which every later query sees besides its window (kernels/prefix.py).
              For causal attention.
    prefix_distance
              with rope, a query farther than this from its document's beginning is rotated as if it were this far, for
              keys of the prefix that have left its window: their distance stays in the range of training. None: true
              distances. Less than window + prefix - 1 counts as that.
    softcap   c bounds the scaled scores to c * tanh(s / c) (Gemma 2).
    sinks     (Hq,) one more logit a head that takes probability and gives no value (gpt-oss).
    rope      (cos, sin) of `rope_tables`, at least S long: q and k are rotated inside, half-split, at positions
              S-T .. S-1 and 0 .. S-1; the gradients are those of the unrotated q and k. The tables are constants.
    backend   "auto" (Triton on a GPU, banded elsewhere and for what Triton has no tiles for: fp64, heads of more than
              256 elements), or "triton", "banded", "reference" and no other.

    Returns (B, Hq, T, D) in q's dtype and memory layout, differentiable in q, k, v and sinks; with return_lse also the
    natural log of the sum of exponentials, (B, Hq, T) fp32, sinks included. Dropout is not offered. Under autocast the
    inputs are cast to its dtype. Raises ValueError for shapes, dtypes, devices or strides it cannot take.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_heads(q, k, v, "k", "v")
    window, right = check_window(window)
    scale, softcap = check_options(q, scale, softcap, sinks)
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} positions, more than k's {k.shape[2]}: queries are the last T of S positions"
        )
    if right != 0 and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"window's right side is not 0, which needs as many queries as keys: q has {q.shape[2]} positions, k "
            f"{k.shape[2]}"
        )
    check_starts(starts, q, k.shape[2])
    prefix = check_prefix(prefix, k.shape[2], right)
    prefix_distance = check_prefix_distance(prefix_distance, prefix, window, rope)
    cos, sin = check_rope(rope, k.shape[2], q)
    name, _ = resolve_backend(backend, q.device, q.dtype, q.shape[3])
    if prefix and window is not None and window < k.shape[2]:
        far = None
        if rope is not None:
            T, S = q.shape[2], k.shape[2]
            if prefix_distance is not None and S - 1 > prefix_distance:
                position = as_if_near(torch.arange(S - T, S, device=q.device), prefix_distance, starts)
                far = rotate_alone(q, cos, sin, positions=position, backend=name)
            q = rotate_alone(q, cos, sin, positions=S - T, backend=name)
            k = rotate_alone(k, cos, sin, backend=name)
        options = {"starts": starts, "scale": scale, "softcap": softcap, "backend": name}
        out, lse = sliding_gqa_attention(q, k, v, window, return_lse=True, **options)
        keys = attention_prefix(q, k, v, window, prefix, starts)
        out, lse = merge_prefix(out, lse, q if far is None else far, *keys, scale=scale, softcap=softcap, sinks=sinks)
        return (out, lse) if return_lse else out
    with_lse = return_lse or sinks is not None or backward_reads_lse(name)
    arguments = q, k, v, starts, sinks, cos, sin, window, right, scale, softcap
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        attend = _Attention.apply
        # what a backend keeps for its backward pass depends on sizes, which are symbols in torch.compile
        if not torch.compiler.is_compiling():
            keeping = getattr(backend_module(name), "attend_keeping", None)
            kept = keeping and keeping(q, k, starts, window, right, sinks, softcap)
            if kept:
                attend = kept
                if starts is not None and starts.is_cpu:  # as the operator of the others does
                    check_starts_values(starts)
        out, lse, *_ = attend(*arguments, name, with_lse)
    else:
        out, lse = OPERATORS.attention_forward(*arguments, name, with_lse)
    return (out, lse) if return_lse else out


def autocast_inputs(q, k, v):
    """q, k and v in the dtype of an autocast that is under way, fp64 excepted."""
    check_tensor("q", q, q)
    dtype = autocast_dtype(q.device.type)
    if dtype is not None and q.dtype != torch.float64:
        check_tensor("k", k, k), check_tensor("v", v, v)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


library.define(
    f"{NAMESPACE}::attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor? sinks, Tensor? cos, Tensor? sin, SymInt? window, "
    "SymInt? right, float scale, float? softcap, str backend, bool with_lse) -> (Tensor out, Tensor lse)",
)
library.define(
    f"{NAMESPACE}::attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? starts, Tensor? sinks, Tensor? cos, Tensor? sin, SymInt? window, SymInt? right, float scale, "
    "float? softcap, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
)


@library.impl(f"{NAMESPACE}::attention_forward", "default")
def _forward(q, k, v, starts, sinks, cos, sin, window, right, scale, softcap, backend, with_lse):
    rope = None if cos is None else (cos, sin)
    if starts is not None and starts.is_cpu:
        check_starts_values(starts)
    options = {"right": right, "starts": starts, "scale": scale, "softcap": softcap, "sinks": sinks, "rope": rope}
    with without_autocast(q.device.type):
        return backend_module(backend).attend(q, k, v, window, **options, with_lse=with_lse)


@library.register_fake(f"{NAMESPACE}::attention_forward")
def _forward_fake(q, k, v, starts, sinks, cos, sin, window, right, scale, softcap, backend, with_lse):
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:3] if with_lse else 0, dtype=wide)


@library.impl(f"{NAMESPACE}::attention_backward", "default")
def _backward(grad_out, grad_lse, q, k, v, out, lse, starts, sinks, cos, sin, window, right, scale, softcap, backend):
    rope = None if cos is None else (cos, sin)
    options = {"right": right, "starts": starts, "scale": scale, "softcap": softcap, "sinks": sinks, "rope": rope}
    with without_autocast(q.device.type):
        dq, dk, dv, dsinks = backend_module(backend).attend_backward(
            grad_out, grad_lse, q, k, v, out, lse, window, **options
        )
    # an operator's result is a tensor: without sinks, one of no elements
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@library.register_fake(f"{NAMESPACE}::attention_backward")
def _backward_fake(
    grad_out, grad_lse, q, k, v, out, lse, starts, sinks, cos, sin, window, right, scale, softcap, backend
):  # fmt: skip
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsinks


@register_flop_formula(OPERATORS.attention_forward)
def _forward_flops(q_shape, k_shape, v_shape, starts, sinks, cos, sin, window, right, *args, **kwargs):
    return attention_flops(q_shape, k_shape, window, right, products=2)


@register_flop_formula(OPERATORS.attention_backward)
def _backward_flops(
    grad_out, grad_lse, q_shape, k_shape, v_shape, out, lse, starts, sinks, cos, sin, window, right, *args, **kwargs
):  # fmt: skip
    return attention_flops(q_shape, k_shape, window, right, products=5)


backend_module("banded")  # has operators of its own, which a FLOP counter must know before their first call


class _Attention(torch.autograd.Function):
    # forward takes ctx: with a setup_context beside it, PyTorch inspects its signature at every call, 0.1 ms on a CPU
    @staticmethod
    def forward(ctx, q, k, v, starts, sinks, cos, sin, window, right, scale, softcap, backend, with_lse):
        ctx.options, ctx.with_lse = (window, right, scale, softcap, backend), with_lse
        out, lse = OPERATORS.attention_forward(q, k, v, starts, sinks, cos, sin, *ctx.options, with_lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, starts, sinks, cos, sin)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, starts, sinks, cos, sin = ctx.saved_tensors
        if grad_out is None:  # only lse was used
            grad_out = torch.zeros_like(out)
        if not ctx.with_lse:  # torch.compile sends zeros for a result that was not used
            grad_lse = None
        dq, dk, dv, dsinks = OPERATORS.attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, starts, sinks, cos, sin, *ctx.options
        )
        return dq, dk, dv, None, None if sinks is None else dsinks, *[None] * 8
