"""Deliberate faults in copies of the attention kernels, each of which a quick check must notice: our tests can fail."""

import pytest
import torch
from budget import excess
from mutants import copy_of_kernels
from packed import starts_of

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
        "tl.minimum(tl.cdiv(past_begin, EDGE_N) * EDGE_N, end)",
        "past_begin // EDGE_N * EDGE_N",
    ),
    "the diagonal taken for interior": (
        "tiles.py",
        "past_full = first_pos + 1",
        "past_full = last_pos + 1",
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
OF_DOCUMENTS = {
    "one key of the document before": ("tiles.py", "(position >= limits[0])", "(position >= limits[0] - 1)"),
    "one query of the document after": ("tiles.py", "(position < limits[1])", "(position <= limits[1])"),
    "the window alone": ("tiles.py", "tl.minimum(start, position))", "first)"),
    "without the document's first key": (
        "tiles.py",
        "tl.minimum(start, position))",
        "tl.minimum(start, position) + 1)",
    ),
    "without the document's last query": ("tiles.py", "tl.maximum(past, position", "tl.maximum(past - 1, position"),
    "from the last row's document on": (
        "tiles.py",
        "begin = tl.maximum(first_of(first_pos",
        "begin = tl.maximum(first_of(last_pos",
    ),
    "interior from before the last row's document": (
        "tiles.py",
        "first_of(last_pos, window, num_keys, starts_ptr)",
        "first_of(last_pos, window, num_keys, None)",
    ),
    "to the end of the first key's document": (
        "tiles.py",
        "end_of(last_key, window, num_keys, ends_ptr)",
        "end_of(first_key, window, num_keys, ends_ptr)",
    ),
    "interior past the first key's document": (
        "tiles.py",
        "end_of(first_key, window, num_keys, ends_ptr)",
        "end_of(first_key, window, num_keys, None)",
    ),
    "no mask by documents in the forward": (
        "attention_forward.py",
        "else later, num_keys, *documents)",
        "else later, num_keys, None, None)",
    ),
    "no mask by documents in dq": (
        "attention_backward.py",
        "else later, num_keys, *documents)",
        "else later, num_keys, None, None)",
    ),
    "no mask by documents in dk and dv": (
        "attention_backward.py",
        "limits_of(k_pos, earlier, window, num_keys, *documents)",
        "limits_of(k_pos, earlier, window, num_keys, None, None)",
    ),
    "starts of the first row for all": ("tiles.py", "ptr + batch.to", "ptr + 0 * batch.to"),
    "limits that count positions": ("attention_backward.py", "first - offset, end - offset", "first, end"),
    "ends before the last position": ("attention_forward.py", "right=True", "right=False"),
    "starts that count from key 0": ("attention_forward.py", "(starts[:, first:] - first)", "(starts[:, first:] - 0)"),
}
OF_BOTH_SIDES = {
    "one later key too many": ("attention_forward.py", "min(right + 1, S)", "min(right + 2, S)"),
    "no later key in the forward": ("attention_forward.py", "1 if later is None else later", "1"),
    "no later key in dq": ("attention_backward.py", "window, 1 if later is None else later", "window, 1"),
    "no query before a key": ("attention_backward.py", "earlier = 1 if later is None else later", "earlier = 1"),
    "to the first row's last key": ("tiles.py", "tl.minimum(end_of(last_pos,", "tl.minimum(end_of(first_pos,"),
    "interior to the last row's last key": ("tiles.py", "tl.minimum(end_of(first_pos,", "tl.minimum(end_of(last_pos,"),
    "keys past the last": (
        "tiles.py",
        "tl.minimum(end_of(position, right, num_positions, ends_ptr), num_positions)",
        "end_of(position, right, num_positions, ends_ptr)",
    ),
    "from the last key's first query on": (
        "tiles.py", "begin = tl.maximum(first_of(first_key,", "begin = tl.maximum(first_of(last_key,"
    ),
    "interior from the first key's first query on": ("tiles.py", "first_of(last_key,", "first_of(first_key,"),
}  # fmt: skip
OF_BOTH_ENDS = {
    "rows without the ends of documents": ("attention_backward.py", "None if right == 0 else ends)", "None)"),
    "keys without the starts of documents": (
        "attention_backward.py", "(None if right == 0 else starts, ends)", "(None, ends)"
    ),
    "no ends of documents in the forward": (
        "attention_forward.py", "or right == 0 else document_ends", "or True else document_ends"
    ),
}  # fmt: skip
# {problem: (T, S, window, right, lengths of the documents of each row, mutations)}
PROBLEMS = {
    "a band": (53, 60, 40, 0, None, MUTATIONS),
    "documents": (53, 100, 44, 0, [[1, 70, 5, 24], [30, 62, 8]], OF_DOCUMENTS),
    "both sides": (75, 75, 30, 35, None, OF_BOTH_SIDES),
    "both sides, documents": (75, 75, 30, 35, [[1, 65, 9], [20, 55]], OF_BOTH_ENDS),
}


def worst_excess(forward, backward, problem, device):
    """How far the kernels are over their error budget, on one problem that has a bit of everything."""
    torch.manual_seed(0)
    T, S, window, right, documents, _ = PROBLEMS[problem]
    B, Hq, Hkv, D = len(documents) if documents else 1, 6, 2, 16
    shapes = ((Hq, T), (Hkv, S), (Hkv, S))
    inputs = [torch.randn(B, L, H, D, device=device).transpose(1, 2) for H, L in shapes]
    inputs[2] = inputs[2].contiguous()  # another layout than k's
    inputs.append(torch.randn(Hq, device=device) + 1)
    grads = torch.randn(B, Hq, T, D, device=device), torch.randn(B, Hq, T, device=device)
    options = {"scale": 0.5, "softcap": 2.0, "rope": rope_tables(S, D, theta=100.0, device=device), "right": right}
    options["starts"] = starts_of(documents, device) if documents else None
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


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_check_passes_on_an_unchanged_copy(problem, tmp_path, device):
    assert worst_excess(*copy_of_kernels(tmp_path, MODULES), problem, device) <= 1


@pytest.mark.parametrize(
    ("problem", "mutation"), [(name, fault) for name, (*_, faults) in PROBLEMS.items() for fault in faults]
)
def test_every_mutation_is_caught(problem, mutation, tmp_path, device):
    """By numbers at least twice over the budget, not by an exception."""
    *_, mutations = PROBLEMS[problem]
    assert worst_excess(*copy_of_kernels(tmp_path, MODULES, mutations[mutation]), problem, device) > 2
