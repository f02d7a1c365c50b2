"""Published speeds of other kernels, beside what the model of speed_of_light.py says of ours at the same shape.

The shapes follow the papers: causal, 16 heads of 128, T = 16,384; FLOPs of visible pairs, 2 products forward and 5
backward. `python benchmarks/kernel_report.py --details` prints the table.
"""

from typing import NamedTuple

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import speed_of_light as model
import torch
from speed_of_light import CARDS, Shape

from kernels import compiled
from kernels.band import visible_pairs

FORWARD = ("attention_forward",)
ATTENTION = ("attention_forward", "attention_dq", "attention_dkdv")


class Published(NamedTuple):
    target: str
    kernels: tuple  # of ours that do the same work
    tflops: float
    whose: str


PUBLISHED_SHAPE = Shape(1, 16, 16, 16384, 128, None)
PUBLISHED = (
    Published("sm_80", ATTENTION, 189, "FlashAttention-2 (arXiv:2307.08691)"),
    Published("sm_90", ATTENTION, 328, "FlashAttention-2, HMMA (arXiv:2307.08691)"),
    Published("sm_90", FORWARD, 335, "FlashAttention-2, HMMA (arXiv:2407.08608)"),
    Published("sm_90", FORWARD, 378, "Triton's tutorial, HGMMA (arXiv:2407.08608)"),
    Published("sm_90", FORWARD, 539, "cuDNN, warp-specialised (arXiv:2407.08608)"),
    Published("sm_90", FORWARD, 616, "FlashAttention-3, warp-specialised (arXiv:2407.08608)"),
)
# Shares of the memory's bandwidth, where the model says 1
BANDWIDTH = (("rotation of q and k", 0.80, 0.80, "Liger on an A100"), ("decoding", 0.54, 0.75, "published kernels"))


def compare_published(estimates):
    """Rows with the model's TFLOP/s and the published. estimates {(target, kernel): Estimate}, at PUBLISHED_SHAPE."""
    rows = []
    pairs = PUBLISHED_SHAPE.Hq * visible_pairs(PUBLISHED_SHAPE.T, PUBLISHED_SHAPE.T)
    for published in PUBLISHED:
        ours = [estimates.get((published.target, kernel)) for kernel in published.kernels]
        if None in ours:
            continue
        forward_only = published.kernels == FORWARD
        flops = (2 if forward_only else 7) * 2 * pairs * PUBLISHED_SHAPE.D
        row = {"card": CARDS[published.target].name, "pass": "forward" if forward_only else "forward and backward"}
        row |= {"whose": published.whose, "published_tflops": published.tflops}
        for bound in ("serial", "overlapped"):
            row[f"{bound}_tflops"] = flops / sum(getattr(one, f"{bound}_ms") for one in ours) / 1e9
            row[f"{bound}_off"] = row[f"{bound}_tflops"] / published.tflops - 1
        rows.append(row)
    return rows


def published_table(targets):
    found = {}
    for target in targets.keys() & {published.target for published in PUBLISHED}:
        harness.progress(f"{target}: the shape of the published figures")
        for launch in compiled.launches(target, head_dim=PUBLISHED_SHAPE.D, dtype=torch.bfloat16, group=1):
            if launch.name in ATTENTION:
                made = compiled.compile_launch(launch, target)
                found[target, launch.name] = model.attention_estimate(made, PUBLISHED_SHAPE, 2, rope=False)
    columns = ["card", "pass", "whose", "published TFLOP/s", "model serial", "off", "model overlapped", "off "]
    return {
        "title": "The model and published figures of other kernels (causal, 16 heads of 128, T = 16,384)",
        "columns": columns,
        "rows": [
            [row["card"], row["pass"], row["whose"], f"{row['published_tflops']:.0f}", f"{row['serial_tflops']:.0f}",
             f"{row['serial_off']:+.0%}", f"{row['overlapped_tflops']:.0f}", f"{row['overlapped_off']:+.0%}"]
            for row in compare_published(found)
        ],
        "notes": [
            f"{what}: published kernels reach {least:.0%} to {most:.0%} of the memory's bandwidth ({whose}), the model "
            f"says 100%: {1 / most - 1:+.0%} to {1 / least - 1:+.0%} off"
            for what, least, most, whose in BANDWIDTH
        ],
    }  # fmt: skip
