"""What cards can do at best, by their data sheets: dense bf16 matrix products and memory bandwidth.

Shares of these peaks are shares of a number in a table; shares of a matrix product that was measured in the same run
say more about what is left to gain, and the benchmarks report them where they can.
"""

import re
from typing import NamedTuple


class Peak(NamedTuple):
    tflops: float
    """bf16 with fp32 accumulation, no sparsity, in 1e12 FLOP/s."""
    gb_per_second: float
    """Memory bandwidth in 1e9 bytes/s."""


# A name matches if it has all the words; the first match counts, so that variants stand before their family.
PEAKS = {
    "MI300X": Peak(1307, 5300),
    "B200": Peak(2250, 8000),
    "H200": Peak(989, 4800),
    "GH200": Peak(989, 4000),
    "H100 PCIe": Peak(756, 2000),
    "H100 NVL": Peak(835, 3900),
    "H100": Peak(989, 3350),
    "H800": Peak(989, 3350),
    "A100 PCIE 40GB": Peak(312, 1555),
    "A100 SXM4 40GB": Peak(312, 1555),
    "A100 PCIe 80GB": Peak(312, 1935),
    "A100": Peak(312, 2039),
    "L40S": Peak(362, 864),
    "L40": Peak(181, 864),
    "L4": Peak(121, 300),
    "A10G": Peak(70, 600),
    "A10": Peak(125, 600),
    "A30": Peak(165, 933),
    "A40": Peak(150, 696),
    "A6000": Peak(155, 768),
    "5090": Peak(209, 1792),
    "4090": Peak(165, 1008),
    "4080": Peak(97, 717),
    "3090": Peak(71, 936),
    "3080": Peak(60, 760),
}


def peak_of(name):
    """The `Peak` of a card by the name its driver gives, as in "NVIDIA A100-SXM4-80GB"; None for one not listed."""
    words = set(re.split(r"[\s-]+", name.lower()))
    for card, peak in PEAKS.items():
        if set(card.lower().split()) <= words:
            return peak
    return None
