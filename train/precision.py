"""Low precision without accidents: fp16's loss scale, and no step on gradients that are not numbers."""

import torch

from .distributed import whole

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
