"""Deliberate faults in copies of the decode kernels, each of which a quick check must notice."""

import pytest
import torch
from mutants import copy_of_kernels

from kernels import rope_tables
from kernels.backends import reference
from kernels.backends.triton.tile_configs import DecodeTile

# {fault: (file, text, replacement)}
MUTATIONS = {
    "slot off by one": ("tiles.py", "slot = oldest_slot + key", "slot = oldest_slot + key + 1"),
    "end of the ring off by one": ("tiles.py", "tl.where(slot < num_slots", "tl.where(slot <= num_slots"),
    "written beside its slot": ("decode.py", "position % num_slots", "(position + 1) % num_slots"),
    "padding is written": ("decode.py", "row_ok = in_rows & (position >= 0)", "row_ok = in_rows"),
    "wrong group map": ("decode.py", "kv_head * GROUP + row % GROUP", "kv_head + row % GROUP"),
    "tokens and heads of a tile swapped": ("decode.py", "token = row // GROUP", "token = row % num_new"),
    "oldest key of the newest token": (
        "decode.py",
        "oldest = tl.maximum(first_pos - window + 1, 0)",
        "oldest = tl.maximum(last_pos - window + 1, 0)",
    ),
    "a tile that is not full taken for whole": (
        "decode.py",
        "full_end = tl.minimum(tl.maximum(edges[2], full_begin), end)",
        "full_end = end",
    ),
    "left edge taken for interior": (
        "decode.py",
        "full_begin = tl.minimum(tl.maximum(edges[1], begin), end)",
        "full_begin = begin",
    ),
    "parts overlap": ("decode.py", "split * part + part, num_tiles", "split * part + part + 1, num_tiles"),
    "window off by one": ("tiles.py", "(k_pos > q_pos - window)", "(k_pos >= q_pos - window)"),
    "sink not in units of the scores": ("decode.py", "(LOG2_E / scale_log2)", "LOG2_E"),
    "maximum of a part not in base 2": ("decode.py", "row_max * scale_log2, mask", "row_max, mask"),
    "missing rescale of the values of a part": ("decode.py", "part * weight[:, None]", "part"),
    "missing rescale of the sum of a part": ("decode.py", "part_sum * weight, 0", "part_sum, 0"),
    "missing rescale between turns, values": ("decode.py", "acc = acc * rescale", "acc = acc"),
    "missing rescale between turns, sums": (
        "decode.py",
        "row_sum * rescale + tl.sum(part_sum",
        "row_sum + tl.sum(part_sum",
    ),
    "q rotated by the angle of the first token": (
        "decode.py",
        "q_ok, q_pos[:, None]",
        "q_ok, (q_pos - token)[:, None]",
    ),
    "last row of the tables not reached": ("tiles.py", "(position < num_positions)", "(position < num_positions - 1)"),
    "v read with k's strides": (
        "decode.py",
        "kv_head.to(tl.int64) * v_strides[1]",
        "kv_head.to(tl.int64) * k_strides[1]",
    ),
}
WINDOW, T, HQ, HKV, D = 40, 3, 6, 2, 16
OPTIONS = {"config": DecodeTile(16, 16, 4, 1), "num_splits": 4}  # of 3 tiles of keys: one part is empty


def results(module, device, **options):
    """What `append` and `decode` of a module leave in their rings and return, as one tensor."""
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    lengths = torch.tensor([100, 2], dtype=torch.int32, device=device)  # round the ring; one token of padding
    C = WINDOW + T - 1
    # the rings lie amidst other numbers, which a fault may read or write
    around = torch.randn(2, 4, HKV + 2, 3 * C, D, dtype=dtype, device=device)
    k_cache, v_cache = around[0], around[1].transpose(1, 2).contiguous().transpose(1, 2)
    rings = [x[1:-1, 1:-1, C:-C] for x in (k_cache, v_cache)]
    rope = tuple(table.to(dtype) for table in rope_tables(100, D, theta=100.0, device=device))
    sinks = torch.randn(HQ, dtype=dtype, device=device) + 1
    q, k, v = (torch.randn(2, T, heads, D, dtype=dtype, device=device).transpose(1, 2) for heads in (HQ, HKV, HKV))
    module.append(k, v, *rings, lengths, rope=rope)
    out = module.attend_to_cache(q, *rings, lengths, WINDOW, scale=0.5, softcap=3.0, sinks=sinks, rope=rope, **options)
    return torch.cat([x.flatten() for x in (out, k_cache, v_cache)])


def error(module, device):
    """The largest difference from the specification, in tolerances; infinite for NaN."""
    module.COMBINE_SPLITS = 2  # so that the parts are added up in two turns
    difference = (results(module, device, **OPTIONS) - results(reference, device)).abs().max().item()
    tolerance = 1e-5 if device.type == "cuda" else 1e-12
    return difference / tolerance if difference == difference else float("inf")


def test_the_check_passes_on_an_unchanged_copy(tmp_path, device):
    assert error(*copy_of_kernels(tmp_path, ["decode"]), device) <= 1


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation, tmp_path, device):
    """By numbers far off, not by an exception."""
    assert error(*copy_of_kernels(tmp_path, ["decode"], MUTATIONS[mutation]), device) > 100


NO_MASKED_LOOP = (
    "decode.py",
    "edges = (begin, full_begin, full_end, (full_begin - begin + end - full_end) // BLOCK_N)",
    "edges = (begin, full_begin, full_end, 0)",
)


def test_a_full_ring_needs_no_mask(tmp_path, device):
    """One new token on a ring of window slots: without the loop that has a mask, nothing is missing."""
    (module,) = copy_of_kernels(tmp_path, ["decode"], NO_MASKED_LOOP)
    q, k_cache, v_cache = (torch.randn(2, heads, n, D, device=device) for heads, n in ((HQ, 1), (HKV, 48), (HKV, 48)))
    for length, complete in ((48, True), (77, True), (47, False)):
        lengths = torch.tensor([length, 1000], dtype=torch.int32, device=device)
        out = module.attend_to_cache(q, k_cache, v_cache, lengths, 48, scale=0.25, **OPTIONS)
        exact = reference.attend_to_cache(q, k_cache, v_cache, lengths, 48, scale=0.25)
        assert ((out - exact).abs().max() < 1e-5) == complete
