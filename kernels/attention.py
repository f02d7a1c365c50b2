"""`sliding_gqa_attention`: its checks, the choice of a backend, and the operators that PyTorch sees.

Forward and backward are an operator each, opaque to torch.compile, with the backend as an argument: fake
implementations, the FLOP formula and autograd stand here once, and a backend is two functions.
"""

import torch
from torch import library
from torch.utils.flop_counter import register_flop_formula

from .backend import autocast_dtype, resolve_backend
from .checks import check_heads, check_options, check_rope, check_tensor


def sliding_gqa_attention(
    q, k, v, window=None, *, scale=None, softcap=None, sinks=None, rope=None, return_lse=False, backend="auto"
):
    """Causal attention in which each query sees the `window` newest keys, its own included.

    q (B, Hq, T, D); k, v (B, Hkv, S, D), S >= T, Hq % Hkv == 0. Query head h reads KV head h // (Hq / Hkv).
    Queries are the last T of S positions. window=3, T=3, S=5:      1 1 1 . .
    window=None sees every earlier key; scale defaults to D**-0.5.  . 1 1 1 .
                                                                    . . 1 1 1
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
    check_tensor("q", q, q)
    dtype = autocast_dtype(q.device.type)
    if dtype is not None and q.dtype != torch.float64:
        check_tensor("k", k, k), check_tensor("v", v, v)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_heads(q, k, v, "k", "v")
    window, scale, softcap = check_options(q, window, scale, softcap, sinks)
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} positions, more than k's {k.shape[2]}: queries are the last T of S positions"
        )
    cos, sin = check_rope(rope, k.shape[2], q)
    name, _ = resolve_backend(backend, q.device, q.dtype, q.shape[3])
    if name == "reference":
        from . import reference

        rope = None if cos is None else (cos, sin)
        out, lse = reference.attention(q, k, v, window, scale=scale, softcap=softcap, sinks=sinks, rope=rope)
        out = in_layout_of(q, out)
    else:
        # the banded backward needs no lse, so it is only made where it is asked for
        with_lse = return_lse or sinks is not None or name != "banded"
        arguments = q, k, v, sinks, cos, sin, window, scale, softcap, name
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
            out, lse, *_ = _Attention.apply(*arguments, with_lse)
        else:
            out, lse, _ = torch.ops.sliding_gqa.attention_forward(*arguments, with_lse, 0)
    return (out, lse) if return_lse else out


library.define(
    "sliding_gqa::attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cos, Tensor? sin, SymInt? window, float scale, "
    "float? softcap, str backend, bool with_lse, SymInt threads) -> (Tensor out, Tensor lse, Tensor[] kept)",
)
library.define(
    "sliding_gqa::attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] kept, "
    "Tensor? sinks, Tensor? cos, Tensor? sin, SymInt? window, float scale, float? softcap, str backend, "
    "SymInt threads) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
)


# threads: for how many the banded backend cuts its work, where its forward pass keeps the probabilities of each part
# for its backward pass; 0 where nothing is kept.


@library.impl("sliding_gqa::attention_forward", "default")
def _forward(q, k, v, sinks, cos, sin, window, scale, softcap, backend, with_lse, threads):
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "rope": None if cos is None else (cos, sin)}
    with torch.autocast(q.device.type, enabled=False):
        if backend == "triton":
            from .attention_fwd import attention_forward

            out, lse = attention_forward(q, k, v, window, **options, with_lse=with_lse)
            return out, lse, []
        from .banded import attention_forward

        return attention_forward(q, k, v, window, **options, with_lse=with_lse, threads=threads)


@library.register_fake("sliding_gqa::attention_forward")
def _forward_fake(q, k, v, sinks, cos, sin, window, scale, softcap, backend, with_lse, threads):
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(q.shape[:3] if with_lse else 0, dtype=wide)
    kept = []
    if threads:
        from .banded import kept_shapes

        kept = [q.new_empty(shape, dtype=wide) for shape in kept_shapes(q, k, window, cos, int(threads))]
    return torch.empty_like(q), lse, kept


@library.impl("sliding_gqa::attention_backward", "default")
def _backward(grad_out, grad_lse, q, k, v, out, lse, kept, sinks, cos, sin, window, scale, softcap, backend, threads):
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "rope": None if cos is None else (cos, sin)}
    grads, inputs = (grad_out, grad_lse), (q, k, v, out, lse)
    with torch.autocast(q.device.type, enabled=False):
        if backend == "triton":
            from .attention_bwd import attention_backward

            dq, dk, dv, dsinks = attention_backward(*grads, *inputs, window, **options)
        else:
            from .banded import attention_backward

            dq, dk, dv, dsinks = attention_backward(*grads, *inputs, window, **options, kept=kept, threads=threads)
    # an operator's result is a tensor: without sinks, one of no elements
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@library.register_fake("sliding_gqa::attention_backward")
def _backward_fake(
    grad_out, grad_lse, q, k, v, out, lse, kept, sinks, cos, sin, window, scale, softcap, backend, threads
):
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        q.new_empty(0) if sinks is None else torch.empty_like(sinks),
    )


class _Attention(torch.autograd.Function):
    # forward takes ctx: with a setup_context beside it, PyTorch inspects its signature at every call, 0.1 ms on a CPU
    @staticmethod
    def forward(ctx, q, k, v, sinks, cos, sin, window, scale, softcap, backend, with_lse):
        threads = 0
        # torch.compile has no numbers for shapes, and its backward pass computes the probabilities again
        if backend == "banded" and sinks is None and softcap is None and not torch.compiler.is_compiling():
            from .banded import keeps

            threads = torch.get_num_threads() if keeps(q, k, window) else 0
        ctx.options, ctx.with_lse = (window, scale, softcap, backend, threads), with_lse
        out, lse, kept = torch.ops.sliding_gqa.attention_forward(
            q, k, v, sinks, cos, sin, window, scale, softcap, backend, with_lse, threads
        )
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, cos, sin, out, lse, *kept)
        return out, lse, *kept

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse, *_):
        q, k, v, sinks, cos, sin, out, lse, *kept = ctx.saved_tensors
        if grad_out is None:  # only lse was used
            grad_out = torch.zeros_like(out)
        if not ctx.with_lse:  # torch.compile sends zeros for a result that was not used
            grad_lse = None
        dq, dk, dv, dsinks = torch.ops.sliding_gqa.attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, kept, sinks, cos, sin, *ctx.options
        )
        return dq, dk, dv, None if sinks is None else dsinks, *[None] * 7


def visible_pairs(T, S, window):
    """How many (query, key) pairs of one head a causal window of S positions and the last T queries leave visible."""
    if window is None or window > S:
        window = S
    # queries at positions p < window - 1 see p + 1 keys, all others see window
    short = min(T, max(0, window - 1 - (S - T)))
    return window * (T - short) + short * (S - T) + short * (short + 1) // 2


@register_flop_formula(torch.ops.sliding_gqa.attention_forward)
def _forward_flops(q_shape, k_shape, v_shape, sinks, cos, sin, window, *args, **kwargs):
    B, Hq, T, D = q_shape
    return 2 * 2 * D * B * Hq * visible_pairs(T, k_shape[2], window)


@register_flop_formula(torch.ops.sliding_gqa.attention_backward)
def _backward_flops(grad_out_shape, grad_lse, q_shape, k_shape, *args, **kwargs):
    B, Hq, T, D = q_shape
    window = args[7]  # behind v, out, lse, kept, sinks, cos, sin
    return 5 * 2 * D * B * Hq * visible_pairs(T, k_shape[2], window)


def in_layout_of(like, x):
    """x with its dimensions laid out in memory in the order that `like` has them, copied only if they are not."""
    if like.is_contiguous():
        return x.contiguous()
    order = sorted(range(like.dim()), key=lambda d: -like.stride(d))
    inverse = sorted(range(like.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)
