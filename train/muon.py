"""Muon for the matrices of the hidden layers and AdamW for everything else, as one optimizer with one learning rate.

    M <- mu M + (1 - mu) g                          momentum, and Nesterov's look ahead: N = mu M + (1 - mu) g
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonal(N)

orthogonal(N) is U V^T of N = U S V^T, near enough: all directions of a step become about equally long (Jordan et al.
2024, kellerjordan.github.io/posts/muon). The factor gives a step the size that AdamW's have, so that both share the
learning rate and the decay (Liu et al., arXiv:2502.16982).

torch.optim.Muon needs a second optimizer beside it, takes one matrix at a time, and computes in bf16 on every device.
Here a device gets what suits it: CUDA bf16 and all matrices of one shape in a batch, since small products cost their
launch; a CPU fp32, since few have bf16 units, and one product at a time, which stays in the cache.
"""

import math

import torch
from torch.optim.adamw import adamw

from .distributed import sharded_as, whole

MOMENTUM = 0.95
EPSILON = 1e-7

# Odd polynomials a x + b x^3 + c x^5 of the singular values, one after the other: each is the nearest to 1 of its
# degree on what the one before it makes of [0.01, 1] (the greedy choice of Amsel et al., "The Polar Express",
# arXiv:2505.16932). Three of them bring that interval within 0.27 of 1; torch's five leave 0.68 to 1.13.
POLYNOMIALS = (
    (8.093369, -23.620430, 17.446152),
    (3.636586, -2.721927, 0.536546),
    (2.661300, -1.977155, 0.452616),
)


class Muon(torch.optim.Optimizer):
    """Groups with "muon": True are updated by Muon and hold matrices only; the others by torch's fused AdamW.

    A group has lr and weight_decay, and betas for AdamW. Parameters without a gradient stay as they are.
    Sharded parameters (DTensor) work: a step gathers each matrix, and every process keeps its part of the result.
    Raises ValueError for a Muon group with a parameter that is no matrix.
    """

    def __init__(self, groups, lr: float, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "muon": False}
        # "fused" tells torch to keep AdamW's step counts on the device when a state is loaded
        super().__init__(groups, {**defaults, "fused": True})
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["muon"] and parameter.dim() != 2:
                    raise ValueError(f"Muon updates matrices, not a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        """One update; `closure`, if given, computes the loss and its gradients anew, and the loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                for alike in _by_shape(parameters):
                    self._muon(alike, group["lr"], group["weight_decay"])
            elif parameters:
                self._adamw(parameters, group)
        return loss

    def _muon(self, parameters, lr, weight_decay):
        """Updates matrices of one shape."""
        ahead = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            ahead.append(whole(torch.lerp(parameter.grad, momentum, MOMENTUM)))
        if ahead[0].is_cuda:
            updates = orthogonal(torch.stack(ahead), torch.bfloat16).unbind()
        else:
            updates = [orthogonal(matrix, torch.float32) for matrix in ahead]
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - lr * weight_decay).add_(sharded_as(parameter, update), alpha=-lr * scale)

    def _adamw(self, parameters, group):
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


def orthogonal(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """U V^T, nearly, of matrices U S V^T (..., rows, columns), computed in `dtype`, returned in their own.

    Singular values from a hundredth of the Frobenius norm up come out within 0.27 of 1, smaller ones smaller, 0 as 0.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + EPSILON)).to(dtype)
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm  # beta * m + alpha * p @ q
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def _by_shape(parameters):
    """Lists of the parameters of one shape each."""
    alike = {}
    for parameter in parameters:
        alike.setdefault(parameter.shape, []).append(parameter)
    return alike.values()
