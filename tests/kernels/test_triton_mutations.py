"""Deliberate faults in copies of the attention kernels, each of which a quick check must notice: our tests can fail."""

import pytest
import torch
from budget import excess
from mutants import copy_of_kernels

from kernels import rope_tables
from kernels.backends.triton.tile_configs import KeyTile, RowTile

TINY = 16, 16, 16, 4, 1
MODULES = ["attention_forward", "attention_backward"]
# {fault: (file, text, replacement)}
MUTATIONS = {
    "window off by one": ("tiles.py", "(k_pos > q_pos - window)", "(k_pos >= q_pos - window)"),
    "causality off by one": ("tiles.py", "(k_pos <= q_pos)", "(k_pos < q_pos)"),
    "wrong group map": ("tiles.py", "kv_head * GROUP + rest % PACKS * PACK", "kv_head + rest % PACKS * PACK"),
    "one head for all rows of a pack": ("tiles.py", "first_head + row % PACK", "first_head + row % 1"),
    "an edge taken for interior, keys": (
        "tiles.py",
        "full_begin = tl.minimum(tl.cdiv(tl.maximum(last_pos - window + 1, 0), EDGE_N) * EDGE_N, end)",
        "full_begin = tl.maximum(last_pos - window + 1, 0) // EDGE_N * EDGE_N",
    ),
    "the diagonal taken for interior": (
        "tiles.py",
        "(first_pos + 1) // EDGE_N * EDGE_N",
        "(last_pos + 1) // EDGE_N * EDGE_N",
    ),
    "an edge taken for interior, queries": (
        "tiles.py",
        "tl.minimum(first_key + window - offset, num_queries)",
        "tl.minimum(last_key + window - offset, num_queries)",
    ),
    "the last needed tile of queries left out": (
        "tiles.py",
        "tl.cdiv(past_last, EDGE_Q) * EDGE_Q",
        "past_last // EDGE_Q * EDGE_Q",
    ),
    "no jump between the edges": ("tiles.py", "second - end_first, 0)", "0, 0)"),
    "missing rescale of the sums": ("tiles.py", "row_sum * rescale[:, None] + tl.sum(", "row_sum + tl.sum("),
    "missing rescale of the values": ("tiles.py", "acc * rescale[:, None]", "acc"),
    "no guard for rows without a key yet": ("tiles.py", "tl.where(new_max == ", "tl.where(new_max > "),
    "sign of the rotation of q": ("tiles.py", "tl.where(is_first, -sin, sin)", "tl.where(is_first, sin, -sin)"),
    "sign of the rotation of gradients": (
        "tiles.py",
        "tl.join(a * cos + b * sin, b * cos - a * sin)",
        "tl.join(a * cos - b * sin, b * cos + a * sin)",
    ),
    "sign of the rotation of k": (
        "rope.py",
        "(a * cos - b * sin).to(first.dtype)",
        "(a * cos + b * sin).to(first.dtype)",
    ),
    "positions of q not bottom-right": ("attention_forward.py", "q_pos = query + offset", "q_pos = query"),
    "lse without sinks": ("attention_forward.py", "        lse_log2 = with_sink\n", ""),
    "out without sinks": ("attention_forward.py", "norm *= tl.exp2(lse_log2 - with_sink)", "norm *= 1.0"),
    "strides swapped": (
        "attention_forward.py",
        "row_offset(batch, head, row, q_strides)",
        "row_offset(batch, row, head, q_strides)",
    ),
    "strides of k for v": (
        "attention_forward.py",
        "kv_head.to(tl.int64) * v_strides[1]",
        "kv_head.to(tl.int64) * k_strides[1]",
    ),
    "scale left out of dq": ("attention_backward.py", "    dq *= scale\n", ""),
    "delta left out of dk": (
        "attention_backward.py",
        "dot(v, tl.trans(do), None, PRECISION) - delta[None, :]",
        "dot(v, tl.trans(do), None, PRECISION)",
    ),
    "dk without one head of the group": (
        "attention_backward.py",
        "for pack in range(GROUP // PACK // PARTS):",
        "for pack in range(GROUP // PACK // PARTS - 1):",
    ),
    "gradient of lse with the wrong sign": (
        "attention_backward.py",
        "delta -= tl.load(dlse_ptr",
        "delta += tl.load(dlse_ptr",
    ),
    "derivative of the cap left out": (
        "attention_backward.py",
        "            ds *= 1 - scores * scores\n        dq",
        "            ds *= 1.0\n        dq",
    ),
    "sinks' gradient without its sign": ("attention_backward.py", ".sum((0, 2)).neg()", ".sum((0, 2))"),
}


def worst_excess(forward, backward, device):
    """How far the kernels are over their error budget, on one problem that has a bit of everything."""
    torch.manual_seed(0)
    T, S, Hq, Hkv, D, B, window = 53, 60, 6, 2, 16, 1, 40
    shapes = ((Hq, T), (Hkv, S), (Hkv, S))
    inputs = [torch.randn(B, L, H, D, device=device).transpose(1, 2) for H, L in shapes]
    inputs[2] = inputs[2].contiguous()  # another layout than k's
    inputs.append(torch.randn(Hq, device=device) + 1)
    grads = torch.randn(B, Hq, T, D, device=device), torch.randn(B, Hq, T, device=device)
    options = {"scale": 0.5, "softcap": 2.0, "rope": rope_tables(S, D, theta=100.0, device=device)}
    worst = 0.0
    for group in (3, 2):  # one head a tile, and two
        q, k, v, sinks = inputs[0][:, : 2 * group], inputs[1], inputs[2], inputs[3][: 2 * group]
        some_grads = [x[:, : 2 * group] for x in grads]
        out, lse = forward.attend(q, k, v, window, sinks=sinks, config=RowTile(*TINY), **options)
        results = backward.attend_backward(
            *some_grads, q, k, v, out, lse, window, sinks=sinks, configs=(RowTile(*TINY), KeyTile(*TINY)), **options
        )
        ratios = excess([out, lse, *results], [q, k, v, sinks], some_grads, window, **options)
        worst = max(worst, *(ratio if ratio == ratio else float("inf") for ratio in ratios.values()))
        if worst > 1:
            break
    return worst


def test_the_check_passes_on_an_unchanged_copy(tmp_path, device):
    assert worst_excess(*copy_of_kernels(tmp_path, MODULES), device) <= 1


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation, tmp_path, device):
    """By numbers at least twice over the budget, not by an exception."""
    assert worst_excess(*copy_of_kernels(tmp_path, MODULES, MUTATIONS[mutation]), device) > 2
