"""Who computes sliding-window attention: a dict of contestants, and the check that each passes before it is timed.

A contestant is one or more ways to call it, since a good engineer would take the fastest: each is a function that
prepares a problem (makes masks, compiles) and returns attend(q, k, v) -> (B, Hq, T, D). What is prepared is not timed,
but its memory counts. K and V come with Hkv heads; who cannot group heads has to repeat them, and is timed with that.
"""

from collections.abc import Callable
from typing import NamedTuple

import harness
import torch
import torch.nn.functional as F

from kernels import resolve_backend, sliding_gqa_attention
from kernels.band import visible_pairs

TOLERANCE = {torch.float32: 3e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CHECK_BLOCK = 256  # query rows that the reference takes at once
CHECK_ALL_PAIRS = 2**23  # visible pairs of a head up to which every row is checked
# seconds a call would take, not minutes, on each kind of device
MOST_DENSE_PAIRS = {"cpu": 8 * 8192**2, "cuda": 64 * 32768**2}


class Problem(NamedTuple):
    """B sequences of T tokens, Hq query heads on Hkv KV heads of size D; window None is causal without one."""

    T: int
    window: int | None
    Hq: int = 8
    Hkv: int = 2
    D: int = 64
    B: int = 1
    backward: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def inputs(self):
        """q, k, v and the gradient of the output, as a projection's (B, T, H, D) output transposed to (B, H, T, D)."""
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(heads):
            x = torch.randn(self.B, self.T, heads, self.D, generator=generator, device=self.device)
            return x.to(self.dtype).transpose(1, 2)

        q, k, v = (draw(heads).requires_grad_(self.backward) for heads in (self.Hq, self.Hkv, self.Hkv))
        return q, k, v, draw(self.Hq)

    @property
    def flops(self):
        """Of the visible pairs: two products forward, and five more backward."""
        pairs = self.B * self.Hq * visible_pairs(self.T, self.T, self.window)
        return 2 * 2 * self.D * pairs * (3.5 if self.backward else 1)

    @property
    def group(self):
        return self.Hq // self.Hkv


class Contestant(NamedTuple):
    ways: dict[str, Callable]
    """Name -> prepare(problem) -> attend(q, k, v). The fastest that is right is taken."""
    why_not: Callable[[Problem], str | None] = lambda problem: None
    """Why it cannot take the problem, in a few words; None if it can."""
    windowed: bool = True
    """False: it sees all earlier keys, whatever the window. A yardstick, not a solution."""


def ours(problem):
    return lambda q, k, v: sliding_gqa_attention(q, k, v, problem.window)


def sdpa_masked(repeated, additive):
    def prepare(problem):
        ones = torch.ones(problem.T, problem.T, dtype=torch.bool, device=problem.device)
        mask = ones.tril() & ones.triu(1 - (problem.window or problem.T))
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

    window = problem.window or problem.T

    def visible(b, h, q_pos, k_pos):
        return (k_pos <= q_pos) & (q_pos - k_pos < window)

    torch._dynamo.reset()  # each shape is compiled for itself, and past 8 of them Dynamo would run it uncompiled
    mask = create_block_mask(visible, None, None, problem.T, problem.T, device=problem.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=problem.group > 1)


def flex_why_not(problem):
    if problem.device.type == "cuda":
        return _too_dense(problem)
    if problem.backward:
        return "it has no backward pass on a CPU"
    return harness.why_not_compile(problem.device) or _too_dense(problem)  # its block mask is made of all pairs


def local_attention(problem):
    from local_attention import LocalAttention

    # exact_windowsize sees window_size keys and the query's own; autopad lets T be any number
    attention = LocalAttention(
        window_size=problem.window - 1, causal=True, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False
    )
    return lambda q, k, v: attention(q, *_repeat(problem, k, v))


def local_attention_why_not(problem):
    if problem.window is None or not 1 < problem.window <= problem.T:
        return "its windows are of 2 to T keys"
    return harness.not_installed("local_attention")


def xformers(repeated):
    def prepare(problem):
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import LocalAttentionFromBottomRightMask

        mask = LocalAttentionFromBottomRightMask(window_left=(problem.window or problem.T) - 1, window_right=0)

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

    window = (-1, -1) if problem.window is None else (problem.window - 1, 0)  # keys to the left of the query's own

    def attend(q, k, v):  # wants (B, T, H, D)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(q, k, v, causal=True, window_size=window).transpose(1, 2)

    return attend


def _on_gpus_only(module, dtypes=TOLERANCE):
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
        _too_dense,
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


def call_of(attend, problem, inputs):
    """What is timed: one forward, or one forward and backward, of attend on the inputs; returns its results."""
    q, k, v, grad_out = inputs

    def forward():
        with torch.no_grad():
            return (attend(q, k, v),)

    def forward_and_backward():
        out = attend(q, k, v)
        return (out, *torch.autograd.grad(out, (q, k, v), grad_out))

    return forward_and_backward if problem.backward else forward


class Oracle:
    """What the reference says about a problem, in fp64, computed once for all contestants and in linear memory.

    Where a causal problem has too many pairs, rows are sampled: blocks from the first to the last. The gradient of the
    output is 0 on the other rows, so that dq, dk and dv are still checked as a whole.
    """

    def __init__(self, problem, inputs, windowed=True):
        self.problem, window = problem, problem.window if windowed else None
        q, k, v, grad_out = inputs
        T = problem.T
        starts = list(range(0, T, CHECK_BLOCK))
        if visible_pairs(T, T, window) > CHECK_ALL_PAIRS and len(starts) > 4:
            starts = [starts[i * (len(starts) - 1) // 3] for i in range(4)]
        self.rows = torch.cat([torch.arange(i, min(T, i + CHECK_BLOCK), device=q.device) for i in starts])
        self.inputs = (q, k, v, torch.zeros_like(grad_out).index_copy(2, self.rows, grad_out[:, :, self.rows]))
        exact = [x.detach().double().requires_grad_(problem.backward) for x in (q, k, v)]
        out = torch.zeros_like(exact[0], requires_grad=False)
        for i in starts:
            end, first = min(T, i + CHECK_BLOCK), 0 if window is None else max(0, i - window + 1)
            k_seen, v_seen = (x[:, :, first:end] for x in exact[1:])
            part = sliding_gqa_attention(exact[0][:, :, i:end], k_seen, v_seen, window, backend="reference")
            if problem.backward:  # at once, which frees the block's scores
                part.backward(grad_out[:, :, i:end].double())
            out[:, :, i:end] = part.detach()
        self.expected = {"out": out[:, :, self.rows]}
        if problem.backward:
            self.expected |= {name: x.grad for name, x in zip(("dq", "dk", "dv"), exact, strict=True)}

    def error_of(self, attend):
        """The largest error of any row of any result, relative to the row, and the name of that result."""
        out, *gradients = (x.detach().double() for x in call_of(attend, self.problem, self.inputs)())
        errors = {}
        for (name, exact), result in zip(self.expected.items(), (out[:, :, self.rows], *gradients), strict=True):
            if result.shape != exact.shape:
                return float("inf"), f"{name} of shape {tuple(result.shape)}"
            size = exact.norm(dim=-1)
            # rows may be 0 by nature, such as dq of the first query, or all of them: the inputs are of size 1
            relative = (result - exact).norm(dim=-1) / torch.maximum(size, size.mean().clamp(min=0.1))
            errors[name] = float(relative.nan_to_num(nan=torch.inf).max())
        worst = max(errors, key=errors.get)
        return errors[worst], worst

    def objection(self, attend):
        """(error, None) if all results are right, else (error, what is wrong in a few words)."""
        error, name = self.error_of(attend)
        tolerance = TOLERANCE[self.problem.dtype]
        if error <= tolerance:
            return error, None
        return error, f"{name} is off by {error:.2g} of a row's norm, tolerance {tolerance:g}"
