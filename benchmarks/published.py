"""Published speeds that the model in speed_of_light.py is held against.

None is of our kernels, which no GPU has run yet: they say whether the bounds lie where attention kernels end up.
Shapes follow the papers: causal, 16 heads of 128, T = 16,384, FLOPs of visible pairs, products of the backward's five
(2.5 times the forward), whatever is recomputed beyond that.
"""

from typing import NamedTuple

from speed_of_light import CARDS, Shape

from kernels.band import visible_pairs

SHAPE = Shape(1, 16, 16, 16384, 128, None)
FORWARD = ("attention_forward",)
BOTH = ("attention_forward", "attention_dq", "attention_dkdv")


class Yardstick(NamedTuple):
    target: str
    kernels: tuple  # of ours, which do the same work
    tflops: float
    whose: str


TFLOPS = (
    Yardstick("sm_80", BOTH, 189, "FlashAttention-2 (arXiv:2307.08691)"),
    Yardstick("sm_90", BOTH, 328, "FlashAttention-2, HMMA (arXiv:2307.08691)"),
    Yardstick("sm_90", FORWARD, 335, "FlashAttention-2, HMMA (arXiv:2407.08608)"),
    Yardstick("sm_90", FORWARD, 378, "Triton's tutorial, HGMMA (arXiv:2407.08608)"),
    Yardstick("sm_90", FORWARD, 539, "cuDNN, warp-specialised (arXiv:2407.08608)"),
    Yardstick("sm_90", FORWARD, 616, "FlashAttention-3, warp-specialised (arXiv:2407.08608)"),
)
# Shares of the memory's bandwidth, where the model says 1
BANDWIDTH = (
    ("rotation of q and k", 0.80, 0.80, "Liger on an A100"),
    ("decoding", 0.54, 0.75, "published kernels"),
)
# A prototype of our forward (packed, two loops; tiles of 128 x 64) in a model without shared memory, FMA, L2 and
# prologue: serial share of peak by window, at PROTOTYPE_SHAPE
PROTOTYPE_SHAPE = Shape(4, 32, 8, 8192, 128, 1024)
LEFT_OUT = ("shared", "fma", "l2")
PROTOTYPE = {
    "sm_80": {128: 0.41, 256: 0.51, 1024: 0.62, 4096: 0.65},
    "sm_90": {128: 0.34, 256: 0.43, 1024: 0.54, 4096: 0.57},
}


def nominal_flops(kernels, shape=SHAPE):
    """The FLOPs that papers count: 2 products forward, 5 backward."""
    products = {"attention_forward": 2, "attention_dq": 0, "attention_dkdv": 5}
    pairs = shape.B * shape.Hq * visible_pairs(shape.T, shape.T, shape.window)
    return sum(products[kernel] for kernel in kernels) * 2 * pairs * shape.D


def compare(estimates):
    """Rows with the model's TFLOP/s beside the published. estimates {(target, kernel): Estimate}, at SHAPE."""
    rows = []
    for yardstick in TFLOPS:
        ours = [estimates.get((yardstick.target, kernel)) for kernel in yardstick.kernels]
        if None in ours:
            continue
        flops = nominal_flops(yardstick.kernels)
        serial = flops / sum(one.serial_ms for one in ours) / 1e9
        overlapped = flops / sum(one.overlapped_ms for one in ours) / 1e9
        rows.append({
            "card": CARDS[yardstick.target].name,
            "pass": "forward" if yardstick.kernels == FORWARD else "forward and backward",
            "whose": yardstick.whose,
            "published_tflops": yardstick.tflops,
            "serial_tflops": serial,
            "overlapped_tflops": overlapped,
            "serial_off": serial / yardstick.tflops - 1,
            "overlapped_off": overlapped / yardstick.tflops - 1,
        })  # fmt: skip
    return rows
