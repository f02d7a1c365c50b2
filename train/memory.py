"""What a run will take, found before it begins, and activation checkpointing, which takes less memory and more time.

    memory = weights + gradients + optimizer state + what autograd keeps of one batch for its backward pass

The first three are 4 bytes a parameter each, the optimizer's 8 (Adam) or 4 (Muon's matrices), divided by the processes
under fsdp; a running average is 4 more. The last is measured, by a forward pass. Time is that of one batch, forward and
backward, after one to warm up, for every step and a third of it for every batch of the evaluations. Neither changes
the run: no weight is touched, and the random numbers of every step follow from its seed.
"""

import contextlib
import functools
import time

import torch
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: torch.nn.Module) -> None:
    """Has every block keep its input only, and compute the rest again in the backward pass (Chen et al. 2016).

    From outside: parameters, their names, and what the model computes stay the same. Raises ValueError without blocks.
    """
    if not hasattr(model, "blocks"):
        raise ValueError(f"activation_checkpointing needs a model with `blocks`, which {type(model).__name__} has not")
    for block in model.blocks:
        block.forward = functools.partial(_again, block.forward)


def _again(forward, *arguments):
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False)


def estimate(trainer) -> dict:
    """Bytes of weights, gradients, optimizer, activations, and seconds of the whole run. All processes must call it."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    weights = sum(p.numel() for p in parameters) * 4
    matrices = sum(p.numel() for group in trainer.optimizer.param_groups if group.get("muon") for p in group["params"])
    shards = trainer.processes.count if trainer.processes.parallel == "fsdp" else 1
    average = weights if trainer.average is not None else 0
    config = trainer.config
    x, y = trainer.on_device(*next(trainer.batches()))
    kept = _Kept(trainer)
    if config.compile:  # a compiled model lets nobody see what it keeps
        with kept, trainer.autocast():
            trainer.model(x, y)
    for warming_up in (True, False):
        began = time.perf_counter()
        # with averaging: under fsdp a gradient that is not sent away would still be there in the first step
        with trainer.processes.averaging(trainer.forward, last=True):
            with contextlib.ExitStack() as watched, trainer.autocast():
                if warming_up and not config.compile:
                    watched.enter_context(kept)
                loss = trainer.forward(x, y)[1]
            loss.backward()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        seconds = time.perf_counter() - began
        trainer.optimizer.zero_grad(set_to_none=True)
    held = kept.bytes()
    if config.activation_checkpointing:  # the blocks' inputs, which are held where no hook sees them
        held += len(trainer.model.blocks) * x.numel() * trainer.model.config.d_model * 4
    steps = trainer.total_steps - trainer.step
    evaluated = 0 if trainer.test_dataset is None else min(config.eval_examples, len(trainer.test_dataset))
    evaluations = steps // config.eval_every * evaluated / config.batch_size / 3
    return {
        "weights": weights // shards,
        "gradients": weights // shards,
        "optimizer": (2 * weights - 4 * matrices + average) // shards,
        "activations": held,
        "seconds": seconds * (steps * config.grad_accumulation + evaluations),
        "seconds_a_step": seconds * config.grad_accumulation,
    }


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts what a forward pass leaves for the backward one, each storage once, parameters not."""

    def __init__(self, trainer):
        super().__init__(self._keep, lambda tensor: tensor)
        self._parameters = {id(p) for p in trainer.model.parameters()}
        self._storages = {}

    def _keep(self, tensor):
        if id(tensor) not in self._parameters and not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes(self) -> int:
        return sum(self._storages.values())


def in_words(found: dict) -> tuple[str, str]:
    """(memory, time) of an estimate, a line each."""
    parts = ("weights", "gradients", "optimizer", "activations")
    total = sum(found[part] for part in parts)
    memory = f"about {_bytes(total)}: " + ", ".join(f"{part} {_bytes(found[part])}" for part in parts)
    minutes, seconds = divmod(round(found["seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    length = f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds} s"
    return memory, f"about {length}, the optimizer not counted: {found['seconds_a_step'] * 1000:,.0f} ms a step"


def _bytes(count):
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
