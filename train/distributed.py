"""More than one process, each with a device of its own, training one model: PyTorch's DDP and FSDP2, from outside.

    torchrun --nproc-per-node 2 -m train --fused-kernels --parallel ddp

ddp     every process has all weights, and the gradients are averaged (DistributedDataParallel)
fsdp    every process has a part of the weights, gradients and optimizer; blocks are gathered as they are needed
        (fully_shard: FSDP2)

A batch is shared out in equal parts, so that a run has the same losses in any number of processes, up to rounding.
A checkpoint knows no processes either: it holds whole tensors by name, and what two wrote, one can go on from.
gloo carries what is on the CPU, NCCL what is on GPUs. Nothing below train/ knows of any of this.
"""

import contextlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def local_device(parallel: str, name: str) -> str:
    """The device that `name` is in this process: of several GPUs each process takes its own."""
    if parallel == "none" or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def join_processes(parallel: str, device: torch.device) -> "Processes":
    """Joins the process group of torchrun, or takes the one there is. Raises ValueError where --parallel cannot be."""
    started = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if parallel == "none":
        if started > 1:
            raise ValueError(f"parallel is none, but there are {started} processes: add --parallel ddp or fsdp")
        return Processes("none")
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ValueError(
                f"parallel {parallel} needs processes: torchrun --nproc-per-node 2 -m train --parallel {parallel} ..."
            )
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Processes(parallel, dist.get_rank(), dist.get_world_size())


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them. With count 1 nothing is sent."""

    parallel: str
    rank: int = 0
    count: int = 1

    def part_of(self, batch_size: int) -> int:
        """Examples of a batch that each process takes. Raises ValueError where the parts would not be equal."""
        if batch_size % self.count:
            raise ValueError(
                f"batch_size is {batch_size}, which {self.count} processes cannot share equally: take a multiple"
            )
        return batch_size // self.count

    def distribute(self, model: torch.nn.Module, device: torch.device, compiled: bool = False) -> torch.nn.Module:
        """What is to be called in place of the model in training; under fsdp its parameters become shards, in place."""
        if self.parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard

            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    dist.broadcast(tensor, 0)
            mesh = dist.init_device_mesh(device.type, (self.count,))
            for block in getattr(model, "blocks", ()):
                if compiled:
                    block.compile()
                fully_shard(block, mesh=mesh)
            return fully_shard(model, mesh=mesh)
        if self.parallel == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(model)
        return torch.compile(model) if compiled else model

    @contextlib.contextmanager
    def averaging(self, forward: torch.nn.Module, last: bool):
        """Around a forward and backward pass: only in the `last` one of a step are gradients averaged."""
        if self.parallel == "fsdp":
            forward.set_requires_gradient_sync(last)
        with forward.no_sync() if self.parallel == "ddp" and not last else contextlib.nullcontext():
            yield

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of what the processes have."""
        if self.count > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
            tensor /= self.count
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process: all of them get the same answer."""
        if self.count == 1:
            return flag
        found = torch.tensor(int(flag))  # on the CPU, so that no process waits for its GPU
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def first_does(self, function, *arguments):
        """The result of a call that only the first process makes. An error there is raised in all."""
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function(*arguments)
            except (ValueError, OSError, RuntimeError) as error:
                if self.count == 1:
                    raise
                outcome[1] = error
        if self.count > 1:
            dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def leave(self) -> None:
        """At the end of a run."""
        if self.parallel != "none" and dist.is_initialized():
            dist.destroy_process_group()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered where each process has a part of it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_as(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor that every process has, shared out as `parameter` is."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes most of a second: only sharded runs pay for it

    # each takes its own part of it: nothing is sent
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_weights(model: torch.nn.Module) -> dict:
    """The model's state by name, as whole tensors on the CPU, in the first process."""
    from torch.distributed.checkpoint import state_dict  # slow to import, too: only runs that save need it

    return state_dict.get_model_state_dict(model, options=_whole(state_dict))


def whole_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer's state, by name of the parameter, as whole tensors on the CPU, in the first process."""
    from torch.distributed.checkpoint import state_dict

    return state_dict.get_optimizer_state_dict(model, optimizer, options=_whole(state_dict))


def load_whole(model: torch.nn.Module, weights: dict, optimizer: torch.optim.Optimizer, optimizer_state: dict) -> None:
    """Loads what the two functions above returned, given to every process, in any number of them."""
    from torch.distributed.checkpoint import state_dict

    options = state_dict.StateDictOptions(full_state_dict=True)
    state_dict.set_model_state_dict(model, weights, options=options)
    state_dict.set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)


def _whole(state_dict):
    return state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
