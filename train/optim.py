"""The optimizer and its schedule: AdamW with decay on matrices only, linear warm-up, cosine to a tenth."""

import math

import torch

FINAL_FRACTION = 0.1  # of the peak learning rate, reached at the end of the cosine (Hoffmann et al., arXiv:2203.15556)


def make_optimizer(model: torch.nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]):
    """AdamW whose weight decay reaches matrices only: a bias or a normalisation's gain has no reason to be small.

    One fused kernel updates all parameters. The tied embedding is one parameter and is decayed once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def learning_rate_at(tokens: int, *, peak: float, warmup_tokens: int, final_tokens: int, decay: bool = True) -> float:
    """The learning rate of the step that brings the run to `tokens` tokens.

    Up to `warmup_tokens` it rises in a straight line from 0 to `peak`, then falls along half a cosine to a tenth of
    `peak` at `final_tokens` and stays there; with decay=False it stays at `peak`.

        peak        ___
                   /    \\
        peak / 10 /       \\_____
                 0  warmup   final
    """
    if tokens < warmup_tokens:
        return peak * tokens / warmup_tokens
    if not decay:
        return peak
    progress = min(1.0, (tokens - warmup_tokens) / max(1, final_tokens - warmup_tokens))
    return peak * (FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress)))
