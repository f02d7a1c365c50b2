"""The specification: attention, rotation and decoding written as their definitions, O(T * S), in any float dtype.

    s_ij = scale * q_i . k_j                                  over the keys j that query i sees: i - window < j <= i
    s_ij = softcap * tanh(s_ij / softcap)                     if there is a softcap (Gemma 2, arXiv:2408.00118)
    lse_i = log(sum_j exp(s_ij) + exp(sink_h))                the sink of head h, if any (gpt-oss, arXiv:2508.10925)
    o_i = sum_j exp(s_ij - lse_i) v_j

Everything is computed in fp32, or fp64 for fp64 inputs, and rounded once at the end. Tests hold the other backends to
this file and this file to PyTorch's SDPA; nothing here is meant to be fast, and no kernel imports it.
"""

import torch


def visible(num_queries, num_keys, window=None, device=None):
    """(T, S) bool: which keys each query sees. Queries are the last T of S positions."""
    q_pos = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    k_pos = torch.arange(num_keys, device=device)[None, :]
    seen = k_pos <= q_pos
    return seen if window is None else seen & (k_pos > q_pos - window)


def rotate(x, cos, sin, interleaved=False):
    """x (..., T, D) with each pair of its first R elements turned by its angle; cos, sin (..., T, R / 2), R <= D.

    Pair i is (x[i], x[i + R/2]), or (x[2i], x[2i + 1]) if interleaved. RoFormer, arXiv:2104.09864, eq. 34.
    """
    half = cos.shape[-1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b, cos, sin = x[..., first].to(wide), x[..., second].to(wide), cos.to(wide), sin.to(wide)
    out = x.to(wide).clone()
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out.to(x.dtype)


def attention(q, k, v, window=None, *, scale, softcap=None, sinks=None, rope=None):
    """(out, lse) of `sliding_gqa_attention`, by its definition."""
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    qw, kw, vw = q.to(wide), k.to(wide), v.to(wide)
    if rope is not None:
        cos, sin = rope
        qw = rotate(qw, cos[S - T : S], sin[S - T : S])
        kw = rotate(kw, cos[:S], sin[:S])
    kw, vw = kw.repeat_interleave(group, dim=1), vw.repeat_interleave(group, dim=1)
    return _softmax_average(qw @ kw.mT, vw, visible(T, S, window, q.device), scale, softcap, sinks, q.dtype)


def _softmax_average(scores, v, seen, scale, softcap, sinks, dtype):
    """Scale, cap, mask and normalise scores (..., H, T, S), then average v (..., H, S, D)."""
    scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:  # one more column, which has no value
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        lse = torch.cat([scores, column], dim=-1).logsumexp(-1)
    else:
        lse = scores.logsumexp(-1)
    # a row that sees nothing has lse = -inf and gives zeros
    p = torch.exp(scores - lse[..., None]).masked_fill(~seen, 0.0)
    return (p @ v).to(dtype), lse.to(torch.promote_types(dtype, torch.float32))


def append(k, v, k_cache, v_cache, lengths, *, rope=None):
    """`append_to_cache`, one row and one token at a time."""
    T, C = k.shape[2], k_cache.shape[2]
    for b, length in enumerate(lengths.tolist()):
        for i in range(T):
            pos = length - T + i
            if pos >= 0:
                token = k[b, :, i]
                if rope is not None:
                    token = rotate(token, rope[0][pos], rope[1][pos])
                k_cache[b, :, pos % C] = token
                v_cache[b, :, pos % C] = v[b, :, i]


def decode(q, k_cache, v_cache, lengths, window=None, *, scale, softcap=None, sinks=None, rope=None):
    """`sliding_gqa_decode`, one row and one query at a time, reading exactly the slots that the query sees."""
    T, C = q.shape[2], k_cache.shape[2]
    group = q.shape[1] // k_cache.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        for i in range(T):
            pos = length - T + i
            if pos < 0:
                continue
            token = q[b, :, i : i + 1].to(wide)
            if rope is not None:
                token = rotate(token, rope[0][pos : pos + 1], rope[1][pos : pos + 1])
            first = 0 if window is None else max(0, pos - window + 1)
            slots = torch.arange(first, pos + 1, device=q.device) % C
            keys = k_cache[b][:, slots].to(wide).repeat_interleave(group, dim=0)
            values = v_cache[b][:, slots].to(wide).repeat_interleave(group, dim=0)
            seen = torch.ones(1, len(slots), dtype=torch.bool, device=q.device)
            out[b, :, i : i + 1] = _softmax_average(token @ keys.mT, values, seen, scale, softcap, sinks, q.dtype)[0]
    return out
