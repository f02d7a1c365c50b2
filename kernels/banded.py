"""Sliding-window attention in PyTorch with a cost linear in the length: the backend for machines without Triton.

The queries are cut into blocks of L positions. Block b of queries sees keys in one stretch of L + window - 1 positions,
and the stretches of all blocks are one overlapping view of the padded keys, so a band is a batch of small dense
products under one mask. L=2, window=3:

    keys      . . 0 1 2 3 4 5        (. = padding before the first key)
    block 0   x x x .                queries 0, 1 x 4 keys
                x x x                row r of a block sees columns r .. r + window - 1
    block 1       x x x .
                    x x x

The heads of a group share their keys: they are stacked into the rows of the product.
"""

import torch
import torch.nn.functional as F

from .rope import rotate_pairs

DENSE_ROWS = 256  # rows a step where no window bounds the keys: keeps the scores at DENSE_ROWS * S numbers a head


def attention(q, k, v, window=None, *, scale, softcap=None, sinks=None, rope=None):
    """(out, lse) of `sliding_gqa_attention`: out in q's dtype, lse (B, Hq, T) fp32 (fp64 for fp64)."""
    T, S = q.shape[2], k.shape[2]
    if rope is not None:
        cos, sin = rope
        q, k = rotate_pairs(q, cos[S - T : S], sin[S - T : S]), rotate_pairs(k, cos[:S], sin[:S])
    if T == 0 or window is None or window >= S:
        out, lse = _dense(q, k, v, scale, softcap, sinks)
    else:
        out, lse = _band(q, k, v, window, scale, softcap, sinks)
    return out, lse


def _band(q, k, v, window, scale, softcap, sinks):
    B, Hq, T, D = q.shape
    Hkv, S = k.shape[1], k.shape[2]
    L = min(T, max(window, 16))
    blocks = -(-T // L)
    stretch = L + window - 1
    # the first block's stretch starts window - 1 keys before the first query, the last block's ends L past its start
    start = S - T - (window - 1)
    pad = (0, 0, max(0, -start), blocks * L - T)
    k, v = (F.pad(x[:, :, max(0, start) :], pad).unfold(2, stretch, L) for x in (k, v))  # (B, Hkv, blocks, D, stretch)
    q = F.pad(q, (0, 0, 0, blocks * L - T)).view(B, Hkv, Hq // Hkv, blocks, L, D).transpose(2, 3)
    row, column = torch.arange(L, device=q.device)[:, None], torch.arange(stretch, device=q.device)
    first = torch.arange(blocks, device=q.device)[:, None, None] * L + start  # position of each stretch's first key
    seen = (column >= row) & (column < row + window) & (first + column >= 0)  # (blocks, L, stretch)
    scores = (q.flatten(3, 4) @ k).view(B, Hkv, blocks, Hq // Hkv, L, stretch)
    sinks = None if sinks is None else sinks.view(Hkv, 1, Hq // Hkv, 1)
    p, lse = _softmax(scores, seen[:, None], scale, softcap, sinks)
    out = (p.to(v.dtype).flatten(3, 4) @ v.mT).view(B, Hkv, blocks, Hq // Hkv, L, D)
    out = out.transpose(2, 3).reshape(B, Hq, blocks * L, D)[:, :, :T]
    return out, lse.transpose(2, 3).reshape(B, Hq, blocks * L)[:, :, :T]


def _dense(q, k, v, scale, softcap, sinks):
    """Every earlier key: no band to exploit, so the rows are taken DENSE_ROWS at a time with the keys before them."""
    B, Hq, T, D = q.shape
    Hkv, S = k.shape[1], k.shape[2]
    q = q.unflatten(1, (Hkv, -1))  # (B, Hkv, G, T, D)
    sinks = None if sinks is None else sinks.view(Hkv, -1, 1)
    outs, lses = [], []
    for first in range(0, T, DENSE_ROWS):
        rows = q[:, :, :, first : first + DENSE_ROWS]
        last = S - T + first + rows.shape[3]
        keys, values = k[:, :, None, :last], v[:, :, None, :last]
        q_pos = torch.arange(S - T + first, last, device=q.device)[:, None]
        seen = torch.arange(last, device=q.device) <= q_pos
        p, lse = _softmax(rows @ keys.mT, seen, scale, softcap, sinks)
        outs.append(p.to(v.dtype) @ values)
        lses.append(lse)
    if not outs:  # T = 0
        return q.flatten(1, 2), q.new_zeros((B, Hq, 0), dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.cat(outs, dim=3).flatten(1, 2), torch.cat(lses, dim=3).flatten(1, 2)


def _softmax(scores, seen, scale, softcap, sinks):
    """p and lse over the last dimension of scores, in fp32 or fp64; rows that see nothing get p = 0 and lse = -inf."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype))
    # a finite pivot: -inf - -inf would be NaN in a row that sees nothing
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]), lse


def append(k, v, k_cache, v_cache, lengths, *, rope=None):
    """`append_to_cache`: one scatter each for k and v."""
    T, C = k.shape[2], k_cache.shape[2]
    positions = lengths[:, None] - T + torch.arange(T, device=k.device)  # (B, T)
    written = (positions >= 0)[:, None, :, None]
    if rope is not None:
        cos, sin = (table[positions.clamp(min=0)][:, None] for table in rope)
        k = rotate_pairs(k, cos, sin)
    slots = (positions % C)[:, None, :, None].expand(k.shape).long()
    for cache, new in ((k_cache, k), (v_cache, v)):
        # padding writes back what its slot holds: T <= C, so no other token of this call has the same slot
        cache.scatter_(2, slots, torch.where(written, new, cache.gather(2, slots)))


def decode(q, k_cache, v_cache, lengths, window=None, *, scale, softcap=None, sinks=None, rope=None):
    """`sliding_gqa_decode`: one dense product over the ring, whose slots are told apart by the positions they hold."""
    B, Hq, T, D = q.shape
    Hkv, C = k_cache.shape[1], k_cache.shape[2]
    q_pos = lengths[:, None] - T + torch.arange(T, device=q.device)  # (B, T)
    if rope is not None:
        cos, sin = (table[q_pos.clamp(min=0)][:, None] for table in rope)
        q = rotate_pairs(q, cos, sin)
    newest = lengths[:, None] - 1
    slot_pos = newest - (newest - torch.arange(C, device=q.device)) % C  # (B, C): newest position of each slot
    seen = (slot_pos >= 0)[:, None] & (slot_pos[:, None] <= q_pos[:, :, None])
    if window is not None:
        seen = seen & (slot_pos[:, None] > q_pos[:, :, None] - window)  # (B, T, C)
    rows = q.unflatten(1, (Hkv, -1)).flatten(2, 3)  # (B, Hkv, G * T, D)
    scores = (rows @ k_cache.mT).unflatten(2, (-1, T))
    p, _ = _softmax(scores, seen[:, None, None], scale, softcap, None if sinks is None else sinks.view(Hkv, -1, 1))
    # an unwritten slot may hold NaN, and 0 * NaN is NaN: its value is replaced, not only its weight
    values = torch.where((slot_pos >= 0)[:, None, :, None], v_cache, 0)
    return (p.to(q.dtype).flatten(2, 3) @ values).unflatten(2, (-1, T)).flatten(1, 2)
