"""The ring-buffer cache in PyTorch.

On a CPU the host may read `lengths`, so the slots that the newest tokens write and see are known. In the common cases
they are one slice of the ring: a step is then a few calls on views, without a mask.

    C=4, window=4   length 3: slots 0 1 2      length 4 and more: all of them, in whatever order they lie
                              x x x .                             x x x x

Otherwise (ragged rows, several tokens a call, a ring larger than the window) the position in each slot is computed and
masked. On other devices nothing waits for `lengths`, and the mask is always made.

Rings of int8 (kernels/int8.py) are multiplied as floats, in fp32 or wider; their scales multiply scores and weights.
"""

import torch

from ...cpu import through_onednn
from ...int8 import quantized
from .rope import rotate_into, rows_of

MANY_ROWS = 64  # of queries that share their keys: from there on oneDNN is faster than MKL


def append(k, v, k_cache, v_cache, lengths, *, rope=None, scales=None):
    """`append_to_cache`: copies into a slice of the ring; a scatter where rows differ or pass its end."""
    T, C = k.shape[2], k_cache.shape[2]
    shortest, longest = _range(lengths)
    tables = None if rope is None else _rows(rope, lengths, T, shortest, longest)
    first = (longest - T) % C
    in_a_slice = shortest == longest >= T and first + T <= C
    if in_a_slice and scales is None:
        slots = k_cache.narrow(2, first, T)
        if rope is None:
            slots.copy_(k)
        else:
            rotate_into(k, *tables, slots)
        v_cache.narrow(2, first, T).copy_(v)
        return
    if rope is not None:
        k = rotate_into(k, *tables)
    pairs = [(k_cache, k), (v_cache, v)]
    if scales is not None:
        (k, of_k), (v, of_v) = quantized(k), quantized(v)
        of_k, of_v, k_scales, v_scales = (x[..., None] for x in (of_k, of_v, *scales))
        pairs = [(k_cache, k), (v_cache, v), (k_scales, of_k), (v_scales, of_v)]
    if in_a_slice:
        for cache, new in pairs:
            cache.narrow(2, first, T).copy_(new)
        return
    positions = _positions(lengths, T)
    written = (positions >= 0)[:, None, :, None]
    index = (positions % C)[:, None, :, None].long()
    for cache, new in pairs:
        slots = index.expand(new.shape)
        # padding writes back what its slot holds: T <= C, so no other token of this call has the same slot
        cache.scatter_(2, slots, torch.where(written, new, cache.gather(2, slots)))


def attend_to_cache(
    q, k_cache, v_cache, lengths, window=None, *, scale, softcap=None, sinks=None, rope=None, scales=None,
    num_splits=None, lse=None,
):  # fmt: skip
    """`sliding_gqa_decode`: products over the slots that are seen, or over the whole ring under a mask.

    num_splits 1 takes the rows one by one: the sums of a product and of a softmax begin and end elsewhere in a larger
    batch, whose longest row they must cover. Other numbers mean nothing here. lse (B, Hq, T) is written to.
    """
    (B, Hq, T, D), dtype = q.shape, q.dtype
    if num_splits == 1 and B:
        options = {"scale": scale, "softcap": softcap, "sinks": sinks, "rope": rope}
        rows = zip(*(x.split(1) for x in (q, k_cache, v_cache, lengths)), strict=True)
        lse_rows = [None] * B if lse is None else lse.split(1)
        scale_rows = [None] * B if scales is None else zip(*(x.split(1) for x in scales), strict=True)
        return torch.cat(
            [
                attend_to_cache(*map(_aligned, row), window, scales=row_scales, lse=row_lse, **options)
                for row, row_scales, row_lse in zip(rows, scale_rows, lse_rows, strict=True)
            ]
        )
    Hkv, C = k_cache.shape[1], k_cache.shape[2]
    lost = None
    if window is None:
        window = C
        if not lengths.is_cpu:  # on a CPU, the caller has refused such lengths
            lost = (lengths > C)[:, None, None, None]  # rows whose ring has overwritten keys that they should see
    shortest, longest = _range(lengths)
    if rope is not None:
        q = rotate_into(q, *_rows(rope, lengths, T, shortest, longest))
    unseen = None
    if scales is not None:
        q = q.to(torch.promote_types(q.dtype, torch.float32))
    k_scales, v_scales = scales or (None, None)
    if T == 1 and window >= C <= shortest:
        pass  # every slot of every row is seen
    elif T == 1 and 0 < shortest == longest <= C:
        first = max(0, longest - window)
        k_cache, v_cache, k_scales, v_scales = (
            None if x is None else x.narrow(2, first, longest - first) for x in (k_cache, v_cache, k_scales, v_scales)
        )
    else:
        unseen, written = _unseen(lengths, T, window, C, shortest)
        if written is not None:
            # an unwritten slot may hold NaN, and 0 * NaN is NaN: its value is replaced, not only its weight
            if scales is None:
                v_cache = torch.where(written[:, None, :, None], v_cache, 0)
            else:
                v_scales = torch.where(written[:, None], v_scales, 0)
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    if scales is not None:
        keys, values = keys.to(q.dtype), values.to(q.dtype)
        scales = tuple(x.reshape(B * Hkv, 1, -1) for x in (k_scales, v_scales))
    rows = q.reshape(B * Hkv, Hq // Hkv * T, D)  # the heads of a group share their keys
    attend = attend_rows if rows.shape[1] < MANY_ROWS else through_onednn(attend_rows)
    out = attend(rows, keys, values, (B, Hq, T), scale, unseen, softcap, sinks, shortest < T, lse, None, scales)
    out = out.view(B, Hq, T, D).to(dtype)
    if lost is None:
        return out
    if lse is not None:
        lse.masked_fill_(lost[..., 0], float("nan"))
    return out.masked_fill(lost, float("nan"))


def _aligned(x):
    """x, or a copy where its memory begins elsewhere than that of a new tensor: MKL would add up in another order."""
    return x.clone() if x.data_ptr() % 64 else x


def attend_rows(
    rows, keys, values, queries, scale, unseen=None, softcap=None, sinks=None, padding=False, lse=None, first=None,
    scales=None,
):  # fmt: skip
    """(B * Hkv, G * T, D), in the dtype of the values: rows of this shape attend to keys and values (B * Hkv, N, D).

    queries   (B, Hq, T), which the rows are
    unseen    (B, T, N) bool: where a query does not look, None for nowhere; with `padding` that may be everywhere
    lse       (B, Hq, T), in which the log of the sum of exponentials is stored
    first     (rows, P): other rows that meet the first P keys
    scales    (of keys, of values), each (B * Hkv, 1, N), where these are codes of int8
    """
    scores = torch.bmm(rows, keys.mT)
    if first is not None:
        scores[..., : first[1]] = torch.bmm(first[0], keys[:, : first[1]].mT)
    if rows.dtype.itemsize < 4:
        scores = scores.float()
    scores.mul_(scale)
    if scales is not None:
        scores.mul_(scales[0])
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if unseen is None and sinks is None:
        if lse is not None:
            lse.copy_(scores.logsumexp(-1).view(queries))
        p = torch.softmax(scores, dim=-1)
        if scales is not None:
            p.mul_(scales[1])
        return torch.bmm(p if p.dtype == values.dtype else p.to(values.dtype), values)
    p = scores.view(*queries, scores.shape[-1])
    if unseen is not None:
        p.masked_fill_(unseen[:, None], float("-inf"))
    if sinks is not None:  # one more column, which has no value
        p = torch.cat([p, sinks.to(p.dtype)[:, None, None].expand(*queries, 1)], dim=-1)
    if lse is not None:
        lse.copy_(p.logsumexp(-1))
    p = torch.softmax(p, dim=-1)[..., : keys.shape[1]]
    if padding:  # the row of a padding query is NaN: it sees nothing
        p = p.masked_fill(unseen[:, None], 0.0)
    p = p.to(values.dtype).reshape(scores.shape)
    return torch.bmm(p if scales is None else p * scales[1], values)


def _range(lengths):
    """(shortest, longest) row, where reading it costs nothing; else a range that promises nothing."""
    rows = lengths.tolist() if lengths.is_cpu else None
    return (min(rows), max(rows)) if rows else (-1, 2**31 - 1)


def _positions(lengths, T):
    """(B, T) position of each of the newest tokens; negative for padding."""
    return lengths[:, None] - T + torch.arange(T, device=lengths.device)


def _rows(rope, lengths, T, shortest, longest):
    """cos and sin of those positions, (T, R / 2) where rows are alike, else (B, 1, T, R / 2); padding takes any."""
    if shortest == longest >= T:
        return [table.narrow(0, longest - T, T) for table in rope]
    positions = _positions(lengths, T).clamp_(min=0)
    cos, sin = (table[:, None] for table in rows_of(*rope, positions))
    return cos, sin


def _unseen(lengths, T, window, C, shortest):
    """(B, T, C) bool: the slots that each query does not see; and (B, C): the slots written, None for all."""
    newest = lengths[:, None] - 1
    position = newest - (newest - torch.arange(C, device=lengths.device)) % C  # (B, C): the newest that the slot took
    age = _positions(lengths, T)[:, :, None] - position[:, None]  # (B, T, C)
    unseen = (age < 0) | (age >= window)
    written = None
    if shortest < C:
        written = position >= 0
        unseen |= ~written[:, None]
    return unseen, written
