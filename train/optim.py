"""The optimizer, which parameters it decays, and the learning rate's schedule."""

import math

import torch

from .muon import Muon


def make_optimizer(
    model: torch.nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    optimizer: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW, or with optimizer="muon" Muon for the hidden layers' matrices and AdamW for the rest (train/muon.py).

    Weight decay reaches matrices only: a bias or a normalisation's gain has no reason to be small. A tied embedding is
    one parameter and is decayed once. AdamW updates its parameters in fused kernels.
    """
    hidden = hidden_matrices(model) if optimizer == "muon" else set()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p in hidden], "weight_decay": weight_decay, "muon": True},
        {"params": [p for p in parameters if p.dim() >= 2 and p not in hidden], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if optimizer == "muon":
        return Muon(groups, lr=learning_rate, betas=betas)
    return torch.optim.AdamW(groups[1:], lr=learning_rate, betas=betas, fused=True)


def hidden_matrices(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """The weights of the linear layers between the embeddings and the output, which is the linear layer lm_head.

    A row of an embedding or of the output belongs to one token, and most steps see few of them: their updates have no
    directions to be evened out (Jordan et al. 2024).
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    tokens = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    hidden = {module.weight for name, module in linear.items() if name.rpartition(".")[2] != "lm_head"}
    return {weight for weight in hidden - tokens if weight.requires_grad}


def learning_rate_at(
    tokens: int,
    *,
    peak: float,
    warmup_tokens: int,
    final_tokens: int,
    schedule: str = "cosine",
    final_fraction: float = 0.1,
    decay: bool = True,
) -> float:
    """The learning rate of the step that brings the run to `tokens` tokens.

    Up to `warmup_tokens` it rises in a straight line from 0 to `peak`, then falls to final_fraction * peak at
    `final_tokens` and stays there; with decay=False it stays at `peak`.

        cosine  ___             linear  .              wsd  _______
               /   \\                   / `.                /       \\
              /     \\___              /    `.             /         \\
                                                         the last fifth only: warm-up, stable, decay

    wsd is arXiv:2404.06395's, with its decay a straight line: a run can be prolonged from before the decay.
    """
    if tokens < warmup_tokens:
        return peak * tokens / warmup_tokens
    if not decay:
        return peak
    left = max(0.0, (final_tokens - tokens) / max(1, final_tokens - warmup_tokens))  # 1 after the warm-up, 0 at the end
    shape = SCHEDULES[schedule](min(1.0, left))
    return peak * (final_fraction + (1 - final_fraction) * shape)


WSD_DECAY = 0.2  # the part of the run after the warm-up in which wsd falls

SCHEDULES = {
    "cosine": lambda left: 0.5 * (1 - math.cos(math.pi * left)),
    "linear": lambda left: left,
    "wsd": lambda left: min(1.0, left / WSD_DECAY),
}
