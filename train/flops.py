"""How much arithmetic training takes, and what share of a card's peak that is (MFU, arXiv:2204.02311)."""

import torch

from kernels.attention import visible_pairs

from .cards import peak_of


def flops_a_token(config) -> float:
    """Of forward and backward, for a `GPTConfig`: 6 a weight that is multiplied with, and the visible pairs' products.

    What is computed twice (checkpointing, the attention's own backward) or in vain (masked pairs) does not count.
    """
    C, D, T = config.d_model, config.head_dim, config.context_length
    weights = config.vocab_size * C
    pairs = 0
    for layer in range(config.n_layer):
        weights += C * (config.n_head + 2 * config.n_kv_head) * D + C * C + 8 * C * C
        pairs += config.n_head * visible_pairs(T, T, config.layer_window(layer))
    return 6 * weights + 3 * 4 * D * pairs / T


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of a card at best; None on a CPU, in fp32 (the table has the 16-bit peaks), and for a card not listed."""
    if device.type != "cuda" or precision == "fp32":
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    return None if peak is None else peak.tflops * 1e12
