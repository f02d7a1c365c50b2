"""Context parallelism on 1 to 4 processes with gloo gives what one process gives that holds the whole sequence.

Four processes run all cases once, in groups of 1 to 4, and each writes what it found to a file that the tests read.
"""

import contextlib
import datetime
import functools
import json
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from kernels import document_starts, rope_tables, sliding_gqa_attention
from kernels.context_parallel import _plan, context_parallel_attention

GROUPS = {1: [2], 2: [1, 3], 3: [0, 1, 3], 4: [0, 1, 2, 3]}  # ranks in a group are not always those of the world
T = 6  # positions of a process, unless a case says otherwise
ALL = {"rope": True, "sinks": True, "softcap": 3.0, "lse": True, "starts": True}
CASES = {
    "its own key only": {"window": 1},
    "a small window": {"window": 4},
    "a window as long as a part": {"window": 6},
    "a window that needs one more than a part": {"window": 8},
    "a window longer than two parts": {"window": 15},
    "all earlier keys": {"window": None},
    "all earlier keys, with everything": {"window": None, **ALL},
    "a window longer than the sequence": {"window": 100, "rope": True},
    "rope": {"window": 4, "rope": True},
    "sinks": {"window": 4, "sinks": True},
    "softcap": {"window": 8, "softcap": 2.0},
    "the gradient of lse": {"window": 4, "lse": True},
    "documents": {"window": 4, "starts": True},
    "documents longer than a part": {"window": 15, "starts": True, "rope": True},
    "everything": {"window": 5, **ALL},
    "one KV head": {"window": 4, "heads": (6, 1), **ALL},
    "as many KV heads": {"window": 4, "heads": (2, 2)},
    "one position each": {"window": 3, "T": 1},
    "no positions": {"window": 3, "T": 0},
    "two sides": {"window": (2, 1)},
    "two sides, a long part": {"window": (3, 5), "T": 20, **ALL},
    "later keys only": {"window": (0, 3), "rope": True},
    "two sides longer than a part": {"window": (7, 9), **ALL},
    "all keys": {"window": (None, None), **ALL},
    "all later keys": {"window": (2, None), "starts": True},
    "all earlier keys and some later ones": {"window": (None, 2), "starts": True, "rope": True},
}
BACKENDS = ("reference", "auto")


def whole(size, window, T=T, heads=(4, 2), rope=False, sinks=False, softcap=None, lse=False, starts=False):
    """((q, k, v), the weights of out and lse in the loss, options) of a whole sequence; the same in all processes."""
    torch.manual_seed(size * 100 + T)
    B, D, N = 2, 8, size * T

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    q, k, v = (draw(B, N, h, D).transpose(1, 2) for h in (heads[0], heads[1], heads[1]))
    weights = draw(B, heads[0], N, D), draw(B, heads[0], N) if lse else None
    options = {"window": window, "softcap": softcap, "sinks": draw(heads[0]) if sinks else None}
    if rope:
        options["rope"] = tuple(table.double() for table in rope_tables(N + 3, 6))
    if starts:  # documents of 1, 2, ... positions in the first row, three in the second
        position = torch.arange(N)
        ids = torch.stack([((8 * position + 1).sqrt().long() - 1) // 2, 3 * position // max(N, 1)])
        options["starts"] = document_starts(document_ids=ids)
    return (q, k, v), weights, options


def run(attend, qkv, weights, sinks=None, **options):
    """out, lse and the gradients of q, k, v and sinks."""
    inputs = [x.detach().requires_grad_() for x in (*qkv, *([] if sinks is None else [sinks]))]
    out, lse = attend(*inputs[:3], sinks=inputs[3] if len(inputs) > 3 else None, return_lse=True, **options)
    loss = (out * weights[0]).sum() + (0 if weights[1] is None else (lse * weights[1]).sum())
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)]


def largest_error(case, backend, group, attend=context_parallel_attention):
    """The largest difference, over all results of this process, from one process with the whole sequence."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    qkv, weights, options = whole(size, **case)
    expected = run(sliding_gqa_attention, qkv, weights, backend="reference", **options)
    length = case.get("T", T)
    mine = slice(rank * length, (rank + 1) * length)
    if "starts" in options:
        options["starts"] = options["starts"][:, mine]
    parts, mine_of_weights = ([None if x is None else x[:, :, mine] for x in some] for some in (qkv, weights))
    found = run(functools.partial(attend, group=group), parts, mine_of_weights, backend=backend, **options)
    assert found[0].stride(1) <= found[0].stride(2) or length < 2  # q's memory layout
    for i in range(5):
        expected[i] = expected[i][:, :, mine]
    if case.get("sinks"):
        dist.all_reduce(found[5], group=group)
    return max((a - b).abs().max().item() if a.numel() else 0.0 for a, b in zip(found, expected, strict=True))


def recomputed(*arguments, **options):
    return checkpoint(context_parallel_attention, *arguments, use_reentrant=False, **options)


def message_of(function):
    try:
        function()
    except ValueError as error:
        return str(error)


def refusals(group, rank):
    """What each process of a group of two says if one of them (`rank`) has something else."""

    def call(dtype=torch.float32, length=6, window=3, **options):
        x = torch.zeros(1, 2, length, 8, dtype=dtype)
        return message_of(lambda: context_parallel_attention(x, x, x, window, group=group, **options))

    differing = {
        "length": {"length": 5},
        "dtype": {"dtype": torch.float64},
        "window": {"window": 4},
        "wrong": {"window": 0},
        "starts": {"starts": torch.full((1, 6), 9, dtype=torch.int32)},
    }
    return {name: call(**(options if rank else {})) for name, options in differing.items()} | {"none": call()}


class Counted:
    """Inside the block, counts the bytes that this process sends from one to another."""

    def __enter__(self):
        self.bytes, self._post = 0, dist.batch_isend_irecv
        dist.batch_isend_irecv = self._count
        return self

    def _count(self, ops):
        self.bytes += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return self._post(ops)

    def __exit__(self, *exception):
        dist.batch_isend_irecv = self._post


def work(rank, directory):
    """One of the four processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=4)
    groups = {size: dist.new_group(ranks) for size, ranks in GROUPS.items()}
    short = dist.new_group([0, 1, 2, 3], timeout=datetime.timedelta(seconds=2))
    found = {"outside": {}, "errors": {}}
    for size, ranks in GROUPS.items():
        if rank not in ranks:
            x = torch.zeros(1, 2, 6, 8)
            call = functools.partial(context_parallel_attention, x, x, x, 3, group=groups[size])
            found["outside"][size] = message_of(call)
            continue
        for name, case in CASES.items():
            for backend in BACKENDS:
                found["errors"][f"{name}, {backend}, {size}"] = largest_error(case, backend, groups[size])
    for number in range(10):  # it once waited for ever where another program had a core
        found["errors"][f"recomputed {number}"] = largest_error(CASES["everything"], "auto", groups[4], recomputed)
        x = torch.zeros(1, 2, 6, 8)
        recomputed(x.clone().requires_grad_(), x, x, 5).sum().backward()
    if rank in GROUPS[2]:
        found["refused"] = refusals(groups[2], GROUPS[2].index(rank))
    x = torch.randn(2, 2, 64, 8, dtype=torch.float64, requires_grad=True)
    with Counted() as forward:
        out = context_parallel_attention(x, x, x, 5)
    with Counted() as backward:
        out.sum().backward()
    found["bytes"] = [forward.bytes, backward.bytes]
    with torch.autocast("cpu", torch.bfloat16), Counted() as forward:
        out = context_parallel_attention(x.float(), x.float(), x.float(), 5)
    found["autocast"] = [str(out.dtype), forward.bytes]
    dist.barrier()
    began = time.monotonic()
    if rank == 3:  # as a process that hangs
        time.sleep(6)
    else:
        with contextlib.suppress(RuntimeError):
            context_parallel_attention(x, x, x, 5, group=short)
            found["went on"] = True
    found["seconds"] = time.monotonic() - began
    (directory / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # the broken group of the last case has nothing to clean up


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the four processes found."""
    directory = tmp_path_factory.mktemp("processes")
    processes = torch.multiprocessing.spawn(work, (directory,), nprocs=4, join=False)
    until = time.monotonic() + 300
    while not processes.join(5):  # raises what the first one to fail has raised, and ends the others
        if time.monotonic() > until:
            for process in processes.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_one_process(found, name, size):
    for backend in BACKENDS:
        errors = [found[rank]["errors"][f"{name}, {backend}, {size}"] for rank in GROUPS[size]]
        assert max(errors) < 1e-10


def test_a_checkpointed_call_exchanges_again_and_has_the_same_gradients(found):
    for number in range(10):
        assert max(process["errors"][f"recomputed {number}"] for process in found) < 1e-10


def test_bytes_are_those_of_the_halo(found):
    """Two tensors, 4 positions of window 5, 2 rows of 2 heads of 8 elements of 8 bytes: whatever T is."""
    halo = 2 * 4 * 2 * 2 * 8 * 8
    assert [process["bytes"] for process in found] == [[halo, 0], [halo, halo], [halo, halo], [0, halo]]


def test_under_autocast_the_halo_travels_in_its_dtype(found):
    assert [process["autocast"] for process in found] == [["torch.bfloat16", n] for n in (512, 512, 512, 0)]


def test_differences_are_refused_in_all_processes_together(found):
    said = [found[rank]["refused"] for rank in GROUPS[2]]
    assert said[0] == said[1] and said[0].pop("none") is None
    assert said[0]["length"].startswith("process 1 of the group has q (1, 2, 5, 8), k (1, 2, 5, 8) of torch.float32")
    assert "float64" in said[0]["dtype"] and "window (4, 0)" in said[0]["window"]
    assert said[0]["wrong"].startswith("process 1 of the group: window is 0, expected None or at least 1")
    assert "process 1 of the group: starts[0, 0] is 3" in said[0]["starts"]
    assert not any("\n" in line for line in said[0].values())


def test_a_process_outside_the_group_is_refused(found):
    for rank, process in enumerate(found):
        assert set(process["outside"]) == {str(size) for size, ranks in GROUPS.items() if rank not in ranks}
        for line in process["outside"].values():
            assert line == f"process {rank} is not in the group: only its processes may call this"


def test_a_process_that_hangs_ends_the_others_by_the_timeout(found):
    for process in found[:3]:
        assert "went on" not in process and process["seconds"] < 5.5


def test_without_a_process_group_it_says_what_is_missing():
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="context parallelism needs a process group"):
        context_parallel_attention(x, x, x, 2)


def test_a_process_of_1024_sends_to_its_neighbour_only():
    plan = _plan(500, 1024, 16384, 8191, 0)
    assert plan.receives == ((499, 0, 8191),) and plan.sends == ((501, 16384 - 8191, 16384),)
    assert plan.body == (8191, 16384, 0, 16384) and plan.edges == ((0, 8191, -8191, 8191),)
