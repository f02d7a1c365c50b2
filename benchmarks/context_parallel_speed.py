"""What does a sequence that is spread over processes cost: bytes that each sends for a layer, and the time of a step?

    python benchmarks/context_parallel_speed.py                     # measured here, with gloo: a minute and a half
    python benchmarks/context_parallel_speed.py --on-paper          # H100s, by the model of speed_of_light.py

A step is the forward and backward pass of one layer's attention. All processes run on this machine and share its cores,
so that the times show the work that a way adds, and neither a speed-up nor a network. Contestants:

    ours                        the halo of the window: kernels/context_parallel.py
    all-gather                  every process gets all keys and values, and computes its queries by our kernel
    ring, all earlier keys      keys and values go round; it has no window (Liu et al. 2023, arXiv:2310.01889)
    PyTorch's context_parallel  torch.distributed.tensor.experimental, without a window, where it has a CPU kernel

Columns: ms, the median step (20th to 80th percentile) between two barriers; MB sent, counted at every send, forward and
backward, by the process that sends most; x ours, its time over ours with as many processes. On paper: MB, what a
process sends forward for its halo, as much comes back backward; move, its time by NVLink (450 GB/s a direction) and by
400 Gb/s; compute, the model's time for the queries that need no halo, forward, and backward. A halo is hidden where
compute takes longer than move.
"""

import os
import sys
import tempfile
import time
from functools import partial

import drawing
import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
import torch.distributed as dist
import torch.nn.functional as F
from measure import alternate, ratio, shown, table

from kernels import compiled, sliding_gqa_attention
from kernels import context_parallel as ours

SECONDS = {"quick": 15.0, "default": 60.0}
OURS = "ours"


def main(arguments=None):
    flags = harness.parser("context_parallel_speed", __doc__)
    flags.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    flags.add_argument("--positions", type=int, help="of the whole sequence (8,192; --quick 2,048)")
    flags.add_argument("--window", type=int, default=256, help="keys that a query sees")
    flags.add_argument("--on-paper", action="store_true", help="the table of H100s; nothing is measured")
    harness.add_only(flags, CONTESTANTS)
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    if options.on_paper:
        return paper
    if device.type != "cpu":
        raise harness.BadInput(f"--device is {device}: several processes are measured with gloo, on cpu")
    positions = options.positions or (2048 if options.quick else 8192)
    for count in options.processes:
        if count < 1 or positions % count:
            raise harness.BadInput(f"--processes has {count}, which does not divide the {positions} positions")
    names = list(harness.chosen(options.only, CONTESTANTS))
    points = {f"{count} processes": count for count in options.processes}
    return partial(measure, names, positions, options.window, harness.budget(options, points, SECONDS))


def all_gather(q, k, v, window, rank, size):
    """Attention after every process received all keys and values, by point-to-point messages."""
    T = q.shape[2]
    exchange = ours._Exchange(dist.group.WORLD, ours._plan(rank, size, T, size * T, size * T), None)
    k, v, ticket = ours._Start.apply(k, v, exchange)
    others = ours._Finish.apply(ticket, exchange)
    k, v = (torch.cat([other[:, :, : rank * T], x], 2) for other, x in zip(others, (k, v), strict=True))
    return sliding_gqa_attention(q, k, v, window)


class _Rotate(torch.autograd.Function):
    """To the next process of the ring, from the one before it; backward the other way."""

    @staticmethod
    def forward(ctx, x, rank, size, way=1):
        ctx.ring = rank, size, -way
        found = torch.empty_like(x)
        ops = [dist.P2POp(dist.irecv, found, (rank - way) % size)]
        ops.append(dist.P2POp(dist.isend, x.contiguous(), (rank + way) % size))
        for sent in dist.batch_isend_irecv(ops):
            sent.wait()
        return found

    @staticmethod
    def backward(ctx, grad):
        return _Rotate.forward(ctx, grad, *ctx.ring), None, None, None


def ring(q, k, v, window, rank, size):
    """Attention over all earlier keys; the results of the parts are joined by their log-sum-exps."""
    parts, kv = [sliding_gqa_attention(q, k, v, return_lse=True)], torch.stack([k, v])
    for step in range(1, size):
        kv = _Rotate.apply(kv, rank, size)
        if rank >= step:
            parts.append(sliding_gqa_attention(q, *kv, (None, None), return_lse=True))
    outs, lses = (torch.stack(part) for part in zip(*parts, strict=True))
    out = (lses.softmax(0)[..., None] * outs).sum(0)
    return out + 0 * kv[..., 0, 0].sum()  # so that the backward pass of every process goes all the way round


def pytorchs(q, k, v, window, rank, size):
    """PyTorch's own, a ring. It divides the tensors that it is given; ours are parts, so it gets another."""
    from torch.distributed.tensor.experimental import context_parallel

    mesh, other = dist.init_device_mesh("cpu", (size,)), torch.empty(1, 2 * size)
    with context_parallel(mesh, buffers=[other], buffer_seq_dims=[1]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


CONTESTANTS = {  # name: (function, whether it has a window)
    OURS: (lambda q, k, v, window, rank, size: ours.context_parallel_attention(q, k, v, window), True),
    "all-gather": (all_gather, True),
    "ring, all earlier keys": (ring, False),
    "PyTorch's context_parallel": (pytorchs, False),
}


class CountedSends:
    """Inside the block, counts the bytes that this process sends to single others."""

    def __enter__(self):
        self.bytes, self._send = 0, dist.batch_isend_irecv
        dist.batch_isend_irecv = self._count
        return self

    def _count(self, ops):
        self.bytes += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return self._send(ops)

    def __exit__(self, *exception):
        dist.batch_isend_irecv = self._send


def work(rank, size, names, positions, window, seconds, directory):
    """One process: checks, counts and times each contestant. Rank 0 writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    T, inputs = positions // size, [torch.randn(1, heads, positions, 64) for heads in (8, 2, 2)]
    part = slice(rank * T, (rank + 1) * T)
    mine = [x[:, :, part].clone().requires_grad_() for x in inputs]
    calls, sent, not_timed, started = {}, {}, {}, time.perf_counter()
    for name in names:
        attend, windowed = CONTESTANTS[name]
        expected = sliding_gqa_attention(*inputs, window if windowed else None)[:, :, part]
        try:
            torch.testing.assert_close(attend(*mine, window, rank, size), expected, atol=1e-4, rtol=0)
        except NotImplementedError as failure:  # in all processes alike
            not_timed[name] = harness.in_a_line(failure)
            continue

        def step(attend=attend):
            attend(*mine, window, rank, size).sum().backward()
            for x in mine:
                x.grad = None

        with CountedSends() as counted:
            step()
        most = torch.tensor(counted.bytes)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        calls[name], sent[name] = step, most.item()
    began = time.perf_counter()
    for step in calls.values():
        step()
    now = time.perf_counter()
    rounds = torch.tensor(min(30, max(3, int((seconds - (began - started)) / (now - began)))))
    dist.all_reduce(rounds, dist.ReduceOp.MIN)

    def between_barriers(step):
        dist.barrier()
        began = time.perf_counter()
        step()
        dist.barrier()
        return time.perf_counter() - began

    # every process draws the same order, and as many rounds
    times = alternate(calls, "cpu", 0, rounds.item(), rounds.item(), between_barriers, turn_seconds=0)
    if rank == 0:
        timed = {name: (spread.as_dict(), sent[name]) for name, spread in times.items()}
        torch.save((timed, not_timed), f"{directory}/found")
    dist.destroy_process_group()


def measure(names, positions, window, budget):
    rows = []
    for size in budget:
        with tempfile.TemporaryDirectory() as directory:
            arguments = size, names, positions, window, budget.share(), directory
            torch.multiprocessing.spawn(work, arguments, nprocs=size)
            found, not_timed = torch.load(f"{directory}/found")
        shape = f"{size} process{'es' * (size > 1)}"
        base = found[OURS][0]["median_ms"] if OURS in found else None
        for name, (spread, sent) in found.items():
            row = {"contestant": name, "shape": shape, "processes": size, "not_timed": None, **spread}
            rows.append(row | {"mb_sent": sent / 1e6, "x_ours": base and row["median_ms"] / base})
        for name, why in not_timed.items():
            rows.append({"contestant": name, "shape": shape, "processes": size, "not_timed": why})
    columns = {
        "processes": lambda row: str(row["processes"]),
        "contestant": lambda row: row["contestant"],
        "ms": shown,
        "MB sent": lambda row: f"{row['mb_sent']:.2f}",
        "x ours": ratio("x_ours"),
    }
    title = f"{positions:,} positions, window {window}, 8 heads on 2, D = 64, fp32, forward + backward"
    notes = [f"the processes share {os.cpu_count()} cores, one thread each: no speed-up can show"]
    return {
        "settings": {"positions": positions, "window": window, "dtype": "fp32"},
        "rows": rows,
        "tables": [table(title, rows, columns, notes)],
        "plots": [{"title": title, "x": "MB sent a process", "bars": drawing.bars(rows, lambda row: row["mb_sent"])}],
        "left_out": budget.left_out,
    }


LINKS = {"NVLink": 450e9, "400 Gb/s": 50e9}  # bytes a second in one direction
HEADS, KV_HEADS, HEAD_DIM, ELEMENT_BYTES = 32, 8, 128, 2
PAPER = [
    (total, gpus, window) for total in (2**20, 2**24) for gpus in (64, 1024) for window in (1024, 2048, 4096, 8192)
]


def paper():
    """The table of H100s: halo bytes, their time, and the model's time for what runs meanwhile."""
    import speed_of_light as model

    made = {}
    for launch in compiled.launches("sm_90", head_dim=HEAD_DIM, dtype=torch.bfloat16, rope=True):
        if launch.name.startswith("attention"):
            harness.progress(f"compiling {launch.name}")
            made[launch.name] = compiled.compile_launch(launch, "sm_90")
    rows = []
    for total, gpus, window in PAPER:
        T = total // gpus
        plan = ours._plan(gpus - 1, gpus, T, window - 1, 0)
        shape = model.Shape(1, HEADS, KV_HEADS, T, HEAD_DIM, window)
        alone = max(0, T - window + 1) / T  # of the queries need no halo
        ms = {name: model.attention_estimate(one, shape, ELEMENT_BYTES, rope=True) for name, one in made.items()}
        forward = ms["attention_forward"].overlapped_ms * alone
        backward = (ms["attention_dq"].overlapped_ms + ms["attention_dkdv"].overlapped_ms) * alone
        position = 2 * KV_HEADS * HEAD_DIM * ELEMENT_BYTES
        row = {"positions": total, "gpus": gpus, "part": T, "window": window, "hops": len(plan.receives)}
        row |= {"mb_sent": plan.before * position / 1e6, "mb_all": (total - T) * position / 1e6}
        row |= {"forward_ms": forward, "backward_ms": backward, "not_timed": None}
        for link, rate in LINKS.items():
            row[link] = plan.before * position / rate * 1e3
            row[f"{link} hides"] = row[link] < min(forward, backward)
        rows.append(row)
    columns = ["positions", "GPUs", "a part", "window", "sources", "MB", "all-gather MB", *LINKS, "compute", "backward",
               *(f"hidden by {link}" for link in LINKS)]  # fmt: skip
    lines = [
        [f"{row['positions'] // 2**20} M", f"{row['gpus']:,}", f"{row['part']:,}", f"{row['window']:,}",
         str(row["hops"]), f"{row['mb_sent']:.1f}", f"{row['mb_all']:,.0f}", *(f"{row[link]:.3f}" for link in LINKS),
         f"{row['forward_ms']:.3f}", f"{row['backward_ms']:.3f}",
         *("yes" if row[f"{link} hides"] else "no" for link in LINKS)]
        for row in rows
    ]  # fmt: skip
    title = f"H100, a layer of {HEADS} heads on {KV_HEADS}, D = {HEAD_DIM}, bf16: a MODEL, times in ms"
    notes = ["compute and backward: the busiest pipe alone, the least time that the body can take"]
    tables = [{"title": title, "columns": columns, "rows": lines, "notes": notes}]
    return {"rows": rows, "tables": tables, "plots": [], "failed": []}


if __name__ == "__main__":
    sys.exit(main())
