"""`sliding_gqa_attention`: its checks, the choice of a backend, and the operators that PyTorch sees.

Forward and backward are an operator each, opaque to torch.compile, with the backend as an argument: fake
implementations, the FLOP formula and autograd stand here once, and a backend is two functions.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from .backend import resolve_backend
from .rope import check_tables


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
              S-T .. S-1 and 0 .. S-1; the gradients are those of the unrotated q and k.
    backend   "auto" (Triton on a GPU, banded elsewhere), or "triton", "banded", "reference" and no other.

    Returns (B, Hq, T, D) in q's dtype and memory layout, differentiable in q, k, v and sinks; with return_lse also the
    natural log of the sum of exponentials, (B, Hq, T) fp32, sinks included. Dropout is not offered. Under autocast the
    inputs are cast to its dtype. Raises ValueError for shapes, dtypes or strides it cannot take.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_heads(q, k, v, "k", "v")
    check_options(q, window, scale, softcap, sinks)
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} positions, more than k's {k.shape[2]}: queries are the last T of S positions"
        )
    if rope is not None:
        check_tables(*rope, k.shape[2], q.shape[3])
    name, _ = resolve_backend(backend, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if name == "reference":
        from . import reference

        out, lse = reference.attention(q, k, v, window, scale=scale, softcap=softcap, sinks=sinks, rope=rope)
        out = in_layout_of(q, out)
    else:
        cos, sin = (None, None) if rope is None else rope
        # the banded backward needs no lse, so it is only made where it is asked for
        with_lse = return_lse or sinks is not None or name != "banded"
        arguments = q, k, v, sinks, cos, sin, window, scale, softcap, name
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
            out, lse, *_ = _Attention.apply(*arguments, with_lse)
        else:
            out, lse, _ = torch.ops.sliding_gqa.attention_forward(*arguments, with_lse, 0)
    return (out, lse) if return_lse else out


torch.library.define(
    "sliding_gqa::attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cos, Tensor? sin, SymInt? window, float scale, "
    "float? softcap, str backend, bool with_lse, SymInt threads) -> (Tensor out, Tensor lse, Tensor[] kept)",
)
torch.library.define(
    "sliding_gqa::attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] kept, "
    "Tensor? sinks, Tensor? cos, Tensor? sin, SymInt? window, float scale, float? softcap, str backend, "
    "SymInt threads) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
)


# threads: for how many the banded backend cuts its work, where its forward pass keeps the probabilities of each part
# for its backward pass; 0 where nothing is kept.


@torch.library.impl("sliding_gqa::attention_forward", "default")
def _forward(q, k, v, sinks, cos, sin, window, scale, softcap, backend, with_lse, threads):
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "rope": None if cos is None else (cos, sin)}
    with torch.autocast(q.device.type, enabled=False):
        if backend == "triton":
            from .attention_fwd import attention_forward

            out, lse = attention_forward(q, k, v, window, **options, with_lse=with_lse)
            return out, lse, []
        from .banded import attention_forward

        return attention_forward(q, k, v, window, **options, with_lse=with_lse, threads=threads)


@torch.library.register_fake("sliding_gqa::attention_forward")
def _forward_fake(q, k, v, sinks, cos, sin, window, scale, softcap, backend, with_lse, threads):
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(q.shape[:3] if with_lse else 0, dtype=wide)
    kept = []
    if threads:
        from .banded import kept_shapes

        kept = [q.new_empty(shape, dtype=wide) for shape in kept_shapes(q, k, window, cos, int(threads))]
    return torch.empty_like(q), lse, kept


@torch.library.impl("sliding_gqa::attention_backward", "default")
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


@torch.library.register_fake("sliding_gqa::attention_backward")
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


def check_heads(q, k, v, k_name, v_name):
    """Raise ValueError unless q (B, Hq, T, D) and k, v (B, Hkv, S, D) belong together."""
    for name, x in (("q", q), (k_name, k), (v_name, v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected 4 dimensions (batch, heads, length, head size)"
            )
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} has last stride {x.stride(-1)}, expected 1: call .contiguous() on it")
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}, expected a floating one")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, expected q's {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, expected q's {q.device}")
    if k.shape != v.shape:
        raise ValueError(f"{v_name} has shape {tuple(v.shape)}, expected {k_name}'s {tuple(k.shape)}")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"{k_name} has batch size {k.shape[0]}, expected q's {q.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"{k_name} has head size {k.shape[3]}, expected q's {q.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{k_name} has {k.shape[1]} heads, which do not divide q's {q.shape[1]} "
            "(grouped KV heads need Hq % Hkv == 0)"
        )


def check_options(q, window, scale, softcap, sinks):
    """Raise ValueError unless window, scale, softcap and sinks mean something for q (B, Hq, T, D)."""
    if isinstance(window, tuple | list):
        raise ValueError(
            f"window is {window!r}, expected one number: flash-attn's (left, right) = (W - 1, 0) is window=W"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"window is {window}, expected None or at least 1, the query's own key included (flash-attn's (W - 1, 0))"
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"scale is {scale}, expected a positive number")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, expected None or a positive number")
    if sinks is not None and (tuple(sinks.shape) != (q.shape[1],) or not sinks.is_floating_point()):
        raise ValueError(
            f"sinks is {sinks.dtype} {tuple(sinks.shape)}, expected one float for each of q's {q.shape[1]} heads"
        )
