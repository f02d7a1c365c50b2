"""The band: which keys a query sees, how many pairs that makes, and the arithmetic that attention needs for them.

T=3 queries at the end of S=5 positions, window=3:      1 1 1 . .
                                                        . 1 1 1 .        9 pairs
                                                        . . 1 1 1
"""

import torch


def visible_mask(T, S, window=None, device=None):
    """(T, S) bool: which of S keys each of the last T queries sees. window None: all earlier keys."""
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril_(S - T)
    return seen if window is None else seen.triu_(S - T - window + 1)


def visible_pairs(T, S, window=None):
    """How many (query, key) pairs of one head are visible: the ones in `visible_mask`."""
    if window is None or window > S:
        window = S
    # queries at positions p < window - 1 see p + 1 keys, all others see window
    short = min(T, max(0, window - 1 - (S - T)))
    return window * (T - short) + short * (S - T) + short * (short + 1) // 2


def attention_flops(q_shape, k_shape, window, products):
    """FLOPs of so many matrix products over the visible pairs of all heads: 2 forward, 5 backward."""
    B, Hq, T, D = q_shape
    return products * 2 * D * B * Hq * visible_pairs(T, k_shape[2], window)
