"""The optimizer, which parameters it decays, and the learning rate's schedule."""

import contextlib
import math

import torch
from torch.optim.adamw import adamw

from .distributed import sharded_as, whole


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


#

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


#


class AverageWeights:
    """A running average of a model's parameters, fp32, to evaluate and to keep in place of the newest.

    Each step moves the average by (1 - decay) towards the weights; the first steps by more, (9 / (10 + steps)), so that
    the random initial weights are soon forgotten. 0 < decay < 1; a run of N steps wants about decay = 1 - 20 / N.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self._parameters = list(model.parameters())
        self._average = [parameter.detach().float().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimizer."""
        self.steps += 1
        towards = max(1 - self.decay, 9 / (10 + self.steps))
        for average, parameter in zip(self._average, self._parameters, strict=True):
            average.lerp_(parameter.detach().float(), towards)

    @contextlib.contextmanager
    def in_place(self):
        """Inside, the model has the average for its weights; afterwards its own again, bit for bit."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        self._set(self._average)
        try:
            yield
        finally:
            self._set(own)

    def state_dict(self) -> dict:
        return {"steps": self.steps, "average": [whole(average).cpu() for average in self._average]}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(sharded_as(average, saved.to(average.device)))

    @torch.no_grad()
    def _set(self, values):
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


#

FIRST_SCALE = 2.0**16
GROW_AFTER = 2000  # good steps in a row
MOST_SKIPPED = 20  # steps in a row; with fp16 the first few are those that find the scale


class SafeSteps:
    """Takes an optimizer's steps, all but those whose gradient is infinite or not a number.

    One such step in a long run is bad luck, and is counted; its weights would be lost for good. For fp16, whose small
    gradients would be 0, the loss is multiplied by a scale that doubles now and then and is halved where a gradient
    overflows (Micikevicius et al., arXiv:1710.03740). The norm that decides is that of the whole model, so that all
    processes decide alike, which GradScaler's own check of a shard does not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, precision: str):
        self.optimizer = optimizer
        self.scale = FIRST_SCALE if precision == "fp16" else 1.0
        self.scales = precision == "fp16"
        self.good = self.skipped = self.skipped_in_a_row = 0

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """What to call backward on."""
        return loss * self.scale if self.scales else loss

    def step(self, grad_clip: float | None) -> tuple[bool, torch.Tensor]:
        """(whether the weights were updated, the gradient's norm before it was cut to `grad_clip`)."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if self.scales:
            torch._foreach_mul_(gradients, 1 / self.scale)
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        finite = bool(torch.isfinite(norm))
        if finite:
            if grad_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
            self.optimizer.step()
        self._count(finite)
        self.optimizer.zero_grad(set_to_none=True)
        return finite, norm

    def _count(self, finite):
        self.good = self.good + 1 if finite else 0
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.scales and not finite:
            self.scale /= 2
        elif self.scales and self.good == GROW_AFTER:
            self.scale, self.good = self.scale * 2, 0

    def state_dict(self) -> dict:
        names = ("scale", "good", "skipped", "skipped_in_a_row")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)
