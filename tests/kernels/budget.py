"""What a kernel may be off by: twice the error of the same maths in PyTorch and in the same dtype, and one rounding."""

import torch

from kernels.backends import reference
from kernels.band import visible_mask


def eager(q, k, v, window, *, scale, right=0, starts=None, softcap=None, sinks=None, rope=None):
    """(out, lse) with every intermediate result in the inputs' dtype, as PyTorch users write attention."""
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if rope is not None:
        cos, sin = rope
        q, k = reference.rotated(q, cos[S - T : S], sin[S - T : S]), reference.rotated(k, cos[:S], sin[:S])
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q * scale) @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible_mask(T, S, window, q.device, right=right, starts=starts)
    scores = scores.masked_fill(~seen, float("-inf"))
    columns = scores
    if sinks is not None:
        columns = torch.cat([scores, sinks.to(scores)[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    p = torch.softmax(columns, dim=-1)[..., :S]
    return p @ v, torch.logsumexp(columns, dim=-1)


def run(attend, inputs, grads, window, **options):
    """[out, lse, *gradients of inputs] of `attend` for q, k, v (, sinks) and the gradients of out and lse."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    if len(leaves) == 4:
        options["sinks"] = leaves[3]
    out, lse = attend(*leaves[:3], window, **options)
    results = torch.autograd.grad((out, lse), leaves, [g.to(r.dtype) for g, r in zip(grads, (out, lse), strict=True)])
    return [out.detach(), lse.detach(), *results]


def excess(ours, inputs, grads, window, **options):
    """{name: |ours - exact| / budget} for [out, lse, dq, dk, dv (, dsinks)]: what is above 1 is too far off.

    exact is the reference in fp64; gradients may be off by three times what eager PyTorch is, results by twice.
    """
    wide = [x.double() for x in inputs]
    rope = options.get("rope")
    exact_options = options if rope is None else {**options, "rope": tuple(x.double() for x in rope)}
    exact = run(reference.attention, wide, grads, window, **exact_options)
    same = run(eager, inputs, grads, window, **options)
    # a gradient that vanishes is a difference of numbers as large as the others: it is rounded like them
    largest_gradient = max(x.abs().max() for x in exact[2:])
    ratios = {}
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), ours, same, exact, strict=False):
        is_gradient = name[0] == "d"
        rounding = torch.finfo(inputs[0].dtype).eps * (largest_gradient if is_gradient else c.abs().max())
        budget = (3 if is_gradient else 2) * ((b - c).abs().max() + rounding)
        error = (a - c).abs().max()
        ratios[name] = float(error / budget) if error.isfinite() else float("inf")
    return ratios
