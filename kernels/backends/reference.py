"""The specification: attention, rotation and decoding written as their definitions, O(T * S), in any float dtype.

    s_ij = scale * q_i . k_j            over the keys j that query i sees: i - window < j <= i + right, in its document
    s_ij = softcap * tanh(s_ij / softcap)                     if there is a softcap (Gemma 2, arXiv:2408.00118)
    lse_i = log(sum_j exp(s_ij) + exp(sink_h))                the sink of head h, if any (gpt-oss, arXiv:2508.10925)
    o_i = sum_j exp(s_ij - lse_i) v_j

Everything is computed in fp32, or fp64 for fp64 inputs, and rounded once at the end. Tests hold the other backends to
this file and this file to PyTorch's SDPA; nothing here is meant to be fast, and no kernel imports it.
"""

import torch

from ..band import visible_mask
from ..int8 import dequantized, quantized

READS_LENGTHS = True
BACKWARD_READS_LSE = False


def why_not(device, dtype=None, head_dim=None):
    """It runs everywhere: None."""
    return None


def rotated(x, cos, sin, interleaved=False):
    """x (..., T, D) with each pair of its first R elements rotated by its angle; cos, sin (..., T, R / 2), R <= D.

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


def rotate(q, k, cos, sin, *, positions=0, interleaved=False, inverse=False):
    """`apply_rope`: (q, k) rotated by the rows `positions` of the tables, an offset or integers (T,) or (B, T)."""
    if isinstance(positions, torch.Tensor):
        row = positions.clamp(0, cos.shape[0] - 1)
        # NaN for positions that the tables lack
        cos, sin = (table[row].masked_fill((row != positions)[..., None], float("nan")) for table in (cos, sin))
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, R / 2)
    else:
        cos, sin = cos[positions : positions + q.shape[2]], sin[positions : positions + q.shape[2]]
    sin = -sin if inverse else sin
    return rotated(q, cos, sin, interleaved), rotated(k, cos, sin, interleaved)


def norm_rotate(q, k, norm, cos, sin, *, positions=0, interleaved=False):
    """`apply_rope` with norm = (q_weight, k_weight, eps): q and k normalised, then rotated, rounded once.

    x_i / sqrt(mean_j x_j^2 + eps) * weight_i, over the whole head (RMSNorm, arXiv:1910.07467).
    """
    *weights, eps = norm
    wide = (_normed(x, weight, eps)[0] for x, weight in zip((q, k), weights, strict=True))
    return tuple(x.to(q.dtype) for x in rotate(*wide, cos, sin, positions=positions, interleaved=interleaved))


def _normed(x, weight, eps):
    """(x with norm and weight, x with norm only, 1 / its root mean square), in fp32 or fp64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * inverse if weight is None else x * inverse * weight.to(x.dtype), x * inverse, inverse


def norm_rotate_backward(grad_q, grad_k, q, k, norm, cos, sin, *, positions=0, interleaved=False):
    """(dq, dk, gradients of the two weights or None), by the chain rule, each rounded once.

    n = x / rms      g = the gradient, rotated back      dweight = sum of g n over batch, heads and positions
    dx = (g weight - n mean(g weight n)) / rms
    """
    *weights, eps = norm
    wide = torch.promote_types(q.dtype, torch.float32)
    turned = rotate(grad_q.to(wide), grad_k.to(wide), cos, sin, positions=positions, interleaved=interleaved,
                    inverse=True)  # fmt: skip
    grads, of_weights = [], []
    for g, x, weight in zip(turned, (q, k), weights, strict=True):
        _, n, inverse = _normed(x, None, eps)
        of_weights.append(None if weight is None else (g * n).sum((0, 1, 2)).to(weight.dtype))
        g = g if weight is None else g * weight.to(wide)
        grads.append(torch.empty_like(x).copy_((g - n * (g * n).mean(-1, keepdim=True)) * inverse))
    return *grads, *of_weights


def attention(q, k, v, window=None, *, scale, right=0, starts=None, softcap=None, sinks=None, rope=None):
    """(out, lse) of `sliding_gqa_attention`, by its definition; differentiable by PyTorch."""
    qw, kw, vw = _widened(q, k, v, rope)
    seen = visible_mask(q.shape[2], k.shape[2], window, q.device, right=right, starts=starts)
    scores = _scores(qw @ kw.mT, seen, scale, softcap)
    return _average(scores, vw, _lse(scores, sinks), q.dtype)


def _widened(q, k, v, rope):
    """q, k, v in fp32 or fp64, rotated, and with a KV head for every query head."""
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    if rope is not None:
        cos, sin = rope
        q, k = rotated(q, cos[S - T : S], sin[S - T : S]), rotated(k, cos[:S], sin[:S])
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # head i reads KV head i // group
    return q, k, v


def _scores(products, seen, scale, softcap):
    """Scaled, capped and masked scores (..., T, S)."""
    scores = products * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, float("-inf"))


def _lse(scores, sinks):
    """log(sum(exp(scores))) of each row (..., H, T), with the sink of its head as one more score."""
    if sinks is None:
        return scores.logsumexp(-1)
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).logsumexp(-1)


def _probabilities(scores, lse):
    # a row that sees nothing has lse = -inf and gives zeros
    return torch.exp(scores - lse).masked_fill(scores == float("-inf"), 0.0)


def _average(scores, v, lse, dtype):
    out = _probabilities(scores, lse[..., None]) @ v
    return out.to(dtype), lse.to(torch.promote_types(dtype, torch.float32))


def attend(q, k, v, window=None, *, with_lse=True, **options):
    """(out, lse) in the memory layout that every backend gives them."""
    out, lse = attention(q, k, v, window, **options)
    return torch.empty_like(q).copy_(out), lse.contiguous() if with_lse else lse.new_empty(0)


def attend_backward(
    grad_out, grad_lse, q, k, v, out, lse, window=None, *, scale, right=0, starts=None, softcap=None, sinks=None,
    rope=None,
):  # fmt: skip
    """(dq, dk, dv, dsinks), by the chain rule; out and lse are not read, so that nothing here is rounded twice.

    p_ij = exp(s_ij - lse_i)      dp_ij = do_i . v_j       delta_i = sum_j p_ij dp_ij - dlse_i
    ds_ij = p_ij (dp_ij - delta_i)                         (softcap: times 1 - (s_ij / softcap)^2)
    dq_i = scale * sum_j ds_ij k_j     dk_j = scale * sum_i ds_ij q_i     dv_j = sum_i p_ij do_i
    dsink = -sum_i exp(sink - lse_i) delta_i
    """
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    qw, kw, vw = _widened(q, k, v, rope)
    seen = visible_mask(T, S, window, q.device, right=right, starts=starts)
    scores = _scores(qw @ kw.mT, seen, scale, softcap)
    lse = _lse(scores, sinks)[..., None]
    p = _probabilities(scores, lse)
    do = grad_out.to(qw.dtype)
    dp = do @ vw.mT
    delta = (p * dp).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    ds = scale * p * (dp - delta)
    if softcap is not None:
        ds = ds * (1 - (scores / softcap) ** 2).masked_fill(p == 0, 0.0)
    dq, dk, dv = ds @ kw, ds.mT @ qw, p.mT @ do
    if rope is not None:
        cos, sin = rope
        dq = rotated(dq, cos[S - T : S], -sin[S - T : S])
        dk = rotated(dk, cos[:S], -sin[:S])
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    dsinks = None
    if sinks is not None:
        dsinks = -((sinks.to(lse.dtype)[:, None, None] - lse).exp() * delta).sum((0, 2, 3)).to(sinks.dtype)
    return *(torch.empty_like(x).copy_(grad) for x, grad in ((q, dq), (k, dk), (v, dv))), dsinks


def append(k, v, k_cache, v_cache, lengths, *, rope=None, scales=None):
    """`append_to_cache`, one row and one token at a time. scales: (k_scales, v_scales) of int8 rings."""
    T, C = k.shape[2], k_cache.shape[2]
    for b, length in enumerate(lengths.tolist()):
        for i in range(T):
            pos = length - T + i
            if pos >= 0:
                token = k[b, :, i]
                if rope is not None:
                    token = rotated(token, rope[0][pos], rope[1][pos])
                for x, cache, of in ((token, k_cache, 0), (v[b, :, i], v_cache, 1)):
                    if scales is not None:
                        x, scales[of][b, :, pos % C] = quantized(x)
                    cache[b, :, pos % C] = x


def attend_to_cache(
    q, k_cache, v_cache, lengths, window=None, *, scale, softcap=None, sinks=None, rope=None, scales=None,
    num_splits=None, lse=None,
):  # fmt: skip
    """`sliding_gqa_decode`, one row and one query at a time, reading exactly the slots that the query sees.

    lse (B, Hq, T) is written to. num_splits is not read: no keys are cut, and no row depends on another.
    """
    if lse is not None:
        lse.fill_(float("-inf"))
    T, C = q.shape[2], k_cache.shape[2]
    group = q.shape[1] // k_cache.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    if scales is not None:
        k_cache, v_cache = (dequantized(*pair, wide) for pair in zip((k_cache, v_cache), scales, strict=True))
    out = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        for i in range(T):
            pos = length - T + i
            if pos < 0:
                continue
            token = q[b, :, i : i + 1].to(wide)
            if rope is not None:
                token = rotated(token, rope[0][pos : pos + 1], rope[1][pos : pos + 1])
            first = 0 if window is None else max(0, pos - window + 1)
            slots = torch.arange(first, pos + 1, device=q.device) % C
            keys, values = (cache[b][:, slots].to(wide).repeat_interleave(group, dim=0) for cache in (k_cache, v_cache))
            seen = torch.ones(1, len(slots), dtype=torch.bool, device=q.device)
            scores = _scores(token @ keys.mT, seen, scale, softcap)
            out[b, :, i : i + 1], row_lse = _average(scores, values, _lse(scores, sinks), q.dtype)
            if lse is not None:
                lse[b, :, i : i + 1] = row_lse
    return out
