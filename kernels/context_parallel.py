"""`context_parallel_attention`: attention over a sequence whose parts lie in several processes.

A window reaches its neighbour only. A process that holds T positions reads the window - 1 keys and values before them,
its halo, however long the whole sequence is. Here window = 4, and each of 3 processes holds T = 6 positions:

    process            0                     1                       2
    positions    0 1 2 3 4 5          6 7 8 9 10 11          12 13 14 15 16 17
    halo            none      3 4 5 <--- sent    9 10 11 <--- sent
                          edge   6 7 8  over  3 .. 8         edge  12 13 14  over  9 .. 14
    body         0 .. 5              9 10 11  over  6 .. 11        15 16 17  over  12 .. 17

    forward     post receives and sends; the body; wait; the edge: the queries that see the halo
    backward    the edge; post the halo's gradients, back to its owners; the body; wait, and add what arrived

Posting and waiting are two autograd nodes. The engine runs the nodes that were made last first, which gives the order
of the backward pass. One plan serves all windows: a process takes from every other the keys that it sees of it. A
window longer than a part takes from several processes, window=None from all earlier ones, a right side from later ones.
"""

import functools
import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist

from .attention import autocast_inputs, sliding_gqa_attention
from .backend import resolve_backend
from .checks import check_heads, check_options, check_rope, check_starts, check_starts_values, check_window


def context_parallel_attention(
    q, k, v, window=None, *, group=None, starts=None, scale=None, softcap=None, sinks=None, rope=None,
    return_lse=False, backend="auto",
):  # fmt: skip
    """`sliding_gqa_attention` of a sequence whose parts lie in the processes of `group`, in the order of their ranks.

    q (B, Hq, T, D); k, v (B, Hkv, T, D): this process's T of the n * T positions; T is the same in all n processes.
    Returns this process's part of the output, (B, Hq, T, D), and with return_lse of the log-sum-exp, (B, Hq, T): those
    of one process that holds the whole sequence. Gradients flow to the q, k and v of all processes, each of which must
    therefore call backward, for its layers in the same order.

    window    as in `sliding_gqa_attention`. The keys and values that come from other processes take memory: window - 1
              positions, with window=None all earlier ones.
    group     a process group; None is the default one.
    starts    (B, T) int32, this process's part of the whole sequence's: they count from the sequence's beginning.
    sinks     (Hq,), the same in all processes. The gradient is this process's share: add it up over the group, as
              that of every parameter that each process holds.
    rope      (cos, sin) of the whole sequence, at least n * T long. Where those are too large, rotate q and k before
              (`apply_rope`, with the positions of the part) and give no rope.

    The other arguments are those of `sliding_gqa_attention`. Keys, values and their gradients travel in k's dtype: in
    bf16 the gradient of a key that other processes see is rounded once more for each of them.

    Raises ValueError, in one line: in a process outside the group; and in all processes together if one of them has a
    wrong argument, or shapes, dtype or settings that differ. With gloo they are compared at every call, with NCCL at
    the first call with each combination of them, because comparing waits for the GPU. Later differences, and a process
    that died, end the others by the timeout of the process group.
    """
    group, rank, size = place_in(group)
    line = error = None
    try:
        q, k, v, line = _checked(q, k, v, window, starts, scale, softcap, sinks, rope, backend, rank, size)
    except ValueError as found:
        error = found
    _agree(group, size, line, error)
    window_left, right = check_window(window)
    T, whole = q.shape[2], size * q.shape[2]
    left = whole if window_left is None else min(window_left - 1, whole)
    plan = _plan(rank, size, T, left, whole if right is None else min(right, whole))
    exchange = _Exchange(group, plan, starts)
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "return_lse": return_lse, "backend": backend}

    def attend(first, last, low, high, k_halo=None, v_halo=None, starts_halo=None):
        """The result of queries first .. last - 1 over keys low .. high - 1, both counted from the part's beginning."""
        begin = rank * T + low
        keys, values = (_span(x, halo, plan.before, low, high, 2) for x, halo in ((k, k_halo), (v, v_halo)))
        tables = rope and tuple(table[begin : rank * T + high] for table in rope)
        inside = None
        if starts is not None:  # a document that began before these keys begins with them
            inside = (_span(starts, starts_halo, plan.before, low, high, 1) - begin).clamp(min=0)
        queries, shown = q[:, :, first:last], slice(None)
        if right != 0:  # as many queries as keys: the others' results are dropped
            queries, shown = q[:, :, max(low, 0) : min(high, T)], slice(first - low, last - low)
            none = (q.new_zeros(*q.shape[:2], max(0, missing), q.shape[3]) for missing in (-low, high - T))
            queries = _joined([next(none), queries, next(none)], q)
        result = sliding_gqa_attention(queries, keys, values, window, starts=inside, rope=tables, **options)
        return [x[:, :, shown] for x in (result if return_lse else (result,))]

    k, v, ticket = _Start.apply(k, v, exchange)
    body = attend(*plan.body) if plan.body else None
    halo = _Finish.apply(ticket, exchange)
    parts = [attend(*edge, *halo, exchange.starts) for edge in plan.edges]
    if body:
        parts.insert(1 if plan.before else 0, body)
    out, *lse = (_joined(results, q) for results in zip(*parts, strict=True))
    return (out, *lse) if return_lse else out


def place_in(group=None):
    """(group, rank, size): the process group, None for the default one, this process's rank in it, and its size.

    Raises ValueError in a process that is in none, or not in this one.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("context parallelism needs a process group: torch.distributed.init_process_group makes one")
    group = dist.group.WORLD if group is None else group
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"process {dist.get_rank()} is not in the group: only its processes may call this")
    return group, rank, dist.get_world_size(group)


def _checked(q, k, v, window, starts, scale, softcap, sinks, rope, backend, rank, size):
    """q, k and v in the dtype that they are computed in, and a line that all processes must have alike."""
    q, k, v = autocast_inputs(q, k, v)
    check_heads(q, k, v, "k", "v")
    T = q.shape[2]
    if k.shape[2] != T:
        raise ValueError(f"k has {k.shape[2]} positions, expected q's {T}: each process holds one part of the sequence")
    scale, softcap = check_options(q, scale, softcap, sinks)
    check_starts(starts, q, T)
    if starts is not None and starts.is_cpu:
        check_starts_values((starts - rank * T).clamp(min=0))
    check_rope(rope, size * T, q)
    resolve_backend(backend, q.device, q.dtype, q.shape[3])
    sides = check_window(window)
    grads = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if grads and not (k.requires_grad or v.requires_grad):
        k = k.detach().requires_grad_()  # _Finish needs a node in the graph
    given = " ".join(name for name, x in (("starts", starts), ("sinks", sinks), ("rope", rope)) if x is not None)
    line = (
        f"q {tuple(q.shape)}, k {tuple(k.shape)} of {q.dtype}, window {sides}, scale {scale}, softcap {softcap}, "
        f"{given or 'nothing'} given, {'with' if grads else 'without'} gradients"
    )
    return q, k, v, line


_LINE_BYTES = 512
_agreed = weakref.WeakKeyDictionary()  # {group: lines that all its processes have had}, for GPUs


def _agree(group, size, line, error):
    """Raise the same ValueError in all processes if one of them has an error, or a line that differs."""
    if size == 1:
        if error is not None:
            raise error
        return
    on_gpu = dist.get_backend(group) == "nccl"
    waits = on_gpu or "nccl" in str(dist.get_backend_config(group))
    agreed = _agreed.setdefault(group, set())
    if waits and error is not None and agreed:  # the others no longer compare
        raise error
    if waits and line in agreed:
        return
    text = (line if error is None else f"!{error}").encode()[:_LINE_BYTES]
    mine = torch.tensor(list(text.ljust(_LINE_BYTES)), dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(gathered, mine, group=group)
    if error is None and all(torch.equal(other, mine) for other in gathered):
        agreed.add(line)
        return
    lines = [bytes(other.tolist()).decode(errors="replace").rstrip() for other in gathered]
    for rank, text in enumerate(lines):
        if text.startswith("!"):
            raise ValueError(f"process {rank} of the group: {text[1:]}") from error
    rank = next(rank for rank, text in enumerate(lines) if text != lines[0])
    raise ValueError(f"process {rank} of the group has {lines[rank]}; process 0 has {lines[0]}: all need the same")


class _Plan(NamedTuple):
    """What a process sends and receives, and how its queries are divided. Positions count from the part's beginning."""

    before: int  # positions of the halo before the part
    after: int  # and after it
    receives: tuple  # (process, first row of the halo, row after the last)
    sends: tuple  # (process, first position, position after the last)
    body: tuple  # (first query, end, first key, end) of the queries that see this part only; () for none
    edges: tuple  # the same of the others


@functools.lru_cache(maxsize=64)
def _plan(rank, size, T, left, right):
    def seen(reader, owner):
        """The positions of the whole sequence that `reader` sees and `owner` holds."""
        return max(owner * T, reader * T - left), min((owner + 1) * T, (reader + 1) * T + right)

    low, high = max(0, rank * T - left), min(size * T, (rank + 1) * T + right)
    before, after = rank * T - low, high - (rank + 1) * T
    receives, sends = [], []
    for other in range(size):
        row = low if other < rank else low + T
        for found, owner, reader, zero in ((receives, other, rank, row), (sends, rank, other, rank * T)):
            first, last = seen(reader, owner)
            if other != rank and first < last:
                found.append((other, first - zero, last - zero))
    near, far = left if before else 0, right if after else 0  # queries that see the halo, at both ends
    if (before or after) and near + far >= T:
        body, edges = (), [(0, T, -before, T + after)]
    else:
        body, edges = (near, T - far, 0, T), []
        if near:
            edges.append((0, near, -before, min(near + right, T)))
        if far:
            edges.append((T - far, T, max(0, T - far - left), T + after))
    return _Plan(before, after, tuple(receives), tuple(sends), body, tuple(edges))


class _Exchange:
    """The halo of one call on its way, and its gradient on the way back.

    A message is (positions, 2, B, Hkv, D), keys and values together, so that those of each process are one piece of
    memory. All buffers are held until `wait`: with NCCL they are used on its stream, and only from then on is the
    current stream behind it, where a freed buffer's memory may be used again (record_stream would do the same).
    """

    def __init__(self, group, plan, starts):
        self.group, self.plan, self.starts = group, plan, starts
        self.works, self.buffers, self.returning = [], None, False

    def start(self, k, v):
        plan, messages = self.plan, {}
        halo, starts = _message(k, plan.before + plan.after), None
        for _, first, last in plan.sends:
            if (first, last) not in messages:
                messages[first, last] = _packed(k[:, :, first:last], v[:, :, first:last])
        receives = [(other, halo[first:last]) for other, first, last in plan.receives]
        sends = [(other, messages[first, last]) for other, first, last in plan.sends]
        if self.starts is not None:
            starts = self.starts.new_empty(plan.before + plan.after, len(self.starts))
            receives += [(other, starts[first:last]) for other, first, last in plan.receives]
            sends += [(other, self.starts[:, first:last].T.contiguous()) for other, first, last in plan.sends]
        self.buffers = halo, starts, sends
        self._post(receives, sends)

    def finish(self):
        halo, starts, _ = self._wait()
        self.starts = None if starts is None else starts.T
        return _unpacked(halo)

    def start_back(self, *halo_grads):
        plan, sends = self.plan, []
        if plan.receives:
            message = _packed(*halo_grads)
            sends = [(other, message[first:last]) for other, first, last in plan.receives]
        receives = [(other, _message(halo_grads[0], last - first)) for other, first, last in plan.sends]
        self.buffers, self.returning = (receives, sends), True
        self._post(receives, sends)

    def finish_back(self, dk, dv):
        if not self.returning:  # this process has no halo, or nothing that used it
            empty = dk.new_zeros(*dk.shape[:2], self.plan.before + self.plan.after, dk.shape[3])
            self.start_back(empty, empty)
        receives, _ = self._wait()
        self.returning = False
        if not receives:
            return dk, dv
        wide = torch.promote_types(dk.dtype, torch.float32)
        sums = dk.to(wide, copy=True), dv.to(wide, copy=True)
        for (_, message), (_, first, last) in zip(receives, self.plan.sends, strict=True):
            for total, part in zip(sums, _unpacked(message), strict=True):
                total[:, :, first:last] += part
        return tuple(total.to(dk.dtype) for total in sums)

    def _post(self, receives, sends):
        messages = [(dist.irecv, *message) for message in receives] + [(dist.isend, *message) for message in sends]
        group, global_rank = self.group, dist.get_global_rank
        ops = [dist.P2POp(op, tensor, global_rank(group, other), group) for op, other, tensor in messages]
        self.works = dist.batch_isend_irecv(ops) if ops else []

    def _wait(self):
        for work in self.works:
            work.wait()
        buffers, self.works, self.buffers = self.buffers, [], None
        return buffers


def _message(like, positions):
    """An empty message for so many positions of k or v (B, Hkv, T, D)."""
    B, Hkv, _, D = like.shape
    return like.new_empty(positions, 2, B, Hkv, D)


def _packed(k, v):
    message = _message(k, k.shape[2])
    message[:, 0], message[:, 1] = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
    return message


def _unpacked(message):
    """The keys and the values of a message, views (B, Hkv, positions, D)."""
    return message[:, 0].permute(1, 2, 0, 3), message[:, 1].permute(1, 2, 0, 3)


class _Start(torch.autograd.Function):
    """Posts the halo's messages. Backward waits for its gradient: it is the last of a call's nodes."""

    @staticmethod
    def forward(ctx, k, v, exchange):
        ctx.exchange = exchange
        exchange.start(k, v)
        return k, v, k.new_empty(0)  # the last ties _Finish to this node

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dk, dv, _):
        return *ctx.exchange.finish_back(dk, dv), None


class _Finish(torch.autograd.Function):
    """Waits for the halo: its keys and values. Backward posts the messages of its gradient."""

    @staticmethod
    def forward(ctx, ticket, exchange):
        ctx.exchange = exchange
        # torch.utils.checkpoint recomputes until it has the last saved tensor. In a process that sees no halo that
        # would be the body's, and a message that nobody waits for is never sent: its reader would wait for ever.
        ctx.save_for_backward(ticket)
        return exchange.finish()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dk, dv):
        ctx.exchange.start_back(dk, dv)
        return dk.new_zeros(0), None


def _span(x, halo, before, low, high, dim):
    """Positions low .. high - 1 of x and its halo, whose first `before` positions lie before x's."""
    T = x.shape[dim]
    pieces = [x.narrow(dim, max(low, 0), min(high, T) - max(low, 0))]
    if low < 0:
        pieces.insert(0, halo.narrow(dim, before + low, -low))
    if high > T:
        pieces.append(halo.narrow(dim, before, high - T))
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]


def _joined(parts, q):
    """The parts (B, H, T, D), or (B, H, T), one after the other, in the memory layout of q."""
    parts = [part for part in parts if part.shape[2]] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    if parts[0].dim() == 4 and q.stride(2) > q.stride(1):
        return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)
    return torch.cat(parts, 2)
