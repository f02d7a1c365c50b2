"""The training loss without its logits: the head's product and the cross-entropy in pieces of a batch's tokens.

    loss = mean_t (log sum_v exp z_tv - z_t,target)       z = x weight^T, or softcap * tanh(x weight^T / softcap)

With a large vocabulary the logits and their gradient are most of the memory of a training step. Here a piece of them is
made, turned into its gradient p - 1[target] in place, multiplied into the gradients of x and weight, and dropped; the
backward pass scales those. That is as much work as with all logits: three products.

Not torch.nn.functional.linear_cross_entropy, which benchmarks/loss_speed.py compares: it is new in PyTorch 2.13, takes
no softcap, breaks torch.compile's graph, and does not follow autocast.
"""

import torch
from torch import library

from kernels.backend import autocast_dtype
from kernels.namespace import NAMESPACE, OPERATORS

PIECE = 2**24  # logits of a piece: 64 MB in fp32
LEAST_ROWS = 256  # of a piece: each reads and writes the whole gradient of the weight


def rows_of_piece(vocab_size):
    """Tokens of a piece. A batch of no more needs no pieces."""
    return max(LEAST_ROWS, PIECE // vocab_size)


def linear_loss(x, weight, targets, softcap=None):
    """Mean cross-entropy, in nats, of targets (N,) under the logits of x (N, C) by weight (V, C); -1 is not counted.

    The gradients of F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1), without (N, V) tensors; that of the
    weight is summed in fp32. Under autocast the products are made in its dtype. softcap bounds the logits to
    softcap * tanh(logit / softcap). Differentiable once. NaN, with gradients of 0, if no target counts.
    """
    dtype = autocast_dtype(x.device.type) or torch.promote_types(x.dtype, weight.dtype)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight)]
    counted = (targets != -1).sum()
    total = _LinearLoss.apply(x, weight, targets, softcap, dtype, *wanted)
    # not total / counted alone: with no target, its gradient would be 0 * inf
    return torch.where(counted > 0, total / counted.clamp(min=1), float("nan"))


library.define(
    f"{NAMESPACE}::linear_loss",
    "(Tensor x, Tensor weight, Tensor targets, float? softcap, ScalarType dtype, bool x_wanted, bool weight_wanted) "
    "-> (Tensor total, Tensor dx, Tensor dweight)",
)


@library.impl(f"{NAMESPACE}::linear_loss", "default")
def _linear_loss(x, weight, targets, softcap, dtype, x_wanted, weight_wanted):
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=x.device)
    dx = x.new_empty(x.shape if x_wanted else 0)
    dweight = torch.zeros(weight.shape if weight_wanted else 0, dtype=wide, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        narrow, rows = weight.to(dtype), rows_of_piece(len(weight))
        for first in range(0, len(x), rows):
            part = x[first : first + rows].to(dtype)
            loss, grad = _of_piece((part @ narrow.T).to(wide), targets[first : first + rows], softcap)
            total += loss
            if x_wanted or weight_wanted:
                grad = grad.to(dtype)
            if x_wanted:
                dx[first : first + rows] = grad @ narrow
            if weight_wanted and dtype == wide:
                dweight.addmm_(grad.T, part)
            elif weight_wanted:
                dweight += grad.T @ part
    return total, dx, dweight


def _of_piece(logits, targets, softcap):
    """(sum of the losses, the gradient of the logits) of one piece; it writes over the logits (n, V)."""
    capped = logits if softcap is None else logits.div_(softcap).tanh_()
    log_p = torch.log_softmax(capped if softcap is None else capped * softcap, -1)
    counts = (targets != -1)[:, None]
    at = targets.where(counts[:, 0], 0)[:, None]
    loss = -(log_p.gather(1, at) * counts).sum()
    grad = log_p.exp_().scatter_add_(1, at, log_p.new_full(at.shape, -1.0)).mul_(counts)
    return loss, grad if softcap is None else grad.mul_(1 - capped.square_())


@library.register_fake(f"{NAMESPACE}::linear_loss")
def _linear_loss_fake(x, weight, targets, softcap, dtype, x_wanted, weight_wanted):
    wide = torch.promote_types(dtype, torch.float32)
    dweight = x.new_empty(weight.shape if weight_wanted else 0, dtype=wide)
    return x.new_empty((), dtype=wide), x.new_empty(x.shape if x_wanted else 0), dweight


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, softcap, dtype, x_wanted, weight_wanted):
        total, *grads = OPERATORS.linear_loss(x, weight, targets, softcap, dtype, x_wanted, weight_wanted)
        ctx.wanted, ctx.weight_dtype = (x_wanted, weight_wanted), weight.dtype
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        x_wanted, weight_wanted = ctx.wanted
        dx = (dx * grad).to(dx.dtype) if x_wanted else None
        dweight = (dweight * grad).to(ctx.weight_dtype) if weight_wanted else None
        return dx, dweight, *[None] * 5
