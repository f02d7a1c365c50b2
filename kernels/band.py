"""The band: which keys a query sees, how many pairs that makes, and the arithmetic that attention needs for them.

T=3 queries at the end of S=5 positions, window=3:      1 1 1 . .
                                                        . 1 1 1 .        9 pairs
                                                        . . 1 1 1
"""

import importlib.util
import sys

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


COUNTER = "torch.utils.flop_counter"


def count_flops(operators):
    """Give PyTorch's FLOP counter the formulas of our operators, {operator: formula}, as soon as it is imported.

    Importing it here would load Triton, 0.15 s for the many who count nothing.
    """

    def register():
        for operator, formula in operators.items():
            sys.modules[COUNTER].register_flop_formula(operator)(formula)

    if COUNTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport(register))


class _AfterImport:
    """A finder of modules that finds the FLOP counter, and calls `then` once, at the end of its import."""

    def __init__(self, then):
        self.then = then

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)  # for the other finders
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            sys.meta_path.remove(self)
            self.then()

        spec.loader.exec_module = exec_module
        return spec
