"""The Triton kernels on packed rows: no query leaves its document, and work follows the documents.

The kernels, tiles and budgets are those of test_triton_attention.py.
"""

import pytest
import torch
from test_triton_attention import DTYPES, FEATURES, TINY, WIDE, assert_within_budget, attention, problem
from test_triton_attention import empty_is_nan as empty_is_nan  # used by every test here, too

from kernels import document_starts, sliding_gqa_attention
from kernels.backends.triton.attention_forward import attend

ROWS = {  # the lengths of the documents of each row, 50 positions
    "one position each": [[1] * 50],
    "begin and end at the borders of tiles": [[16, 32, 2]],
    "one that is longer than every window": [[50]],
    "short and long ones": [[1, 1, 30, 17, 1]],
    "rows that differ": [[7, 43], [20, 1, 29]],
    "padding on the left, and on the right": [[1] * 11 + [39], [39] + [1] * 11],
}


def starts_of(rows, device):
    """(B, S) int32 of the lengths of the documents of each row."""
    ends = [torch.tensor([0, *row], device=device).cumsum(0) for row in rows]
    return torch.cat([document_starts(cu_seqlens=row) for row in ends])


@pytest.mark.parametrize(("T", "window"), [(50, None), (50, 16), (21, 2), (21, 20)])
@pytest.mark.parametrize("rows", ROWS)
def test_every_kind_of_document(rows, T, window, device):
    starts = starts_of(ROWS[rows], device)
    for Hq, Hkv in ((2, 2), (3, 1), (4, 1)):
        inputs, grads, options = problem(device, T, 50, Hq, Hkv, B=len(starts))
        assert_within_budget(inputs, grads, window, starts=starts, **options)


@pytest.mark.parametrize("rows", [[[130]], [[90, 40]], [[3, 127]], [[64, 66], [1, 95, 34]]])
@pytest.mark.parametrize("window", [None, 70])
def test_long_documents_have_an_interior(rows, window, device):
    for T, Hq, Hkv in ((130, 2, 2), (101, 4, 1)):
        inputs, grads, options = problem(device, T, 130, Hq, Hkv, B=len(rows))
        assert_within_budget(inputs, grads, window, WIDE, starts=starts_of(rows, device), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, dtype, device):
    """Keys before the oldest window are not rotated, and here lie within a document and before another."""
    shape = {**FEATURES[feature], "B": 2}
    changed = {name: shape.pop(name) for name in ("softcap", "scale") if name in shape}
    inputs, grads, options = problem(device, 30, 60, dtype=dtype, **shape)
    starts = starts_of([[25, 20, 15], [5, 1, 54]], device)
    assert_within_budget(inputs, grads, 20, starts=starts, **{**options, **changed})


def test_shipped_tiles(device):
    inputs, grads, options = problem(device, 150, 170, D=32, sinks=True, rotary_dim=32)
    assert_within_budget(inputs, grads, 100, None, starts=starts_of([[61, 2, 107]], device), **options)


def test_one_document_is_none_to_the_last_bit(device):
    inputs, grads, options = problem(device, 70, 90, rotary_dim=16, sinks=True, B=2)
    starts = torch.zeros(2, 90, dtype=torch.int32, device=device)
    for a, b in zip(
        attention(inputs, grads, 40, WIDE, starts=starts, **options),
        attention(inputs, grads, 40, WIDE, **options),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_what_is_outside_of_a_document_is_not_read(device):
    """A document that begins and ends at the borders of tiles, in the middle of NaN, is what it is alone, bit for bit.

    A tile of values that is loaded and masked would show: 0 times NaN is NaN.
    """
    inputs, grads, options = problem(device, T=128, rotary_dim=16)
    inside = slice(32, 96)
    alone = [x[:, :, inside] for x in (*inputs, *grads)]
    options["rope"] = tuple(table[32:] for table in options["rope"])
    expected = attention(alone[:3], alone[3:], 40, WIDE, **options)
    for x in (*inputs, *grads):
        x[:, :, : inside.start] = float("nan")
        x[:, :, inside.stop :] = float("nan")
    cos, sin = options["rope"]
    options["rope"] = torch.cat([cos[:32], cos]), torch.cat([sin[:32], sin])
    found = attention(inputs, grads, 40, WIDE, starts=starts_of([[32, 64, 32]], device), **options)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[:, :, inside], b)


def test_starts_of_one_row_for_all(device):
    """An expanded view of one row, as `document_starts` of cu_seqlens and `expand` make it."""
    (q, k, v), _, _ = problem(device, T=40, B=3)
    row = starts_of([[13, 27]], device)
    results = [
        sliding_gqa_attention(q, k, v, 9, starts=starts, backend="triton")
        for starts in (row.expand(3, 40), row.repeat(3, 1))
    ]
    assert torch.equal(*results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 matrix products are the interpreter's")
def test_gradcheck_in_fp64(device):
    (q, k, v, sinks), _, options = problem(device, 9, 12, dtype=torch.float64, sinks=True, rotary_dim=8)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    starts = starts_of([[5, 4, 3]], device)

    def of_leaves(q, k, v, sinks):
        options_ = {"sinks": sinks, "rope": options["rope"], "softcap": 2.0, "return_lse": True}
        return sliding_gqa_attention(q, k, v, 5, starts=starts, backend="triton", **options_)

    assert torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True)


def test_a_query_alone_in_its_document_takes_its_own_value(device):
    (q, k, v), _, options = problem(device, T=20, Hq=4, Hkv=4)
    starts = torch.arange(20, dtype=torch.int32, device=device)[None]
    out, _ = attend(q, k, v, 7, starts=starts, config=TINY, **options)
    torch.testing.assert_close(out, v, atol=1e-6, rtol=1e-6)
