"""Several processes that train one model, by PyTorch's DDP or FSDP2, applied from outside the model.

    torchrun --nproc-per-node 2 -m train --fused-kernels --parallel ddp

ddp     every process holds all weights; the gradients are averaged (DistributedDataParallel)
fsdp    every process holds a shard of weights, gradients and optimizer state; a block is gathered when it is needed
        (fully_shard)

Each process takes an equal part of every batch, and with context_parallel n of them share the tokens of each of its
sequences (kernels/context_parallel.py). So a run has the same losses, up to rounding, for any number of processes.
Checkpoints hold full tensors by name, so any number of processes can resume them. gloo sends CPU tensors, NCCL sends
GPU tensors.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

# torchrun sends its processes a second Ctrl-C after the terminal's: two within this many seconds are one
_REPEAT_SECONDS = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


def is_main_process() -> bool:
    """Whether this is rank 0, which prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def local_device(parallel: str, name: str) -> str:
    """The device that `name` means in this process: with several GPUs, each process takes its own."""
    if parallel == "none" or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def join_processes(parallel: str, device: torch.device, context_parallel: int = 1) -> "Processes":
    """Joins torchrun's process group, or uses the one that exists. Raises ValueError if the arguments do not fit it."""
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
    world_size = dist.get_world_size()
    if world_size % context_parallel:
        raise ValueError(
            f"context_parallel is {context_parallel}, which does not divide the {world_size} processes: change one"
        )
    return Processes(parallel, dist.get_rank(), world_size, context_parallel)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them (`rank`) sees them. With world_size 1 nothing is sent.

    They form a mesh of 2 dimensions: a row of `context` neighbours shares its sequences, the rows share the batches.
    """

    parallel: str
    rank: int = 0
    world_size: int = 1
    context: int = 1

    @property
    def rows(self) -> tuple[int, int]:
        """(this process's row of the mesh, the number of rows)."""
        return self.rank // self.context, self.world_size // self.context

    def local_batch_size(self, batch_size: int) -> int:
        """Examples of a batch that each process takes. Raises ValueError if the parts are not equal."""
        rows = self.rows[1]
        if batch_size % rows:
            sharing = f"{rows} processes" if self.context == 1 else f"{rows} groups of {self.context} processes"
            raise ValueError(f"batch_size is {batch_size}, which {sharing} cannot share equally: take a multiple")
        return batch_size // rows

    def require_equal_parts(self, batch_size: int, length: int) -> None:
        """Raises ValueError unless all processes can have equal parts of such batches and of sequences so long."""
        self.local_batch_size(batch_size)
        if length % self.context:
            raise ValueError(
                f"context_parallel is {self.context}, which does not divide the context size {length}: change one"
            )

    def tokens(self, batch) -> list[torch.Tensor]:
        """This process's tokens of tensors (B, T), all of which its row has: (B, T / context) each."""
        number = self.rank % self.context
        parts = (slice(number * t.shape[1] // self.context, (number + 1) * t.shape[1] // self.context) for t in batch)
        return [tensor[:, part] for tensor, part in zip(batch, parts, strict=True)]

    def distribute(self, model: torch.nn.Module, device: torch.device, compiled: bool = False) -> torch.nn.Module:
        """The module to call in training. Under fsdp, the model's parameters become shards in place."""
        if self.context > 1:
            mesh = dist.init_device_mesh(device.type, (self.rows[1], self.context), mesh_dim_names=("data", "context"))
            model.split_sequences(mesh.get_group("context"))
        if self.parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard

            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    dist.broadcast(tensor, 0)
            mesh = dist.init_device_mesh(device.type, (self.world_size,))
            for block in getattr(model, "blocks", ()):
                if compiled:
                    block.compile()
                fully_shard(block, mesh=mesh)
            return fully_shard(model, mesh=mesh)
        if self.parallel == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(model)
        return torch.compile(model) if compiled else model

    @contextlib.contextmanager
    def gradient_sync(self, module: torch.nn.Module, enabled: bool):
        """Around a forward and backward pass: averages the gradients over the processes only if enabled."""
        if self.parallel == "fsdp":
            module.set_requires_gradient_sync(enabled)
        with module.no_sync() if self.parallel == "ddp" and not enabled else contextlib.nullcontext():
            yield

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of the tensor over the processes."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set in any process."""
        if self.world_size == 1:
            return flags
        found = torch.tensor(flags, dtype=torch.int)  # on the CPU, so that no process waits for its GPU
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return tuple(map(bool, found))

    def run_on_main(self, function, *arguments):
        """Calls the function in rank 0 only. All processes get its result, or raise its error."""
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function(*arguments)
            except (ValueError, OSError, RuntimeError) as error:
                if self.world_size == 1:
                    raise
                outcome[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def leave(self) -> None:
        """Ends the process group."""
        if self.parallel != "none" and dist.is_initialized():
            dist.destroy_process_group()


def exit_process(status: int) -> None:
    """Ends this process; one of several without the interpreter's clean-up.

    There PyTorch's threads abort now and then, after all work is done ("terminate called without an active exception"),
    and torchrun calls the whole run a failure.
    """
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A full tensor that every process holds, sharded as `parameter` is."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # slow to import: only sharded runs pay for it

    # src_data_rank=None: each process cuts out its own shard, and nothing is sent
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def full_weights(model: torch.nn.Module) -> dict:
    """{name: full tensor} of the model on the CPU, in rank 0. All processes must call it."""
    from torch.distributed.checkpoint import state_dict  # slow to import: only runs that save need it

    return state_dict.get_model_state_dict(model, options=_full(state_dict))


def full_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer's state by parameter name, as full tensors on the CPU, in rank 0. All processes must call it."""
    from torch.distributed.checkpoint import state_dict

    return state_dict.get_optimizer_state_dict(model, optimizer, options=_full(state_dict))


def load_full(model: torch.nn.Module, weights: dict, optimizer: torch.optim.Optimizer, optimizer_state: dict) -> None:
    """Loads the results of the two functions above, given to every process; their number may be another one."""
    from torch.distributed.checkpoint import state_dict

    options = state_dict.StateDictOptions(full_state_dict=True)
    state_dict.set_model_state_dict(model, weights, options=options)
    state_dict.set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)


def _full(state_dict):
    return state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


class StopRequest:
    """Inside the block the first SIGINT (Ctrl-C), SIGTERM or SIGHUP sets `requested`; the second acts as it did before.

    The loop reads `requested` between steps, so it stops with complete weights. Under nohup SIGHUP stays
    ignored. Outside the main thread Python takes no signals, and `requested` stays False.
    """

    def __init__(self):
        self.requested = False
        self._handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            signals = [signal.SIGINT, signal.SIGTERM]
            if getattr(signal, "SIGHUP", None) and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                signals.append(signal.SIGHUP)
            for number in signals:
                self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception):
        self._restore()

    def _request(self, number, frame):
        if self.requested:
            if time.monotonic() - self._first > _REPEAT_SECONDS:
                self._restore()
                signal.raise_signal(number)
            return
        self.requested, self._first = True, time.monotonic()
        if not _REPEAT_SECONDS:
            self._restore()
        # not print: the signal may interrupt a print, whose buffered stream cannot be entered twice
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, f"\n{signal.Signals(number).name}: stopping after this step (again: at once)\n".encode())

    def _restore(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
