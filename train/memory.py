"""The memory that a run takes, before it begins, and activation checkpointing, which saves memory and costs time.

    memory = weights + gradients + optimizer state + activations

Weights and gradients take 4 bytes a parameter, Adam's state 8, Muon's 4 a matrix entry, a moving average 4. Under fsdp
the processes share these. The activations are what autograd saves of one batch for the backward pass: measured.
"""

import dataclasses
import functools
import re
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from model import GPT, GPTConfig


def checkpoint_blocks(model: torch.nn.Module) -> None:
    """Makes every block save its input only, and recompute the rest in the backward pass (Chen et al. 2016).

    Parameters, their names and the results stay the same. Raises ValueError for a model without `blocks`.
    """
    if not hasattr(model, "blocks"):
        raise ValueError(f"activation_checkpointing needs a model with `blocks`, which {type(model).__name__} has not")
    for block in model.blocks:
        block.forward = functools.partial(_checkpointed, block.forward)


def _checkpointed(forward, *arguments):
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False)


def parameter_memory(optimizer: torch.optim.Optimizer, averaged: bool = False, shards: int = 1) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state; the last includes the moving average, if there is one."""
    weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"]) * 4
    matrices = sum(p.numel() for group in optimizer.param_groups if group.get("muon") for p in group["params"])
    state = 2 * weights - 4 * matrices + averaged * weights
    return {"weights": weights // shards, "gradients": weights // shards, "optimizer": state // shards}


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Inside the block, counts what forward passes save for the backward pass: each storage once, parameters not."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(self._save, lambda tensor: tensor)
        self._parameters = {id(p) for p in model.parameters()}
        self._storages = {}

    def _save(self, tensor):
        if id(tensor) not in self._parameters and not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes(self) -> int:
        return sum(self._storages.values())


def describe_estimate(estimate: dict[str, int]) -> str:
    """A `Trainer.estimate` in a line."""
    parts = ", ".join(f"{part} {_bytes(count)}" for part, count in estimate.items())
    return f"about {_bytes(sum(estimate.values()))}: {parts}"


def model_memory(config: GPTConfig) -> dict[str, int]:
    """Bytes of the weights and gradients of a model that is not made yet. They grow by the same with each layer."""
    with torch.device("meta"):
        one, two = (GPT(dataclasses.replace(config, n_layer=layers)).num_parameters() for layers in (1, 2))
    weights = 4 * (one + (config.n_layer - 1) * (two - one))
    return {"weights": weights, "gradients": weights}


def require_memory(estimate: dict[str, int], device: torch.device) -> None:
    """Raises ValueError if the device cannot hold what an estimate says.

    estimate: `model_memory`, or a `Trainer.estimate`, whose weights are there already.
    """
    available = None
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and Path("/proc/meminfo").exists():
        found = re.findall(r"(?:MemAvailable|SwapFree): +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        available = 1024 * sum(map(int, found))
    made = "activations" in estimate
    needed = sum(estimate.values()) - made * estimate["weights"]
    if available is not None and needed > available:
        smaller = "batch_size (with grad_accumulation for as many examples a step), or activation_checkpointing"
        raise ValueError(
            f"the run needs {describe_estimate(estimate)}, and {device} has {_bytes(available)} left: take a smaller "
            + (smaller if made else "model")
        )


def _bytes(count):
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
