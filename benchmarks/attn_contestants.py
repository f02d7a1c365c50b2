"""The contestants of attn_speed.py: other ways to compute sliding-window attention, and the check before the timing.

A contestant has one or more ways to call it, and its fastest correct way is timed. A way is a function that prepares a
problem (makes masks, compiles) and returns attend(q, k, v) -> (B, Hq, T, D). The preparation is not timed, but its
memory counts. K and V have Hkv heads; a contestant that cannot group heads repeats them within the timed call.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import harness
import torch
import torch.nn.functional as F
from measure import call_of, random_heads

from kernels import document_starts, resolve_backend, sliding_gqa_attention
from kernels.band import visible_mask, visible_pairs
from kernels.checks import check_window

TOLERANCE = 2  # times the error of the same mathematics in the same dtype, plus one rounding
CAUSAL_ONLY = "it sees no later keys"
CHECK_BLOCK = 256  # query rows that the reference takes at once
CHECK_ALL_PAIRS = 2**23  # visible pairs of a head up to which every row is checked
# seconds a call would take, not minutes, on each kind of device
MOST_DENSE_PAIRS = {"cpu": 12 * 8192**2, "cuda": 64 * 32768**2}


class Problem(NamedTuple):
    """B sequences of T tokens, Hq query heads on Hkv KV heads of size D; window as `sliding_gqa_attention` takes it."""

    T: int
    window: int | tuple[int | None, int | None] | None = None
    Hq: int = 8
    Hkv: int = 2
    D: int = 64
    B: int = 1
    backward: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    lengths: tuple[int, ...] | None = None
    """Of the documents in a sequence; None: one."""
    norm: bool = False
    """Whether q and k are normalised before their rotation, with weights (rope_speed.py)."""

    def inputs(self):
        """q, k, v, and the gradient of the output."""
        *inputs, grad_out = random_heads(self, self.Hq, self.Hkv, self.Hkv, self.Hq)
        return *(x.requires_grad_(self.backward) for x in inputs), grad_out

    @property
    def flops(self):
        """Of the visible pairs: two products forward, and five more backward."""
        pairs = self.B * self.Hq * sum(visible_pairs(n, n, *self.sides) for n in self.lengths or [self.T])
        return 2 * 2 * self.D * pairs * (3.5 if self.backward else 1)

    @property
    def sides(self):
        """(keys up to the query's own, later keys), None for no bound."""
        return check_window(self.window)

    @property
    def is_causal(self):
        return self.sides[1] == 0

    @property
    def starts(self):
        """As `sliding_gqa_attention` takes it."""
        if self.lengths is None:
            return None
        ends = torch.tensor([0, *self.lengths], device=self.device).cumsum(0)
        return document_starts(cu_seqlens=ends, length=self.T).expand(self.B, -1)

    @property
    def places(self):
        """A slice of the sequence for each document."""
        ends = [0, *itertools.accumulate(self.lengths or [self.T])]
        return [slice(*ends) for ends in itertools.pairwise(ends)]

    @property
    def group(self):
        return self.Hq // self.Hkv

    @property
    def pass_name(self):
        return "fwd+bwd" if self.backward else "fwd"


class Contestant(NamedTuple):
    ways: dict[str, Callable]
    """{name: prepare(problem)}, which returns attend(q, k, v)."""
    why_not: Callable[[Problem], str | None] = lambda problem: None
    """Why it cannot take the problem, in a few words; None if it can."""
    windowed: bool = True
    """False: it ignores the window and sees all earlier keys."""
    in_documents: bool = True
    """False: it ignores documents and sees across their borders."""


def ours(problem):
    starts = problem.starts
    return lambda q, k, v: sliding_gqa_attention(q, k, v, problem.window, starts=starts)


def mask_of(problem, length, starts=None):
    """(length, length), or with starts (B, 1, length, length)."""
    window, right = problem.sides
    return visible_mask(length, length, window, problem.device, right=right, starts=starts)


def sdpa_masked(repeated, additive):
    def prepare(problem):
        mask = mask_of(problem, problem.T, starts=problem.starts)
        if additive:
            mask = torch.zeros(mask.shape, dtype=problem.dtype, device=problem.device).masked_fill_(~mask, -torch.inf)
        return _sdpa(problem, repeated, attn_mask=mask)

    return prepare


def sdpa_causal(repeated):
    return lambda problem: _sdpa(problem, repeated, is_causal=True)


def _sdpa(problem, repeated, **options):
    if repeated:
        return lambda q, k, v: F.scaled_dot_product_attention(q, *_repeat(problem, k, v), **options)
    grouped = problem.group > 1
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **options)


def flex(problem):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    starts = problem.starts
    window, right = (problem.T if keys is None else keys for keys in problem.sides)

    def visible(b, h, q_pos, k_pos):
        return (k_pos <= q_pos + right) & (q_pos - k_pos < window)

    def visible_in_document(b, h, q_pos, k_pos):
        return visible(b, h, q_pos, k_pos) & (starts[b, q_pos] == starts[b, k_pos])

    torch._dynamo.reset()  # each shape is compiled alone; after 8 shapes Dynamo would run it uncompiled
    seen, batch = (visible, None) if starts is None else (visible_in_document, problem.B)
    mask = create_block_mask(seen, batch, None, problem.T, problem.T, device=problem.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=problem.group > 1)


def flex_why_not(problem):
    if problem.device.type == "cuda":
        return _too_dense(problem)
    if problem.backward:
        return "it has no backward pass on a CPU"
    return harness.why_not_compile(problem.device) or _too_dense(problem)


def local_attention(problem):
    from local_attention import LocalAttention

    # exact_windowsize sees window_size keys and the query's own; autopad lets T be any number
    attention = LocalAttention(
        window_size=problem.sides[0] - 1, causal=True, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False
    )
    return lambda q, k, v: attention(q, *_repeat(problem, k, v))


def local_attention_why_not(problem):
    if not problem.is_causal:
        return CAUSAL_ONLY
    if problem.sides[0] is None or not 1 < problem.sides[0] <= problem.T:
        return "its windows are of 2 to T keys"
    return harness.not_installed("local_attention")


def xformers(repeated):
    def prepare(problem):
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import LocalAttentionFromBottomRightMask

        window, right = (problem.T if keys is None else keys for keys in problem.sides)
        mask = LocalAttentionFromBottomRightMask(window_left=window - 1, window_right=right)

        def attend(q, k, v):  # wants (B, T, H, D), or with groups (B, T, Hkv, G, D)
            if repeated:
                k, v = _repeat(problem, k, v)
                return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=mask).transpose(
                    1, 2
                )
            q = q.transpose(1, 2).unflatten(2, (problem.Hkv, problem.group))
            k, v = (x.transpose(1, 2)[:, :, :, None].expand_as(q) for x in (k, v))
            return memory_efficient_attention(q, k, v, attn_bias=mask).flatten(2, 3).transpose(1, 2)

        return attend

    return prepare


def flash_attn(problem):
    from flash_attn import flash_attn_func

    window, right = problem.sides
    sides = -1 if window is None else window - 1, -1 if right is None else right  # without the query's own key

    def attend(q, k, v):  # wants (B, T, H, D)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(q, k, v, causal=problem.is_causal, window_size=sides).transpose(1, 2)

    return attend


def _on_gpus_only(module, dtypes=(torch.float32, torch.float16, torch.bfloat16)):
    def why_not(problem):
        if missing := harness.not_installed(module):
            return missing
        if problem.device.type != "cuda":
            return "it runs on GPUs only"
        return None if problem.dtype in dtypes else f"it does not take {problem.dtype}"

    return why_not


def _too_dense(problem):
    pairs = problem.B * problem.Hq * problem.T**2
    return "it computes or stores all T x T pairs" if pairs > MOST_DENSE_PAIRS[problem.device.type] else None


def _repeat(problem, *tensors):
    return (x.repeat_interleave(problem.group, dim=1) for x in tensors) if problem.group > 1 else tensors


CONTESTANTS = {
    "ours": Contestant({"": ours}),
    "SDPA masked": Contestant(
        {
            "grouped heads, bool mask": sdpa_masked(repeated=False, additive=False),
            "grouped heads, additive mask": sdpa_masked(repeated=False, additive=True),
            "repeated heads, additive mask": sdpa_masked(repeated=True, additive=True),
        },
        _too_dense,
    ),
    "SDPA causal": Contestant(
        {"grouped heads": sdpa_causal(repeated=False), "repeated heads": sdpa_causal(repeated=True)},
        lambda problem: _too_dense(problem) if problem.is_causal else CAUSAL_ONLY,
        windowed=False,
    ),
    "FlexAttention": Contestant({"": flex}, flex_why_not),
    "local-attention": Contestant({"": local_attention}, local_attention_why_not),
    "xFormers": Contestant(
        {"grouped heads": xformers(repeated=False), "repeated heads": xformers(repeated=True)},
        _on_gpus_only("xformers"),
    ),
    "flash-attn": Contestant({"": flash_attn}, _on_gpus_only("flash_attn", (torch.float16, torch.bfloat16))),
}


def backend_of_ours(device):
    """The backend that "ours" is on this device."""
    return resolve_backend("auto", device)[0]


class Oracle:
    """The exact results of a problem, and the error that rounding explains; made once for all contestants.

    The exact results are those of the reference in fp64. The budget of a row is TOLERANCE times the error of the same
    mathematics in the problem's dtype, written in plain PyTorch, plus one rounding: the largest of these in its block
    of CHECK_BLOCK rows. A fixed share of a row's norm would not do: a row of dq is a sum whose large terms may cancel.

    Memory is linear in T. A problem with too many pairs is checked at some blocks of rows, from the first to the last.
    The gradient of the output is 0 on all other rows, so that dq, dk and dv are still checked as a whole.
    """

    def __init__(self, problem, inputs, windowed=True, in_documents=True):
        self.problem, self.window = problem, problem.window if windowed else None
        self.starts = problem.starts if in_documents else None
        *inputs, grad_out = inputs
        T = problem.T
        starts = list(range(0, T, CHECK_BLOCK))
        if visible_pairs(T, T, *check_window(self.window)) > CHECK_ALL_PAIRS and len(starts) > 4:
            starts = [starts[i * (len(starts) - 1) // 3] for i in range(4)]
        self.rows = torch.cat([torch.arange(i, min(T, i + CHECK_BLOCK), device=grad_out.device) for i in starts])
        self.inputs = inputs
        self.grad_out = torch.zeros_like(grad_out).index_copy(2, self.rows, grad_out[:, :, self.rows])
        self.exact = self._in_blocks(reference, [x.detach().double() for x in inputs], starts)
        rounded = self._in_blocks(eager, [x.detach() for x in inputs], starts)
        # fast exponentials, and fp32 products made of TF32 ones, are right to about 20 bits
        rounding = max(torch.finfo(problem.dtype).eps / 2, 2**-20)
        self.budget = {
            name: TOLERANCE * (_by_block(rounded[name] - exact) + rounding * _by_block(exact))
            for name, exact in self.exact.items()
        }

    def _in_blocks(self, attend, inputs, starts):
        """{name: fp64} of out, only the checked rows, and dq, dk, dv, by attend(q, k, v, window, starts)."""
        outs, gradients = [], [torch.zeros_like(x, dtype=torch.float64) for x in inputs]
        window, right = check_window(self.window)
        for i in starts:
            end = min(self.problem.T, i + CHECK_BLOCK)
            first = 0 if window is None else max(0, i - window + 1)
            last = self.problem.T if right is None else min(self.problem.T, end + right)
            # queries are the last positions: where they see later keys, all of the keys' positions
            places = (slice(i if right == 0 else first, last), slice(first, last), slice(first, last))
            parts = [x[:, :, place] for x, place in zip(inputs, places, strict=True)]
            parts = [x.requires_grad_(self.problem.backward) for x in parts]
            documents = None if self.starts is None else (self.starts[:, first:last] - first).clamp_(min=0)
            out = attend(*parts, self.window, documents)
            out = out[:, :, i - places[0].start :][:, :, : end - i]
            outs.append(out.detach().double())
            if self.problem.backward:
                found = torch.autograd.grad(out, parts, self.grad_out[:, :, i:end].to(out.dtype))
                for total, place, part in zip(gradients, places, found, strict=True):
                    total[:, :, place] += part.double()
        results = {"out": torch.cat(outs, dim=2)}
        return results | (dict(zip(("dq", "dk", "dv"), gradients, strict=True)) if self.problem.backward else {})

    def error_of(self, attend):
        """(the largest error of any row over its budget, the result that it is in); 1 is the most that is allowed."""
        out, *gradients = call_of(attend, self.inputs, (self.grad_out,), self.problem.backward)()
        errors = {}
        for (name, exact), result in zip(self.exact.items(), (out[:, :, self.rows], *gradients), strict=True):
            if result.shape != exact.shape:
                return float("inf"), f"{name} of shape {tuple(result.shape)}"
            error = _by_block(result.detach().double() - exact)
            over = torch.where(error > 0, error / self.budget[name], error)  # 0 of a budget of 0 is no error
            errors[name] = float(over.nan_to_num(nan=torch.inf).max())
        worst = max(errors, key=errors.get)
        return errors[worst], worst

    def objection(self, attend):
        """(error, None) if all results are right, else (error, what is wrong in a few words)."""
        error, name = self.error_of(attend)
        return error, None if error <= 1 else f"{name} is off by {error:.3g} times what rounding explains"


def reference(q, k, v, window, starts):
    return sliding_gqa_attention(q, k, v, window, starts=starts, backend="reference")


def eager(q, k, v, window, starts):
    """The definition in the dtype of q: every product and every probability is rounded to it."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    window, right = check_window(window)
    seen = visible_mask(q.shape[2], k.shape[2], window, q.device, right=right, starts=starts)
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v


def _by_block(x):
    """The largest norm of a row (of the last dimension) in each block of rows of x (B, H, rows, D); a NaN stays one."""
    return torch.stack([block.max() for block in x.norm(dim=-1).split(CHECK_BLOCK, dim=2)])
