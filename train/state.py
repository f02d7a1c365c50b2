"""What a trainer must remember to go on as if it had never stopped, as whole tensors by name."""

import time
from pathlib import Path

import numpy as np
import torch

from .distributed import load_whole, whole_optimizer_state
from .resume import read_state


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Random numbers of a step, such as dropout's, follow from seed, step and process: there is no state to keep."""
    (state,) = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64).tolist()
    torch.default_generator.manual_seed(state)
    if device.type == "cuda":
        torch.cuda.manual_seed(state)


def state_of(trainer) -> dict:
    """Everything but the weights. All processes must call it; the result is the first one's."""
    return {
        "step": trainer.step,
        "optimizer": whole_optimizer_state(trainer.model, trainer.optimizer),
        "steps": trainer.steps.state_dict(),
        "average": None if trainer.average is None else trainer.average.state_dict(),
        "best_held_out_loss": trainer.best_held_out_loss,
        "loss_sum": trainer.processes.mean(trainer.loss_sum).cpu(),
        "losses": trainer.losses,
        "seconds": time.perf_counter() - trainer.started,
    }


def load_state(trainer, checkpoint: Path) -> None:
    """Weights and all else of a checkpoint, into a trainer that has not begun."""
    weights, state = read_state(checkpoint, trainer.model)
    load_whole(trainer.model, weights, trainer.optimizer, state["optimizer"])
    trainer.steps.load_state_dict(state["steps"])
    if trainer.average is not None:
        trainer.average.load_state_dict(state["average"])
    trainer.step, trainer.best_held_out_loss = state["step"], state["best_held_out_loss"]
    trainer.loss_sum, trainer.losses = state["loss_sum"].to(trainer.device), state["losses"]
    trainer.seconds = state["seconds"]
