"""The peak that a run's arithmetic (model/flops.py) is a share of: MFU, arXiv:2204.02311."""

import torch

from .cards import peak_of


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of a card at best; None on a CPU, in fp32 (the table has the 16-bit peaks), and for a card not listed."""
    if device.type != "cuda" or precision == "fp32":
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    return None if peak is None else peak.tflops * 1e12
