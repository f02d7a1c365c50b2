"""Rotary positions and causal sliding-window attention with grouped KV heads: forward, backward and decoding.

    from kernels import sliding_gqa_attention, rope_tables
    rope = rope_tables(T, D, device=q.device)
    out = sliding_gqa_attention(q, k, v, window=128, rope=rope)       # (B, Hq, T, D)

Conventions, the same in every function:

layout   (batch, heads, length, head size), any strides whose last one is 1. A projection's output viewed as
         (B, T, H, D) and transposed to (B, H, T, D) costs nothing, and the result comes back in q's memory layout.
window   how many keys a query sees, its own included; None sees every earlier key. It is Hugging Face's
         `sliding_window`; flash-attention's (left, right) is (window - 1, 0).
         A pair (left, right) is flash-attention's: keys i - left .. i + right.
groups   query head h reads KV head h // (Hq / Hkv); Hq / Hkv may be any whole number.
lengths  queries are the *last* T of the S positions ("bottom-right"). T=3, S=5, window=3:

             keys     0 1 2 3 4
             query 2  1 1 1 . .
             query 3  . 1 1 1 .
             query 4  . . 1 1 1

rotary   half-split pairs (x[i], x[i + R/2]) by default, as in LLaMA; `apply_rope` also takes interleaved pairs.
backend  "auto" is Triton on a GPU and "banded" (PyTorch, linear cost) elsewhere, and for what Triton has no tiles for:
         fp64 and heads of more than 256 elements. A named backend never falls back.

Importing this package loads neither torch nor Triton: the names below are imported when they are first used.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "sliding_gqa_attention": "attention",
    "apply_rope": "rope",
    "rope_tables": "rope",
    "document_starts": "documents",
    "append_to_cache": "decode",
    "sliding_gqa_decode": "decode",
    "resolve_backend": "backend",
    "why_not_triton": "backend",
}
__all__ = sorted(_HOME)

if __name__ == "kernels":  # Hugging Face has a package of this name, too
    from .namesake import Namesake

    _namesake = Namesake(__name__, __path__)
    __path__ = _namesake.path


def __getattr__(name):
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if "_namesake" in globals():
        return _namesake.attribute(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOME])
