"""The ring-buffer cache in PyTorch: what a step of sampling costs on a machine without Triton.

Where the host may look at `lengths` for nothing (a CPU), the slots that the newest tokens write and see are known, and
in the common cases they are one slice of the ring: a step is then a few calls on views, without a mask.

    C=4, window=4   length 3: slots 0 1 2      length 4 and more: all of them, in whatever order they lie
                              x x x .                             x x x x

Otherwise (ragged rows, several tokens a call, a ring larger than the window) each slot is asked which position it
holds. Elsewhere than on a CPU nothing waits for `lengths`, and the mask is always made.
"""

import torch

from .banded_rope import rotate_pairs, turn


def append(k, v, k_cache, v_cache, lengths, *, rope=None):
    """`append_to_cache`: copies into a slice of the ring, or where rows differ or turn over its end, a scatter."""
    T, C = k.shape[2], k_cache.shape[2]
    shortest, longest = _range(lengths)
    first = (longest - T) % C
    if shortest == longest >= T and first + T <= C:
        slots = slice(first, first + T)
        if rope is None:
            k_cache[:, :, slots] = k
        else:
            cos, sin = (table[longest - T : longest] for table in rope)
            if k.dtype == cos.dtype:
                turn(k, cos, sin, k_cache[:, :, slots])
            else:
                k_cache[:, :, slots] = rotate_pairs(k, cos, sin)
        v_cache[:, :, slots] = v
        return
    positions = lengths[:, None] - T + torch.arange(T, device=k.device)  # (B, T)
    if rope is not None:
        k = rotate_pairs(k, *_rows(rope, positions))
    written = (positions >= 0)[:, None, :, None]
    slots = (positions % C)[:, None, :, None].expand(k.shape).long()
    for cache, new in ((k_cache, k), (v_cache, v)):
        # padding writes back what its slot holds: T <= C, so no other token of this call has the same slot
        cache.scatter_(2, slots, torch.where(written, new, cache.gather(2, slots)))


def decode(q, k_cache, v_cache, lengths, window=None, *, scale, softcap=None, sinks=None, rope=None):
    """`sliding_gqa_decode`: products over the slots that are seen, or over the whole ring under a mask."""
    B, Hq, T, D = q.shape
    Hkv, C = k_cache.shape[1], k_cache.shape[2]
    window = C if window is None else window
    shortest, longest = _range(lengths)
    if T == 1 and window >= C <= shortest:
        seen = None  # every slot of every row
    elif T == 1 and 0 < shortest == longest <= C:
        slots = slice(max(0, longest - window), longest)
        k_cache, v_cache, seen = k_cache[:, :, slots], v_cache[:, :, slots], None
    else:
        seen, v_cache = _seen(lengths, T, window, v_cache, shortest)
    if rope is not None:
        if shortest == longest >= T:
            tables = tuple(table[longest - T : longest] for table in rope)
        else:
            tables = _rows(rope, lengths[:, None] - T + torch.arange(T, device=q.device))
        q = rotate_pairs(q, *tables)
    rows = q.reshape(B, Hkv, Hq // Hkv * T, D)  # the heads of a group share their keys
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(rows, k_cache.mT).to(wide).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(B, Hkv, Hq // Hkv, T, -1)
    if seen is not None:
        scores.masked_fill_(~seen[:, None, None], float("-inf"))
    if sinks is not None:  # one more column, which has no value
        sinks = sinks.to(wide).view(Hkv, -1, 1, 1).expand(B, -1, -1, T, 1)
        p = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        p = torch.softmax(scores, dim=-1)
    if shortest < T:  # the row of a padding query is NaN: it sees nothing
        p = p.masked_fill(~seen[:, None, None], 0.0)
    out = torch.matmul(p.to(v_cache.dtype).flatten(2, 3), v_cache)
    return out.view(B, Hq, T, D)


def _range(lengths):
    """(shortest, longest) of the rows where the host can look for nothing, else a range that promises nothing."""
    if lengths.device.type == "cpu" and lengths.numel():
        shortest, longest = lengths.aminmax()
        return shortest.item(), longest.item()
    return -1, 2**31 - 1


def _rows(rope, positions):
    """cos and sin (B, 1, T, R / 2) of positions (B, T); padding takes position 0."""
    positions = positions.clamp(min=0)
    return tuple(table[positions][:, None] for table in rope)


def _seen(lengths, T, window, v_cache, shortest):
    """(B, T, C) bool: the slots that each query sees; and the values, safe to be multiplied by a probability of 0."""
    C = v_cache.shape[2]
    newest = lengths[:, None] - 1
    position = newest - (newest - torch.arange(C, device=lengths.device)) % C  # (B, C): the newest that the slot took
    query = newest - T + 1 + torch.arange(T, device=lengths.device)  # (B, T)
    age = query[:, :, None] - position[:, None]  # (B, T, C)
    written = position >= 0
    seen = (age >= 0) & (age < window) & written[:, None]
    if shortest < C:
        # an unwritten slot may hold NaN, and 0 * NaN is NaN: its value is replaced, not only its weight
        v_cache = torch.where(written[:, None, :, None], v_cache, 0)
    return seen, v_cache
