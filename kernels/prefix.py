"""Keys that every later query sees besides its window: the first `prefix` positions of each document.

    window=3, prefix=1      keys     0 1 2 3 4 5
                            query 3  1 1 1 1 . .
                            query 4  1 . 1 1 1 .        as StreamingLLM keeps "attention sinks", arXiv:2309.17453
                            query 5  1 . . 1 1 1

It is composed of two attentions: that of the window, with its lse, and one over the few keys of the prefix that have
left the window. With s_j the scores of these keys, weights are the softmax over (lse, s_0, s_1, ...), and the window's
result is the value that belongs to lse. That is exact, differentiable by PyTorch, and the same on every backend. A walk
inside the kernels would save a read of q and of the result. But the program that owns the prefix's keys in the backward
pass would walk all queries: docs/kernels.md has the count.
"""

import torch


def merge_prefix(out, lse, q, k, v, seen, *, scale, softcap=None, sinks=None):
    """(out, lse) with the keys of a prefix, of the window's out (B, Hq, T, D) and lse (B, Hq, T).

    q (B, Hq, T, D); k, v (B, Hkv, P, D) for all queries or (B, Hkv, T, P, D) for each query its own; rotated already.
    seen (..., T, P) bool, broadcast to (B, T, P): the keys that count. A row that sees nothing at all gives zeros.
    """
    keys = "bhpd" if k.dim() == 4 else "bhtpd"
    q = q.unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, T, D)
    scores = torch.einsum(f"bhgtd,{keys}->bhgtp", q, k).flatten(1, 2).to(lse.dtype) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    columns = [lse[..., None], scores.masked_fill(~seen[..., None, :, :], float("-inf"))]
    if sinks is not None:
        columns.append(sinks.to(lse.dtype)[:, None, None].expand(*lse.shape, 1))
    columns = torch.cat(columns, dim=-1)
    lse = columns.logsumexp(-1)
    weights = torch.softmax(columns, dim=-1)
    weights = weights.masked_fill(lse.isneginf()[..., None], 0.0)
    of_prefix = weights[..., 1 : 1 + scores.shape[-1]].to(v.dtype).unflatten(1, (k.shape[1], -1))
    added = torch.einsum(f"bhgtp,{keys}->bhgtd", of_prefix, v).flatten(1, 2)
    return (out * weights[..., :1] + added).to(out.dtype), lse


def as_if_near(position, distance, starts=None):
    """Positions (T,) or (B, T) of queries, those beyond `distance` of their document's beginning moved there."""
    if starts is None:
        return position.clamp(0, distance)
    starts = starts[:, -len(position) :]
    return starts + (position - starts).clamp(max=distance)


def attention_prefix(q, k, v, window, prefix, starts):
    """(k, v, seen) of `merge_prefix`: the keys of each query's prefix, and whether they have left its window.

    q (B, Hq, T, D), k, v (B, Hkv, S, D), window a number, starts (B, S) or None.
    """
    T, S = q.shape[2], k.shape[2]
    step = torch.arange(prefix, device=q.device)
    position = torch.arange(S - T, S, device=q.device)
    if starts is None:
        return k[:, :, :prefix], v[:, :, :prefix], step <= position[:, None] - window
    first = starts[:, S - T :, None].long() + step  # (B, T, P)
    seen = first <= position[:, None] - window
    index = first.clamp(0, S - 1).flatten(1)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    k, v = (x.gather(2, index).unflatten(2, (T, prefix)) for x in (k, v))
    return k, v, seen
