"""The weights' exponential moving average: steadier than the newest ones, which still jump at a high learning rate."""

import contextlib

import torch

from .distributed import sharded_as, whole


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
