"""Deliberate faults in copies of the attention kernels, each of which a quick check must notice: our tests can fail."""

import pytest
import torch
from budget import excess
from mutants import copy_of_kernels

from kernels import document_starts, rope_tables
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
        "tl.minimum(tl.cdiv(past_begin, EDGE_N) * EDGE_N, end)",
        "past_begin // EDGE_N * EDGE_N",
    ),
    "the diagonal taken for interior": (
        "tiles.py",
        "(first_pos + 1) // EDGE_N * EDGE_N",
        "(last_pos + 1) // EDGE_N * EDGE_N",
    ),
    "an edge taken for interior, queries": (
        "tiles.py",
        "end_of(first_key, window, num_keys, ends_ptr) - offset",
        "end_of(last_key, window, num_keys, ends_ptr) - offset",
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
DOCUMENTS = [1, 70, 5, 24], [30, 62, 8]  # lengths by row
# the same, on rows of documents
MUTATIONS_OF_DOCUMENTS = {
    "one key of the document before": ("tiles.py", "(position >= limits[0])", "(position >= limits[0] - 1)"),
    "one query of the document after": ("tiles.py", "(position < limits[1])", "(position <= limits[1])"),
    "the own window in place of the document": ("tiles.py", "tl.minimum(start, position))", "first)"),
    "without the document's first key": (
        "tiles.py",
        "tl.minimum(start, position))",
        "tl.minimum(start, position) + 1)",
    ),
    "without the document's last query": (
        "tiles.py",
        "tl.minimum(end, tl.maximum(past, position + 1))",
        "tl.minimum(end, tl.maximum(past - 1, position + 1))",
    ),
    "from the last row's document on": (
        "tiles.py",
        "begin = tl.maximum(first_of(first_pos, window, num_keys, starts_ptr), 0)",
        "begin = tl.maximum(first_of(last_pos, window, num_keys, starts_ptr), 0)",
    ),
    "interior from the first row's document on": (
        "tiles.py",
        "past_begin = tl.maximum(first_of(last_pos, window, num_keys, starts_ptr), 0)",
        "past_begin = tl.maximum(first_of(last_pos, window, num_keys, None), 0)",
    ),
    "to the end of the first key's document": (
        "tiles.py",
        "end_of(last_key, window, num_keys, ends_ptr) - offset",
        "end_of(first_key, window, num_keys, ends_ptr) - offset",
    ),
    "interior to the end of the last key's document": (
        "tiles.py",
        "end_of(first_key, window, num_keys, ends_ptr) - offset",
        "end_of(first_key, window, num_keys, None) - offset",
    ),
    "no mask by documents in the forward": (
        "attention_forward.py",
        "first_of(q_pos, window, num_keys, starts_ptr)",
        "first_of(q_pos, window, num_keys, None)",
    ),
    "no mask by documents in dq": (
        "attention_backward.py",
        "first_of(q_pos, window, num_keys, starts_ptr)",
        "first_of(q_pos, window, num_keys, None)",
    ),
    "no mask by documents in dk and dv": (
        "attention_backward.py",
        "end_of(k_pos, window, num_keys, ends_ptr)",
        "end_of(k_pos, window, num_keys, None)",
    ),
    "starts of the first row for all": ("attention_forward.py", "starts_ptr += batch", "starts_ptr += 0 * batch"),
    "starts of the first row for all, dq": ("attention_backward.py", "starts_ptr += batch", "starts_ptr += 0 * batch"),
    "ends of the first row for all": ("attention_backward.py", "ends_ptr += batch", "ends_ptr += 0 * batch"),
    "limits that count positions": (
        "attention_backward.py",
        "num_keys, ends_ptr)[:, None] - offset",
        "num_keys, ends_ptr)[:, None]",
    ),
    "ends before the last position": ("attention_backward.py", "right=True", "right=False"),
    "starts that count from key 0": ("attention_forward.py", "(starts[:, first:] - first)", "(starts[:, first:] - 0)"),
}


def worst_excess(forward, backward, device, documents=None):
    """How far the kernels are over their error budget, on one problem that has a bit of everything."""
    torch.manual_seed(0)
    T, S, Hq, Hkv, D, B, window = (53, 60, 6, 2, 16, 1, 40) if documents is None else (53, 100, 6, 2, 16, 2, 44)
    shapes = ((Hq, T), (Hkv, S), (Hkv, S))
    inputs = [torch.randn(B, L, H, D, device=device).transpose(1, 2) for H, L in shapes]
    inputs[2] = inputs[2].contiguous()  # another layout than k's
    inputs.append(torch.randn(Hq, device=device) + 1)
    grads = torch.randn(B, Hq, T, D, device=device), torch.randn(B, Hq, T, device=device)
    options = {"scale": 0.5, "softcap": 2.0, "rope": rope_tables(S, D, theta=100.0, device=device)}
    if documents is not None:
        ends = [torch.tensor([0, *row], device=device).cumsum(0) for row in documents]
        options["starts"] = torch.cat([document_starts(cu_seqlens=row) for row in ends])
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


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_the_check_passes_on_an_unchanged_copy(documents, tmp_path, device):
    assert worst_excess(*copy_of_kernels(tmp_path, MODULES), device, documents) <= 1


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation, tmp_path, device):
    """By numbers at least twice over the budget, not by an exception."""
    assert worst_excess(*copy_of_kernels(tmp_path, MODULES, MUTATIONS[mutation]), device) > 2


@pytest.mark.parametrize("mutation", MUTATIONS_OF_DOCUMENTS)
def test_every_mutation_of_documents_is_caught(mutation, tmp_path, device):
    kernels = copy_of_kernels(tmp_path, MODULES, MUTATIONS_OF_DOCUMENTS[mutation])
    assert worst_excess(*kernels, device, DOCUMENTS) > 2
