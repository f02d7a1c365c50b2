"""How this CPU multiplies matrices fast: which products lose nothing, and PyTorch's switch for them.

PyTorch gives fp32 products to MKL, which on some CPUs uses half of the machine, unless
`torch.backends.mkldnn.matmul.fp32_precision` is "bf16". Then they go to oneDNN, which *may* round their factors to
bf16. It does so only with AMX instructions: on a CPU with AVX-512 and without AMX the products stay fp32, and the setting
only chooses the faster library (docs/banded.md has the rates).
"""

import functools
import threading

import torch


def _has(feature):
    """Whether the CPU has this feature: False where PyTorch cannot tell."""
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()


@functools.cache
def onednn_is_exact():
    """Whether oneDNN computes fp32 products in fp32 and faster: AVX-512 without AMX."""
    tells_amx = hasattr(torch.cpu, "_is_amx_tile_supported")
    switch = hasattr(torch.backends.mkldnn, "matmul") and torch.backends.mkldnn.is_available()
    return switch and tells_amx and _has("avx512") and not _has("amx_tile")


@functools.cache
def has_bf16_products():
    """Whether the CPU multiplies bf16 matrices faster than fp32 ones: AVX512_BF16 or AMX."""
    return torch.backends.mkldnn.is_available() and (_has("avx512_bf16") or _has("amx_tile"))


class _OneDNN:
    """`with onednn:` sends fp32 products to oneDNN where that is exact.

    The setting is one of the process: the first thread to enter changes it, the last one to leave restores it. What the
    caller has chosen, anything but PyTorch's default "none", stays.
    """

    def __init__(self):
        self.lock, self.users, self.changed = threading.Lock(), 0, False

    def __enter__(self):
        if not onednn_is_exact():
            return
        with self.lock:
            matmul = torch.backends.mkldnn.matmul
            if self.users == 0 and matmul.fp32_precision == "none":
                matmul.fp32_precision, self.changed = "bf16", True
            self.users += 1

    def __exit__(self, *error):
        if not onednn_is_exact():
            return
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.changed:
                torch.backends.mkldnn.matmul.fp32_precision, self.changed = "none", False


onednn = _OneDNN()


def use_onednn():
    """Send all fp32 products of this process to oneDNN if that is exact on its CPU. Returns whether it did.

    For programs that compute on the CPU: on a GPU the same setting would allow TF32.
    """
    if onednn_is_exact():
        # not by fp32_precision: after that, torch.compile fails when it asks for the precision
        torch.set_float32_matmul_precision("medium")
    return onednn_is_exact()
