"""The functions of flash-attention, by its names, layout and defaults, on our kernels.

    from kernels.flash_attn import flash_attn_func          # in place of: from flash_attn import flash_attn_func

Layout (batch, length, heads, head size), taken and returned as views, without copies. window_size = (left, right)
counts keys before and after the query's own, -1 is no bound, and causal=True sets right to 0. Query i of T is at
position i + S - T of S keys ("bottom-right"). A row that sees no key is zero.

One keyword is ours: backend, that of `sliding_gqa_attention`. What we do not have raises ValueError and is named:
dropout, ALiBi, paged caches (block_table), cache_batch_idx, cache_leftpad. Not needed, and without effect:
deterministic (all results are), max_seqlen_q, max_seqlen_k. Probabilities are never stored: return_attn_probs=True
gives (out, softmax_lse, None).

Source: the docstrings of flash_attn/flash_attn_interface.py 2.8, https://github.com/Dao-AILab/flash-attention.
"""

import torch
import torch.nn.functional as F

from .attention import sliding_gqa_attention
from .checks import check_window, kind_of, whole_number
from .decode import append_to_cache, sliding_gqa_decode
from .documents import check_cu_seqlens, document_starts
from .rope import rotate_alone


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, *, backend="auto",
):  # fmt: skip
    """Attention of q (B, T, Hq, D) over k, v (B, S, Hkv, D): (B, T, Hq, D), differentiable.

    With return_attn_probs (out, softmax_lse (B, Hq, T) fp32, None). Raises ValueError for what is not supported: see
    the module, and T > S with a window that has a right side and some bound.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    q, k, v = (_heads_first(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    options = {"scale": softmax_scale, "softcap": softcap or None, "backend": backend}
    out, lse = _attend(q, k, v, *_sides(window_size, causal), options)
    return _results(out.transpose(1, 2), lse, return_attn_probs)


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, *, backend="auto",
):  # fmt: skip
    """`flash_attn_func` of q (B, T, Hq, D) and kv (B, S, 2, Hkv, D)."""
    k, v = _packed("kv", kv, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, backend=backend,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, *, backend="auto",
):  # fmt: skip
    """`flash_attn_func` of qkv (B, T, 3, H, D)."""
    q, k, v = _packed("qkv", qkv, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, backend=backend,
    )  # fmt: skip


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None, *, backend="auto",
):  # fmt: skip
    """Attention within packed sequences: q (total_q, Hq, D) over k, v (total_k, Hkv, D), (total_q, Hq, D).

    Sequence n is cu_seqlens_q[n] .. cu_seqlens_q[n + 1] - 1 of q and the same of cu_seqlens_k in k and v. With
    return_attn_probs (out, softmax_lse (Hq, total_q) fp32, None).

    Fastest if both are one tensor. Where they are two, q is laid out as k is first: time and memory are those of
    total_k queries. A sequence with more queries than keys needs a window without a right side: otherwise it is an
    error on a CPU, and on a GPU, where nothing waits for the lengths, the rows before its first key are NaN.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes, block_table=block_table)
    q, k, v = (_heads_first(name, x, packed=True) for name, x in (("q", q), ("k", k), ("v", v)))
    window, right = _sides(window_size, causal)
    options = {"scale": softmax_scale, "softcap": softcap or None, "backend": backend}
    total_q, total_k = q.shape[2], k.shape[2]
    starts = document_starts(cu_seqlens=cu_seqlens_k, length=total_k)
    if total_q == total_k and _equal(cu_seqlens_q, cu_seqlens_k):
        out, lse = _windowed(q, k, v, window, right, starts, options)
    else:
        position, nothing, unknown = _positions_among_keys(cu_seqlens_q, cu_seqlens_k, total_q, total_k, right)
        # one place more than there are keys takes the queries that see none
        spread = q.new_zeros(1, q.shape[1], total_k + 1, q.shape[3]).index_copy(2, position, q)
        out, lse = _windowed(spread[:, :, :total_k], k, v, window, right, starts, options)
        out = F.pad(out, (0, 0, 0, 1)).index_select(2, position).masked_fill(unknown[:, None], float("nan"))
        lse = F.pad(lse, (0, 1)).index_select(2, position).masked_fill(nothing, float("-inf"))
        lse = lse.masked_fill(unknown, float("nan"))
    return _results(out[0].transpose(0, 1), lse[0], return_attn_probs)


@torch.no_grad()
def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False, *, backend="auto",
):  # fmt: skip
    """Attention of q (B, T, Hq, D) over caches (B, C, Hkv, D), whose position p is slot p; not differentiable.

    k, v             (B, T_new, Hkv, D), written into the caches in place at cache_seqlens first. None: nothing is.
    cache_seqlens    tokens in each row's cache before the call: a number, or integers (B,). None is C, without k.
    rotary_cos, sin  (>= length, R / 2): with k, rotate k at its positions and q at cache_seqlens + i; where q sees all
                     keys (no causal, no window) at cache_seqlens. Pairs are neighbours if rotary_interleaved, halves
                     otherwise.
    num_splits       0 is our choice; 1 makes a row's bits independent of its batch.

    The queries are at the last T positions of cache_seqlens + T_new. Returns (B, T, Hq, D), with return_softmax_lse
    also (B, Hq, T) fp32. Raises ValueError for what is not supported, and on a CPU for tokens past the caches' end;
    on a GPU, where nothing waits for cache_seqlens, such a row is NaN and nothing of it is written.
    """
    _refuse(
        alibi_slopes=alibi_slopes, block_table=block_table, cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
    )  # fmt: skip
    q, k_cache, v_cache = (_heads_first(*named) for named in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)))
    T, C = q.shape[2], k_cache.shape[2]
    window, right = _sides(window_size, causal)
    if (k is None) != (v is None):
        raise ValueError("k and v belong together, but one of them is None")
    if k is None and rotary_cos is not None:
        raise ValueError("rotary_cos is for new keys: without k, pass a rotated q")
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens is None: it says where k is written")
    before = lengths = _lengths(cache_seqlens, q, C)
    if k is not None:
        k, v = _heads_first("k", k), _heads_first("v", v)
        lengths = before + k.shape[2]
    lengths, too_long = _within(lengths, C)
    if rotary_cos is not None:
        first, step = before[:, None], torch.arange(max(T, k.shape[2]), device=q.device)
        at_q = first.expand(-1, T) if window is None and right is None else first + step[:T]
        how = {"interleaved": rotary_interleaved, "backend": backend}
        q = rotate_alone(q, rotary_cos, rotary_sin, positions=at_q, **how)
        k = rotate_alone(k, rotary_cos, rotary_sin, positions=first + step[: k.shape[2]], **how)
    if k is not None:
        append_to_cache(k, v, k_cache, v_cache, lengths, backend=backend)

    sees_all = window is None and right is None
    options = {"scale": softmax_scale, "softcap": softcap or None, "num_splits": num_splits or None}
    parts = [
        sliding_gqa_decode(x, k_cache, v_cache, lengths - behind, seen, return_lse=True, backend=backend, **options)
        for x, seen, behind in ([(_as_heads(q), None, 0)] if sees_all else _decode_calls(q, C, window, right))
    ]
    out, lse = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    if sees_all:
        out, lse = _from_heads(out, T), _from_heads(lse, T)
    if too_long is not None:
        out, lse = (x.masked_fill(too_long.view(-1, *[1] * (x.dim() - 1)), float("nan")) for x in (out, lse))
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _refuse(dropout_p=0.0, **missing):
    if dropout_p:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0: these kernels have no dropout")
    for name, value in missing.items():
        if value is not None:
            raise ValueError(f"{name} is not supported here, expected None")


def _sides(window_size, causal):
    """(keys up to the query's own, later keys) with None for no bound, as the backends take them."""
    if not isinstance(window_size, tuple | list):
        raise ValueError(f"window_size is {window_size!r}, expected a pair (left, right)")
    window, right = check_window(window_size)
    return window, 0 if causal else right


def _heads_first(name, x, packed=False):
    """A view (B, H, T, D) of x (B, T, H, D), or of packed x (T, H, D)."""
    if not isinstance(x, torch.Tensor) or x.dim() != 4 - packed:
        shape = "(total, heads, head size)" if packed else "(batch, length, heads, head size)"
        raise ValueError(f"{name} is {kind_of(x)}, expected a tensor {shape}")
    return (x[None] if packed else x).transpose(1, 2)


def _packed(name, x, parts):
    if not isinstance(x, torch.Tensor) or x.dim() != 5 or x.shape[2] != parts:
        raise ValueError(f"{name} is {kind_of(x)}, expected a tensor (batch, length, {parts}, heads, head size)")
    return x.unbind(2)


def _results(out, lse, with_lse):
    return (out, lse, None) if with_lse else out


def _windowed(q, k, v, window, right, starts, options):
    sides = (-1 if window is None else window - 1, right)
    return sliding_gqa_attention(q, k, v, sides, starts=starts, return_lse=True, **options)


def _attend(q, k, v, window, right, options):
    """(out, lse) of q (B, Hq, T, D) over k, v (B, Hkv, S, D) for any T and S."""
    T, S = q.shape[2], k.shape[2]
    if T == S or (T < S and right == 0):
        return _windowed(q, k, v, window, right, None, options)
    if window is None and right is None:
        out, lse = _windowed(_as_heads(q), k, v, None, 0, None, options)
        return _from_heads(out, T), _from_heads(lse, T)
    if T < S:
        out, lse = _windowed(F.pad(q, (0, 0, S - T, 0)), k, v, window, right, None, options)
        return out[:, :, S - T :], lse[:, :, S - T :]
    if right == 0:  # the first T - S queries come before all keys
        out, lse = _windowed(q[:, :, T - S :], k, v, window, 0, None, options)
        return F.pad(out, (0, 0, T - S, 0)), F.pad(lse, (T - S, 0), value=float("-inf"))
    raise ValueError(f"q has {T} positions, more than k's {S}: then window_size needs no bound, or no right side")


def _as_heads(q):
    """Queries that see every key, as heads of one query: (B, Hq, T, D) to (B, Hq * rows, 1, D), rows >= T."""
    T = q.shape[2]
    rows = -(-T // 64) * 64 if q.is_cuda else T  # heads are packed into the kernels' tiles by powers of two
    return F.pad(q, (0, 0, 0, rows - T)).flatten(1, 2)[:, :, None]


def _from_heads(x, T):
    """The result of `_as_heads` queries (B, Hq * rows, 1, ...) as (B, Hq, T, ...)."""
    return x.unflatten(1, (-1, -(-T // 64) * 64 if x.is_cuda else T)).squeeze(3)[:, :, :T]


def _decode_calls(q, C, window, right):
    """(queries, window, positions behind the newest token) of each call of `sliding_gqa_decode` that is needed."""
    T = q.shape[2]
    if right == 0 or T <= 1:
        # a ring must hold window + T - 1 slots, and these caches, which never wrap, need not
        most = T if window is None or window >= C else C - window + 1
        return [
            (q[:, :, i : i + most], None if window is None or window >= C else window, max(0, T - i - most))
            for i in range(0, max(T, 1), max(most, 1))
        ]
    calls = []
    for i in range(T):
        newer = T - 1 - i
        later = newer if right is None else min(right, newer)
        seen = None if window is None or window + later >= C else window + later
        calls.append((q[:, :, i : i + 1], seen, newer - later))
    return calls


def _lengths(cache_seqlens, q, C):
    """cache_seqlens as a tensor (B,)."""
    if isinstance(cache_seqlens, torch.Tensor):
        if cache_seqlens.shape != q.shape[:1] or cache_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cache_seqlens is {kind_of(cache_seqlens)}, expected a number or integers {(len(q),)}")
        return cache_seqlens
    number = C if cache_seqlens is None else whole_number("cache_seqlens", cache_seqlens)
    return torch.full(q.shape[:1], number, dtype=torch.int32, device=q.device)


def _within(lengths, C):
    """(lengths, too_long): rows that do not fit into C slots raise on a CPU, and have length 0 and a mark elsewhere."""
    if lengths.is_cpu and not torch.compiler.is_compiling():
        if len(lengths) and int(lengths.max()) > C:
            raise ValueError(f"the caches have {C} slots, but cache_seqlens and k make {int(lengths.max())} tokens")
        return lengths, None
    return lengths * (lengths <= C), lengths > C


def _equal(a, b):
    """Whether two cu_seqlens are the same, as far as that can be told without waiting for a GPU."""
    if a is b or torch.compiler.is_compiling():
        return a is b
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or (a.is_cpu and b.is_cpu and torch.equal(a, b)))


def _positions_among_keys(cu_q, cu_k, total_q, total_k, right):
    """(position, nothing, unknown) of each packed query: its place among the packed keys, total_k for none.

    nothing marks the queries that see no key, unknown those that would see some but have no place among the keys.
    """
    if len(cu_q) != len(cu_k) or len(cu_q) < 2:
        raise ValueError(f"cu_seqlens_q has {len(cu_q)} numbers, cu_seqlens_k {len(cu_k)}, expected as many, 2 or more")
    check_cu_seqlens(cu_q)
    query = torch.arange(total_q, device=cu_q.device)
    sequence = torch.searchsorted(cu_q.contiguous(), query, right=True) - 1
    outside = (sequence < 0) | (sequence > len(cu_q) - 2)
    sequence = sequence.clamp(0, len(cu_q) - 2)
    first, end = cu_k[sequence], cu_k[sequence + 1]
    position = end - cu_q[sequence + 1] + query
    nothing = outside | (position < first)
    unknown = nothing & ~outside & (first < end) if right != 0 else torch.zeros_like(nothing)
    if unknown.is_cpu and not torch.compiler.is_compiling() and bool(unknown.any()):
        number = int(sequence[unknown][0])
        raise ValueError(
            f"sequence {number} has more queries than keys: then window_size needs no right side, or causal=True"
        )
    return position.masked_fill(nothing, total_k).long(), nothing, unknown
