"""Decoding with a ring-buffer cache: `append_to_cache` writes the newest tokens, `sliding_gqa_decode` attends to them.

    k_cache, v_cache (B, Hkv, C, D)      position p lives in slot p % C
    lengths (B,) int32 or int64          tokens of each row so far, those of this call included; below 2**31

C=4, window=3, T_new=1, a row that has seen 6 tokens:   slot      0  1  2  3
                                                        position  4  5  2  3      the query at 5 sees 3, 4, 5

Memory and time per token do not depend on how much was generated. Positions are read from `lengths` on the device, so
nothing here waits for it. Rows of different lengths share a call by left padding: a token whose position
lengths - T_new + i is negative is padding, is not written, and its query returns zeros.

int8 rings take half the memory of 16 bits: k_scales, v_scales (B, Hkv, C) fp32 are then the scales of what is in each
slot. The formula is in kernels/int8.py.
"""

import torch
from torch import library

from .backend import backend_module, resolve_backend
from .checks import (
    check_heads,
    check_options,
    check_prefix,
    check_prefix_distance,
    check_reach,
    check_rope,
    check_scales,
    check_tensor,
    check_window,
    kind_of,
    whole_number,
)
from .int8 import dequantized, quantized
from .namespace import NAMESPACE, OPERATORS
from .prefix import as_if_near, merge_prefix
from .rope import rotate_alone


def append_to_cache(
    k, v, k_cache, v_cache, lengths, *, prefix=0, rope=None, k_scales=None, v_scales=None, backend="auto"
):
    """Write k, v (B, Hkv, T_new, D) into the rings at positions lengths - T_new .. lengths - 1, in place.

    lengths (B,) int32 or int64, on k's device, counts the tokens of each row, with those of this call.
    rope=(cos, sin) rotates k for its positions first (half-split); the tables must reach the largest of them. Not
    differentiable. Returns None.

    prefix   the first positions, which `sliding_gqa_decode` always sees: position p < prefix has slot p for ever, and
             the other C - prefix slots are a ring for all later positions.
    k_scales, v_scales
             (B, Hkv, C) fp32, for rings of int8: k (after rotation) and v are quantised into both, in place.

    Raises ValueError for shapes, dtypes or devices that do not fit, for T_new > C, for rings that share an element
    (they may be parts of one buffer), and for a position past the tables. On a GPU, where nothing waits for `lengths`,
    such a position's key is NaN instead.
    """
    check_heads(k, k_cache, v_cache, "k_cache", "v_cache", check_scales(k_scales, v_scales, k_cache, v_cache))
    check_tensor("v", v, k, "k")
    lengths = _check_ring(k, k_cache, lengths)
    prefix = _check_prefix_slots(prefix, k_cache)
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}, expected k's {tuple(k.shape)}")
    if k.shape[1] != k_cache.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads, expected the {k_cache.shape[1]} of k_cache")
    if k.shape[2] > k_cache.shape[2]:
        raise ValueError(
            f"k has {k.shape[2]} tokens, more than the {k_cache.shape[2]} slots of k_cache: append in parts"
        )
    rings = {"k_cache": k_cache, "v_cache": v_cache, "k_scales": k_scales, "v_scales": v_scales}
    for name, ring in rings.items():
        if (
            ring is not None
            and not ring.is_contiguous()
            and any(n > 1 and not step for n, step in zip(ring.shape, ring.stride(), strict=True))
        ):
            raise ValueError(f"{name} is expanded, so that its rows share memory: call .contiguous() on it")
    if k_cache is v_cache and k_cache.numel():
        raise ValueError(_shared("cache"))
    if k_scales is not None and k_scales is v_scales and k_scales.numel():
        raise ValueError(_shared("scales"))
    cos, sin = check_rope(rope, 0, k, "k")
    name, _ = resolve_backend(backend, k.device)
    if prefix:
        behind, kept = _cut(prefix, k_cache, v_cache, k_scales, v_scales)
        later = None if cos is None else (cos[prefix:], sin[prefix:])  # position p is p - prefix behind it
        append_to_cache(k, v, *behind[:2], lengths - prefix, rope=later, **_scales(behind), backend=name)
        return _append_prefix(k, v, kept, lengths, rope, name)
    with torch.no_grad():
        OPERATORS.append(k, v, k_cache, v_cache, lengths, cos, sin, name, k_scales, v_scales)


def sliding_gqa_decode(
    q, k_cache, v_cache, lengths, window=None, *, prefix=0, prefix_distance=None, scale=None, softcap=None, sinks=None,
    rope=None, k_scales=None, v_scales=None, return_lse=False, num_splits=None, backend="auto",
):  # fmt: skip
    """Attention of the newest tokens q (B, Hq, T_new, D) over the rings that `append_to_cache` filled.

    lengths are those of `append_to_cache`. Query i of row b is at position lengths[b] - T_new + i and sees the `window`
    newest positions up to its own. The other arguments are those of `sliding_gqa_attention`; rope rotates q only, since
    the keys were rotated when they were written. Slots never written are never read. Not differentiable. Returns
    (B, Hq, T_new, D) in q's dtype and memory layout; with return_lse also (B, Hq, T_new) fp32, -inf for padding.

    prefix       that of `append_to_cache`: every query sees these positions, up to its own, besides its window.
    prefix_distance
                 that of `sliding_gqa_attention`: with rope, the largest distance to the prefix that a query shows.
    k_scales, v_scales
                 those of `append_to_cache`, for rings of int8.
    num_splits   into how many parts Triton cuts the keys of a row; None for what suits the batch, the window and the
                 GPU. The other backends cut nothing. 1: the bits of a row do not depend on the other rows of its
                 batch, and banded takes the rows one by one for that.

    Raises ValueError for shapes, dtypes or devices that do not fit, for a num_splits that is no whole number of at
    least 1, and for a ring that is too small: C must be at least window + T_new - 1. What only `lengths` tell is an
    error too, on a CPU: a row that is longer than C without a window, and a position past the tables of rope. On a GPU,
    where nothing waits for `lengths`, the result of that row, or of that position, is NaN.
    """
    check_heads(q, k_cache, v_cache, "k_cache", "v_cache", check_scales(k_scales, v_scales, k_cache, v_cache))
    window, right = check_window(window)
    if right != 0:
        raise ValueError("window's right side is not 0: a cache holds no keys after the newest token")
    scale, softcap = check_options(q, scale, softcap, sinks)
    lengths = _check_ring(q, k_cache, lengths)
    prefix = _check_prefix_slots(prefix, k_cache)
    T, C = q.shape[2], k_cache.shape[2] - prefix
    if window is not None and C < window + T - 1:
        besides = " besides the prefix's" if prefix else ""
        raise ValueError(f"k_cache has {C} slots{besides}, expected at least window + T_new - 1 = {window + T - 1}")
    prefix_distance = check_prefix_distance(prefix_distance, prefix, window, rope)
    cos, sin = check_rope(rope, 0, q)
    if num_splits is not None and (num_splits := whole_number("num_splits", num_splits)) < 1:
        raise ValueError(f"num_splits is {num_splits}, expected None or a whole number of at least 1")
    name, _ = resolve_backend(backend, q.device, q.dtype, q.shape[3])
    if prefix:
        options = {"scale": scale, "softcap": softcap, "num_splits": num_splits, "backend": name}
        rings, of_prefix = (k_cache, v_cache, k_scales, v_scales), (prefix, prefix_distance)
        with torch.no_grad():
            out, lse = _decode_with_prefix(q, rings, lengths, window, *of_prefix, sinks, rope, options)
        return (out, lse) if return_lse else out
    with torch.no_grad():
        out, lse = OPERATORS.decode(
            q, k_cache, v_cache, lengths, sinks, cos, sin, window, scale, softcap, num_splits, name, return_lse,
            k_scales, v_scales,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_prefix_slots(prefix, k_cache):
    prefix = check_prefix(prefix)
    if prefix and prefix >= k_cache.shape[2]:
        raise ValueError(f"prefix is {prefix}, but k_cache has {k_cache.shape[2]} slots: the ring behind it needs some")
    return prefix


def _cut(prefix, *rings):
    """The rings (..., C, ...) behind the prefix's slots, and those slots; of None, None."""
    behind, kept = (slice(prefix, None), slice(prefix))
    return [[None if x is None else x[:, :, part] for x in rings] for part in (behind, kept)]


def _scales(rings):
    """The scales of (k_cache, v_cache, k_scales, v_scales) as keyword arguments."""
    return {"k_scales": rings[2], "v_scales": rings[3]}


@torch.no_grad()
def _append_prefix(k, v, kept, lengths, rope, backend):
    """Write the tokens whose position is one of the prefix, slot for position; kept are its slots and their scales."""
    T, first, slots = k.shape[2], lengths - k.shape[2], kept[0].shape[2]
    if k.numel() == 0 or (lengths.is_cpu and not torch.compiler.is_compiling() and int(first.amin()) >= slots):
        return
    if rope is not None:
        slots = min(len(rope[0]), slots)
    token = torch.arange(slots, device=k.device) - first[:, None]  # (B, P): of this call, which slot gets it
    written = ((token >= 0) & (token < T))[:, None, :, None]
    index = token.clamp(0, T - 1).long()[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    new_k, new_v = k.gather(2, index), v.gather(2, index)
    if rope is not None:
        new_k = rotate_alone(new_k, *rope, backend=backend)
    new = new_k, new_v
    if kept[2] is not None:
        new, scales = zip(*map(quantized, new), strict=True)
        new += tuple(x[..., None] for x in scales)
        kept = [*kept[:2], *(x[..., None] for x in kept[2:])]
    for ring, x in zip(kept, new, strict=False):
        ring[:, :, :slots].copy_(torch.where(written, x, ring[:, :, :slots]))


def _decode_with_prefix(q, rings, lengths, window, prefix, distance, sinks, rope, options):
    """rings (k_cache, v_cache, k_scales, v_scales)."""
    T, C, backend = q.shape[2], rings[0].shape[2], options["backend"]
    position = lengths[:, None] - T + torch.arange(T, device=q.device)  # (B, T)
    if distance is not None and lengths.is_cpu and not torch.compiler.is_compiling() and (position <= distance).all():
        distance = None
    far = None
    if distance is not None:
        far = rotate_alone(q, *rope, positions=as_if_near(position, distance), backend=backend)
    if rope is not None:
        q = rotate_alone(q, *rope, positions=position.clamp(min=0), backend=backend)
    if T == 1 and far is None and C - prefix == window:
        # every written slot is seen, and a slot is its position until all are written: attention without a window
        lengths = lengths.clamp(max=C)
        options |= {"sinks": sinks, "return_lse": True, **_scales(rings)}
        out, lse = sliding_gqa_decode(q, *rings[:2], lengths, **options)
        return out, lse.masked_fill((position < 0)[:, None], float("-inf"))
    behind, (k, v, *scales) = _cut(prefix, *rings)
    out, lse = sliding_gqa_decode(
        q, *behind[:2], lengths - prefix, window, return_lse=True, **_scales(behind), **options
    )
    if scales[0] is not None:
        k, v = (dequantized(x, scale, q.dtype) for x, scale in zip((k, v), scales, strict=True))
    slot = torch.arange(prefix, device=q.device)
    v = torch.where((slot < lengths[:, None])[:, None, :, None], v, 0)  # NaN where never written
    seen = slot <= position[..., None]
    scale, softcap = options["scale"], options["softcap"]
    q = q if far is None else far
    out, lse = merge_prefix(out, lse, q, k, v, seen, scale=scale, softcap=softcap, sinks=sinks)
    padding = (position < 0)[:, None]
    return out.masked_fill(padding[..., None], 0.0), lse.masked_fill(padding, float("-inf"))


def _check_ring(x, k_cache, lengths):
    """lengths as int32. Raises ValueError unless they count the tokens of x's rows, and the ring has slots."""
    expected = f"int32 or int64 ({x.shape[0]},) on {x.device}"
    if not isinstance(lengths, torch.Tensor):
        raise ValueError(f"lengths is {kind_of(lengths)}, expected a tensor {expected}")
    dtype = lengths.dtype
    if dtype not in (torch.int32, torch.int64) or tuple(lengths.shape) != (x.shape[0],) or lengths.device != x.device:
        raise ValueError(f"lengths is {dtype} {tuple(lengths.shape)} on {lengths.device}, expected {expected}")
    if k_cache.shape[2] == 0:
        raise ValueError("k_cache has no slots")
    return lengths if dtype == torch.int32 else lengths.to(torch.int32)


def _shared(kind):
    return f"k_{kind} and v_{kind} share memory, expected one tensor for the keys and another for the values"


def _share_memory(a, b):
    """Whether two tensors of one dtype and device have an element in common. Parts of one buffer need not."""
    gap = b.data_ptr() - a.data_ptr()
    if not a.numel() or ((gap >= a.nbytes or -gap >= b.nbytes) and a.is_contiguous() and b.is_contiguous()):
        return False
    # Elements i and j are the same where i . a.stride() - j . b.stride() is the gap. With j counted from the end, all
    # terms are positive: are there so many steps of each size that their sum is the target?
    target, most = gap // a.element_size(), {}
    for x in (a, b):
        for n, step in zip(x.shape, x.stride(), strict=True):
            most[step] = most.get(step, 0) + n - 1
            target += (n - 1) * step if x is b else 0
    return _is_sum(target, sorted(((step, n) for step, n in most.items() if n), reverse=True))


def _is_sum(target, steps):
    """Whether target is the sum of multiples n * step, 0 <= n <= most, of steps [(step, most)], the largest first."""
    if not steps:
        return target == 0
    (step, most), *smaller = steps
    fewest = max(0, -((sum(size * n for size, n in smaller) - target) // step))
    return any(_is_sum(target - n * step, smaller) for n in range(fewest, min(most, target // step) + 1))


def _check_lengths(lengths, slots, cos, backend):
    """Check the values of lengths, where the host reads them. slots: of a ring that must hold all tokens, or None."""
    if (slots is None and cos is None) or not (lengths.is_cpu or backend_module(backend).READS_LENGTHS):
        return
    longest = max(lengths.tolist(), default=0)
    if slots is not None and longest > slots:
        raise ValueError(
            f"k_cache has {slots} slots, fewer than the longest row's {longest} tokens: "
            "without a window it must hold all of them"
        )
    if cos is not None and longest > cos.shape[0]:
        check_reach(cos.shape[0], longest - 1)


library.define(
    f"{NAMESPACE}::append",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor? cos, Tensor? sin, "
    "str backend, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()",
)
library.define(
    f"{NAMESPACE}::decode",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? sinks, Tensor? cos, Tensor? sin, "
    "SymInt? window, float scale, float? softcap, SymInt? num_splits, str backend, bool with_lse, "
    "Tensor? k_scales=None, Tensor? v_scales=None) -> (Tensor out, Tensor lse)",
)


def _append(k, v, k_cache, v_cache, lengths, cos, sin, backend, k_scales=None, v_scales=None):
    _check_lengths(lengths, None, cos, backend)
    if _share_memory(k_cache, v_cache):
        raise ValueError(_shared("cache"))
    scales = None
    if k_scales is not None:
        scales = k_scales, v_scales
        if _share_memory(*scales):
            raise ValueError(_shared("scales"))
    rope = None if cos is None else (cos, sin)
    backend_module(backend).append(k, v, k_cache, v_cache, lengths, rope=rope, scales=scales)


library.impl(f"{NAMESPACE}::append", "default", _append)


@library.register_fake(f"{NAMESPACE}::append")
def _append_fake(k, v, k_cache, v_cache, lengths, cos, sin, backend, k_scales=None, v_scales=None):
    return None


def _decode(
    q, k_cache, v_cache, lengths, sinks, cos, sin, window, scale, softcap, num_splits, backend, with_lse,
    k_scales=None, v_scales=None,
):  # fmt: skip
    _check_lengths(lengths, k_cache.shape[2] if window is None else None, cos, backend)
    rope = None if cos is None else (cos, sin)
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "rope": rope, "num_splits": num_splits}
    options["scales"] = None if k_scales is None else (k_scales, v_scales)
    lse = _new_lse(q, with_lse)
    if with_lse:
        options["lse"] = lse
    out = backend_module(backend).attend_to_cache(q, k_cache, v_cache, lengths, window, **options)
    return out if q.is_contiguous() and out.is_contiguous() else torch.empty_like(q).copy_(out), lse


def _new_lse(q, with_lse):
    return q.new_empty(q.shape[:3] if with_lse else 0, dtype=torch.promote_types(q.dtype, torch.float32))


library.impl(f"{NAMESPACE}::decode", "default", _decode)


@library.register_fake(f"{NAMESPACE}::decode")
def _decode_fake(
    q, k_cache, v_cache, lengths, sinks, cos, sin, window, scale, softcap, num_splits, backend, with_lse,
    k_scales=None, v_scales=None,
):  # fmt: skip
    return torch.empty_like(q), _new_lse(q, with_lse)
