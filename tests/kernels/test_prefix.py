"""Keys of a prefix besides the window: attention and decoding against the masked definition."""

import pytest
import torch

from kernels import append_to_cache, document_starts, rope_tables, sliding_gqa_attention, sliding_gqa_decode
from kernels.backends import reference
from kernels.band import visible_mask

BACKENDS = ["reference", "banded", "triton"]


def defined(q, k, v, window, prefix, *, scale, starts=None, softcap=None, sinks=None, rope=None):
    """(out, lse) through a mask that adds the prefix of each document to the band."""
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    starts = torch.zeros(len(q), S, dtype=torch.int32) if starts is None else starts
    key = torch.arange(S)
    in_prefix = (key < starts[:, S - T :, None] + prefix) & (key >= starts[:, S - T :, None])
    causal = visible_mask(T, S, None, starts=starts)
    seen = visible_mask(T, S, window, starts=starts) | (causal & in_prefix[:, None])
    if rope is not None:
        cos, sin = rope
        q, k = reference.rotated(q, cos[S - T : S], sin[S - T : S]), reference.rotated(k, cos[:S], sin[:S])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = scale * q @ k.mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    columns = scores
    if sinks is not None:
        columns = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return columns.softmax(-1)[..., :S] @ v, columns.logsumexp(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    "T, S, window, prefix", [(20, 20, 5, 3), (20, 20, 2, 6), (7, 20, 4, 1), (9, 9, 9, 4), (9, 9, 3, 9)]
)
def test_attention_is_the_one_through_the_mask(T, S, window, prefix, everything, documents, backend):
    q, k, v = (torch.randn(2, H, L, 16, dtype=torch.float64, requires_grad=True) for H, L in ((4, T), (2, S), (2, S)))
    options = {"scale": 0.3}
    leaves = [q, k, v]
    if everything:
        sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
        rope = tuple(x.double() for x in rope_tables(S, 8))
        options |= {"softcap": 2.0, "sinks": sinks, "rope": rope}
        leaves.append(sinks)
    if documents:
        ids = torch.arange(S) > torch.tensor([[S // 2 - 1], [1]])
        options["starts"] = document_starts(document_ids=ids.long())
    ours = sliding_gqa_attention(q, k, v, window, prefix=prefix, return_lse=True, backend=backend, **options)
    expected = defined(q, k, v, window, prefix, **options)
    torch.testing.assert_close(ours, expected)
    grads = [torch.randn_like(x) for x in expected]
    for a, b in zip(*(torch.autograd.grad(x, leaves, grads) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_dtype_and_layout(dtype):
    q, k, v = (torch.randn(2, 20, H, 16, dtype=dtype).transpose(1, 2) for H in (4, 2, 2))
    out = sliding_gqa_attention(q, k, v, 5, prefix=3)
    assert out.dtype == dtype and out.stride() == q.stride()
    exact, _ = defined(q.double(), k.double(), v.double(), 5, 3, scale=0.25)
    torch.testing.assert_close(out.double(), exact, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("sizes", [(1,) * 15, (4, 1, 4, 4, 1), (2, 1, 1, 4, 3, 3)])
def test_decoding_keeps_the_prefix(sizes, everything, backend):
    """Rows of other lengths, padding and slots that hold NaN before they are written."""
    window, prefix, most = 5, 3, max(sizes)
    rings = [torch.full((2, 2, prefix + window + most - 1, 16), float("nan"), dtype=torch.float64) for _ in range(2)]
    S = sum(sizes)
    q, k, v = (torch.randn(2, H, S, 16, dtype=torch.float64) for H in (4, 2, 2))
    options = {"scale": 0.3}
    if everything:
        rope = tuple(x.double() for x in rope_tables(S, 8))
        options |= {"softcap": 2.0, "sinks": torch.randn(4, dtype=torch.float64), "rope": rope}
    rope = options.get("rope")
    skipped = torch.tensor([0, 2])  # row 1 begins with two columns of padding
    first = 0
    for size in sizes:
        part = slice(first, first + size)
        lengths = (first + size - skipped).to(torch.int32)
        append_to_cache(k[:, :, part], v[:, :, part], *rings, lengths, prefix=prefix, rope=rope, backend=backend)
        out, lse = sliding_gqa_decode(
            q[:, :, part], *rings, lengths, window, prefix=prefix, return_lse=True, backend=backend, **options
        )
        for row, skip in enumerate(skipped.tolist()):
            length = first + size - skip
            new = min(size, length)
            end = first + size
            seen = (x[row : row + 1, :, end - n : end] for x, n in ((q, new), (k, length), (v, length)))
            expected = defined(*seen, window, prefix, **options)
            torch.testing.assert_close(
                (out[row : row + 1, :, size - new :], lse[row : row + 1, :, size - new :]), expected
            )
            assert (out[row, :, : size - new] == 0).all() and lse[row, :, : size - new].isneginf().all()
        first += size


@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_a_distance_queries_meet_the_prefix_as_if_they_were_there(backend):
    """A column of scores at a time: the prefix's with q rotated at min(position, distance), all others as they are."""
    window, prefix, distance, T = 4, 2, 9, 20
    q, k, v = (torch.randn(1, H, T, 8, dtype=torch.float64) for H in (2, 1, 1))
    cos, sin = (x.double() for x in rope_tables(T, 8))
    near = torch.arange(T).clamp(max=distance)
    far = reference.rotated(q, cos[near], sin[near]) @ reference.rotated(k, cos, sin).mT
    scores = reference.rotated(q, cos, sin) @ reference.rotated(k, cos, sin).mT
    scores = torch.where(torch.arange(T) < prefix, far, scores) * 8**-0.5
    scores = scores.masked_fill(~visible_mask(T, T, window, prefix=prefix), float("-inf"))
    expected = scores.softmax(-1) @ v
    options = {"prefix": prefix, "prefix_distance": distance, "rope": (cos, sin), "backend": backend}
    torch.testing.assert_close(sliding_gqa_attention(q, k, v, window, **options), expected)
    rings = [torch.full((1, 1, prefix + window + 2, 8), float("nan"), dtype=torch.float64) for _ in range(2)]
    for first, size in ((0, 3), (3, 3), (6, 3), (9, 1), (10, 3), (13, 1), (14, 3), (17, 3)):
        part, lengths = slice(first, first + size), torch.tensor([first + size], dtype=torch.int32)
        append_to_cache(k[:, :, part], v[:, :, part], *rings, lengths, prefix=prefix, rope=(cos, sin), backend=backend)
        out = sliding_gqa_decode(q[:, :, part], *rings, lengths, window, **options)
        torch.testing.assert_close(out, expected[:, :, part])


def test_a_full_graph_takes_a_prefix():
    q, k, v = (torch.randn(2, H, 20, 16) for H in (4, 2, 2))
    attend = torch.compile(sliding_gqa_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(attend(q, k, v, 5, prefix=3), sliding_gqa_attention(q, k, v, 5, prefix=3))


Q, K = torch.randn(1, 2, 6, 8), torch.randn(1, 1, 6, 8)
ONE = torch.tensor([4], dtype=torch.int32)
BAD_CALLS = [
    (lambda **x: sliding_gqa_attention(Q, K, K, 3, **x), {"prefix": -1}, "prefix is -1, expected 0 or more positions"),
    (lambda **x: sliding_gqa_attention(Q, K, K, 3, **x), {"prefix": 1.5}, "prefix is 1.5, expected a whole number"),
    (lambda **x: sliding_gqa_attention(Q, K, K, 3, **x), {"prefix": 7}, "prefix is 7, more than the 6 positions of k"),
    (lambda **x: sliding_gqa_attention(Q, K, K, (2, 1), **x), {"prefix": 1}, "prefix is for causal attention"),
    (lambda **x: sliding_gqa_decode(Q[:, :, :1], K, K.clone(), ONE, 3, **x), {"prefix": 6}, "k_cache has 6 slots"),
    (
        lambda **x: sliding_gqa_decode(Q[:, :, :1], K, K.clone(), ONE, 3, **x),
        {"prefix": 4},
        "2 slots besides the prefix",
    ),
    (
        lambda **x: sliding_gqa_attention(Q, K, K, 3, prefix=1, **x),
        {"prefix_distance": 4},
        "prefix_distance needs rope",
    ),
    (
        lambda **x: sliding_gqa_attention(Q, K, K, 3, prefix=1, **x),
        {"prefix_distance": -1},
        "prefix_distance is -1, expected None or 0 or more positions",
    ),
    (lambda **x: append_to_cache(K[:, :, :1], K[:, :, :1], K, K.clone(), ONE, **x), {"prefix": True}, "prefix is True"),
]


@pytest.mark.parametrize("call, changed, message", BAD_CALLS)
def test_wrong_prefixes_are_refused_in_one_line(call, changed, message):
    with pytest.raises(ValueError, match=message) as error:
        call(**changed)
    assert "\n" not in str(error.value)
