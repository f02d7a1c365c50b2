"""How much arithmetic training a model takes, which is what a share of a card's peak is of (MFU, arXiv:2204.02311)."""

from kernels.band import visible_pairs


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
