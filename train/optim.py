"""The update of the weights: learning rate, AdamW and Muon, gradient scaling, and an average of the weights."""

import contextlib
import math

import torch
from torch.optim.adamw import adamw

from model.command import fast_precision

from .distributed import full_tensor, shard_like

# What is left of the fall, as a function of what is left of the run: both go from 1, after the warm-up, to 0.
WSD_DECAY = 0.2  # the last part of the run after the warm-up, in which wsd falls
SCHEDULES = {
    "cosine": lambda left: 0.5 * (1 - math.cos(math.pi * left)),
    "linear": lambda left: left,
    "wsd": lambda left: min(1.0, left / WSD_DECAY),
}


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

    It rises linearly from 0 to `peak` at `warmup_tokens`, then falls to final_fraction * peak at `final_tokens` and
    stays there. With decay=False it stays at `peak`.

        cosine  ___             linear  .              wsd  _______
               /   \\                   / `.                /       \\
              /     \\___              /    `.             /         \\

    wsd (warm-up, stable, decay; arXiv:2404.06395) falls linearly in the last fifth only: a run can be prolonged from
    any checkpoint before that.
    """
    if tokens < warmup_tokens:
        return peak * tokens / warmup_tokens
    if not decay:
        return peak
    left = max(0.0, (final_tokens - tokens) / max(1, final_tokens - warmup_tokens))
    return peak * (final_fraction + (1 - final_fraction) * SCHEDULES[schedule](min(1.0, left)))


def make_optimizer(
    model: torch.nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    optimizer: str = "adamw",
) -> torch.optim.Optimizer:
    """torch's fused AdamW, or with optimizer="muon" `Muon` for the hidden layers' matrices and AdamW for the rest.

    Weight decay applies to matrices only: a bias or a normalisation gain has no reason to be small. A tied embedding
    is one parameter and decays once.
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
    """The weights of all linear layers but the output layer, `lm_head`.

    A row of an embedding or of the output belongs to one token, and most steps update few rows: orthogonal updates
    make no sense there (Jordan et al. 2024).
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    hidden = {module.weight for name, module in linear.items() if name.rpartition(".")[2] != "lm_head"}
    return {weight for weight in hidden - embeddings if weight.requires_grad}


MUON_MOMENTUM = 0.95
SMALL_MATRIX = 2**16  # elements
# Odd polynomials a x + b x^3 + c x^5 of the singular values, applied in turn. Each is the nearest to 1, of its degree,
# on the image of [0.01, 1] under the ones before it (the greedy choice of "The Polar Express", arXiv:2505.16932).
# Three of them bring [0.01, 1] within 0.27 of 1; torch's five leave 0.68 to 1.13.
POLYNOMIALS = (
    (8.093369, -23.620430, 17.446152),
    (3.636586, -2.721927, 0.536546),
    (2.661300, -1.977155, 0.452616),
)


class Muon(torch.optim.Optimizer):
    """Muon for groups with "muon": True, which hold matrices only; torch's fused AdamW for the other groups.

        M <- mu M + (1 - mu) g,   N = mu M + (1 - mu) g                  momentum, and Nesterov's look-ahead
        W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) U V^T    for N = U S V^T

    All directions of a step become about equally long (Jordan et al. 2024, kellerjordan.github.io/posts/muon). The
    factor gives a step the size of AdamW's, so both share learning rate and decay (Liu et al., arXiv:2502.16982).
    torch.optim.Muon needs a second optimizer for the other parameters, takes one matrix at a time, and computes in
    bf16 on every device. Here devices with bf16 units take bf16, others fp32. All matrices of one shape are one batch,
    which saves calls; on a CPU only small ones, since large ones stay in the cache one at a time.

    A group has lr and weight_decay, and betas for AdamW. Parameters without a gradient stay as they are. Sharded
    parameters (DTensor) work: a step gathers each matrix, and every process keeps its shard of the result.
    Raises ValueError for a Muon group with a parameter that is no matrix.
    """

    def __init__(self, groups, lr: float, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "muon": False}
        # "fused" makes torch keep AdamW's step counts on the device when it loads a state
        super().__init__(groups, {**defaults, "fused": True})
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["muon"] and parameter.dim() != 2:
                    raise ValueError(f"Muon updates matrices, not a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        """One update. `closure`, if given, computes the loss and its gradients first; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                by_shape = {}
                for parameter in parameters:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
                for same_shape in by_shape.values():
                    self._muon(same_shape, group["lr"], group["weight_decay"])
            elif parameters:
                self._adamw(parameters, group)
        return loss

    def _muon(self, parameters, lr, weight_decay):
        """Updates matrices of one shape."""
        directions = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - MUON_MOMENTUM)
            directions.append(full_tensor(torch.lerp(parameter.grad, momentum, MUON_MOMENTUM)))
        dtype = torch.bfloat16 if fast_precision(directions[0].device)[0] == "bf16" else torch.float32
        if directions[0].is_cuda or directions[0].numel() <= SMALL_MATRIX:
            updates = orthogonal(torch.stack(directions), dtype).unbind()
        else:
            updates = [orthogonal(matrix, dtype) for matrix in directions]
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - lr * weight_decay).add_(shard_like(parameter, update), alpha=-lr * scale)

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
            **{name: group[name] for name in ("lr", "weight_decay", "eps")},
        )


def orthogonal(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """U V^T, nearly, of matrices U S V^T (..., rows, columns). Computes in `dtype`, returns the matrices' own dtype.

    Singular values of at least 0.01 of the Frobenius norm come out within 0.27 of 1, smaller ones smaller, 0 as 0.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm  # beta * m + alpha * p @ q
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


FIRST_SCALE = 2.0**16
GROW_AFTER = 2000  # finite steps in a row
MAX_SKIPPED = 20  # non-finite steps in a row, after which a run fails; with fp16 the first few find the scale


class GradientScaler:
    """Takes an optimizer's steps, skips those with a gradient that is not finite, and scales the loss for fp16.

    A step with a NaN or an infinity would destroy the weights, so it is skipped and counted. fp16 rounds small
    gradients to 0, so the loss is multiplied by a scale, which doubles after GROW_AFTER steps and halves when a
    gradient overflows (Micikevicius et al., arXiv:1710.03740). The norm of the whole model's gradient decides, so that
    all processes decide alike; torch.amp.GradScaler checks a process's shard only.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, precision: str):
        self.optimizer = optimizer
        self.enabled = precision == "fp16"
        self.scale = FIRST_SCALE if self.enabled else 1.0
        self.good = self.skipped = self.skipped_in_a_row = 0

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call backward on."""
        return loss * self.scale if self.enabled else loss

    def step(self, grad_clip: float | None) -> tuple[bool, torch.Tensor]:
        """(whether the weights were updated, the gradient's norm before clipping to `grad_clip`)."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if self.enabled:
            torch._foreach_mul_(gradients, 1 / self.scale)
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
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
        if self.enabled and not finite:
            self.scale /= 2
        elif self.enabled and self.good == GROW_AFTER:
            self.scale, self.good = self.scale * 2, 0

    def state_dict(self) -> dict:
        names = ("scale", "good", "skipped", "skipped_in_a_row")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class AverageWeights:
    """An exponential moving average (EMA) of a model's parameters in fp32, to evaluate and to save as the best.

    Each step moves the average by (1 - decay) towards the weights. The first steps move it by more, (9 / (10 +
    steps)), so that it soon forgets the random initial weights. 0 < decay < 1; decay = 1 - 20 / N suits a run of N
    steps.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self._parameters = list(model.parameters())
        self._average = [parameter.detach().float().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Call this after each step of the optimizer."""
        self.steps += 1
        weight = max(1 - self.decay, 9 / (10 + self.steps))
        for average, parameter in zip(self._average, self._parameters, strict=True):
            average.lerp_(parameter.detach().float(), weight)

    @contextlib.contextmanager
    def in_place(self):
        """Inside the block the model's weights are the average; after it they are what they were, bit for bit."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        self._set(self._average)
        try:
            yield
        finally:
            self._set(own)

    def state_dict(self) -> dict:
        return {"steps": self.steps, "average": [full_tensor(average).cpu() for average in self._average]}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(shard_like(average, saved.to(average.device)))

    @torch.no_grad()
    def _set(self, values):
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
