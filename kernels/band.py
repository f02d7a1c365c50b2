"""The band: which keys a query sees, how many pairs that makes, and the arithmetic that attention needs for them.

T=3 queries at the end of S=5 positions, window=3:      1 1 1 . .
                                                        . 1 1 1 .        9 pairs
                                                        . . 1 1 1

window   the keys up to the query's own, this one included; None: all of them.
right    the later keys; None: all of them.
starts   (B, S), the first position of each position's document; None: one document a row.
"""

import torch


def visible_mask(T, S, window=None, device=None, *, right=0, starts=None, prefix=0):
    """Which of S keys each of the last T queries sees: (T, S) bool, with starts (B, 1, T, S).

    prefix   the first positions of each document, which causal queries see besides their window
    """
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    if right is not None:
        seen = seen.tril_(S - T + right)
    if window is not None:
        seen = seen.triu_(S - T - window + 1)
    if prefix:
        key = torch.arange(S, device=device)
        first = key < prefix if starts is None else (key - starts < prefix)[:, None, None, :]
        seen = seen | (first & torch.ones(T, S, dtype=torch.bool, device=device).tril_(S - T))
    if starts is not None:
        seen = seen & (starts[:, None, S - T :, None] == starts[:, None, None, :])
    return seen


def visible_pairs(T, S, window=None, right=0):
    """How many (query, key) pairs of one head are visible: the ones in `visible_mask` without documents."""
    right = S if right is None else min(right, S)
    earlier = _pairs_up_to_own(T, S, window)
    # of the query at position p the min(right, S - 1 - p) next keys, T = S where right is not 0
    return earlier + _pairs_up_to_own(S, S, right + 1) - S if right else earlier


def _pairs_up_to_own(T, S, window):
    if window is None or window > S:
        window = S
    # queries at positions p < window - 1 see p + 1 keys, all others see window
    short = min(T, max(0, window - 1 - (S - T)))
    return window * (T - short) + short * (S - T) + short * (short + 1) // 2


def attention_flops(q_shape, k_shape, window, right, products):
    """FLOPs of so many matrix products over the visible pairs of all heads: 2 forward, 5 backward.

    Documents are not known to a FLOP counter: the pairs are those of one document a row.
    """
    B, Hq, T, D = q_shape
    return products * 2 * D * B * Hq * visible_pairs(T, k_shape[2], window, right)
