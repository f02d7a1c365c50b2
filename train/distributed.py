"""Weights and optimizer as whole tensors by name, however many processes hold them between them.

A checkpoint knows no processes: what two wrote, one can read, and the other way round.
"""

import torch


def whole_weights(model: torch.nn.Module) -> dict:
    """The model's state by name, as whole tensors on the CPU."""
    from torch.distributed.checkpoint import state_dict  # takes most of a second: only runs that save pay for it

    return state_dict.get_model_state_dict(model, options=_whole(state_dict))


def whole_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer's state, by name of the parameter, as whole tensors on the CPU."""
    from torch.distributed.checkpoint import state_dict

    return state_dict.get_optimizer_state_dict(model, optimizer, options=_whole(state_dict))


def load_whole(model: torch.nn.Module, weights: dict, optimizer: torch.optim.Optimizer, optimizer_state: dict) -> None:
    """Loads what the two functions above returned, be it in another number of processes."""
    from torch.distributed.checkpoint import state_dict

    state_dict.set_model_state_dict(model, weights, options=_whole(state_dict))
    state_dict.set_optimizer_state_dict(model, optimizer, optimizer_state, options=_whole(state_dict))


def _whole(state_dict):
    return state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
