"""Which matrix products of this CPU are fast and lose nothing, and PyTorch's switch for them.

PyTorch gives fp32 products to MKL, which uses half of some CPUs. If `torch.backends.mkldnn.matmul.fp32_precision` is
"bf16", it gives them to oneDNN instead. oneDNN then *may* round the factors to bf16, but does so only with AMX
instructions. On a CPU with AVX-512 and without AMX the products stay fp32, and the setting only chooses the faster
library. docs/banded.md has the rates.

oneDNN is slower than MKL for small products (a few microseconds a product): decoding and short sequences keep MKL.
"""

import functools
import threading

import torch


def _has(feature):
    """Whether the CPU has this feature: False where PyTorch cannot tell."""
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()


@functools.cache
def onednn_is_exact():
    """Whether oneDNN computes fp32 products in fp32: on CPUs with AVX-512 and without AMX."""
    known = hasattr(torch.cpu, "_is_amx_tile_supported") and hasattr(torch.backends.mkldnn, "matmul")
    return known and torch.backends.mkldnn.is_available() and _has("avx512") and not _has("amx_tile")


@functools.cache
def has_bf16_products():
    """Whether the CPU has instructions for products of bf16 matrices: AVX512_BF16 or AMX."""
    return torch.backends.mkldnn.is_available() and (_has("avx512_bf16") or _has("amx_tile"))


def use_onednn():
    """Send all fp32 products of this process to oneDNN, if that is exact on this CPU. Returns whether it is.

    For training and evaluation on a CPU. Not for decoding, whose products are small; nor beside a GPU, where the same
    setting allows TF32.
    """
    if onednn_is_exact():
        # fp32_precision would do, but then torch.compile fails when it asks PyTorch for the precision
        torch.set_float32_matmul_precision("medium")
    return onednn_is_exact()


def through_onednn(function):
    """`function`, its fp32 products by oneDNN where that is exact: for many large products, the switch takes 4 us."""

    @functools.wraps(function)
    def call(*args):
        if not onednn_is_exact():
            return function(*args)
        with _Switch("bf16"):
            return function(*args)

    return call


def through_mkl(function):
    """`function`, its fp32 products by MKL although the process uses oneDNN: for many small products."""

    @functools.wraps(function)
    def call(*args):
        if not onednn_is_exact() or torch.backends.mkldnn.matmul.fp32_precision != "bf16":
            return function(*args)
        with _Switch("none"):
            return function(*args)

    return call


class _Switch:
    """Sets fp32_precision for the time of a block.

    The setting belongs to the process. While several threads are in such blocks, "bf16" wins: that costs the others
    time, but no accuracy. The last thread to leave restores what the process had. "ieee" and "tf32" are choices of the
    process that stay.
    """

    lock = threading.Lock()
    blocks = {"bf16": 0, "none": 0}  # noqa: RUF012
    before = last_set = None  # the setting of the process, and the one made here

    def __init__(self, setting):
        self.setting = setting

    def __enter__(self):
        self._count(1)

    def __exit__(self, *error):
        self._count(-1)

    def _count(self, change):
        matmul, state, blocks = torch.backends.mkldnn.matmul, _Switch, self.blocks
        with self.lock:
            current = matmul.fp32_precision
            if not any(blocks.values()) or current != state.last_set:
                state.before = current
            blocks[self.setting] += change
            wanted = state.before
            if wanted in blocks and any(blocks.values()):
                wanted = "bf16" if blocks["bf16"] else "none"
            if wanted != current:
                matmul.fp32_precision = wanted
            state.last_set = wanted
