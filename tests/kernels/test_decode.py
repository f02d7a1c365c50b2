"""The ring-buffer cache: what is written where, and that decoding equals attention over the whole history."""

import pytest
import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import append_to_cache, rope_tables, sliding_gqa_attention, sliding_gqa_decode
from kernels.backends import reference, triton

BACKENDS = ["banded", "reference", "triton"]
Hq, Hkv, D = 6, 2, 16


def exact_dtype(backend, device):
    """The widest dtype of a backend's matrix products: on a GPU, Triton's have fp32."""
    return torch.float32 if backend == "triton" and device.type == "cuda" else torch.float64


def empty_ring(batch, slots, dtype, device):
    """An empty cache, poisoned: a slot that was never written must never be read."""
    return torch.full((2, batch, Hkv, slots, D), float("nan"), dtype=dtype, device=device).unbind(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_position_p_lives_in_slot_p_modulo_the_ring(backend, device):
    k_cache, v_cache = empty_ring(2, 4, torch.float32, device)
    k, v = torch.randn(2, 2, Hkv, 3, D, device=device)
    lengths = torch.tensor([6, 2], dtype=torch.int32, device=device)
    append_to_cache(k, v, k_cache, v_cache, lengths, backend=backend)
    # row 0 writes positions 3, 4, 5; row 1 writes 0, 1, and its first token (position -1) is padding
    torch.testing.assert_close(k_cache[0, :, [3, 0, 1]], k[0])
    torch.testing.assert_close(v_cache[1, :, [0, 1]], v[1, :, 1:])
    assert k_cache[0, :, 2].isnan().all() and v_cache[1, :, 2:].isnan().all()


RINGS = [(5, 0, 1), (5, 3, 1), (5, 0, 4), (1, 2, 2), (None, 0, 3), (8, 0, 16)]  # window, slots to spare, T_new
HISTORIES = [
    (backend, ring, option, padding)
    for backend in BACKENDS
    for ring in RINGS
    for option in ("plain", "everything")
    for padding in ((0, 0, 0), (0, 1, 7))
    # Triton's interpreter is slow: of its cases the hardest, and one plain one
    if backend != "triton" or (option == "everything" and padding[-1]) or ring == RINGS[2]
]


@pytest.mark.parametrize("backend, ring, option, padding", HISTORIES)
def test_decoding_equals_attention_over_the_whole_history(backend, ring, option, padding, device):
    """Rows of different lengths share every call, by left padding, and go round the ring several times."""
    window, slack, step = ring
    total = 48 if backend != "triton" or step > 1 else 14
    dtype = exact_dtype(backend, device)
    padding = torch.tensor(padding, dtype=torch.int32, device=device)
    q = torch.randn(3, Hq, total, D, dtype=dtype, device=device)
    k, v = torch.randn(2, 3, Hkv, total, D, dtype=dtype, device=device)
    options, rope = {}, None
    if option == "everything":
        rope = tuple(t.to(dtype) for t in rope_tables(total, D // 2, device=device))
        options = {"scale": 0.5, "softcap": 3.0, "sinks": torch.randn(Hq, dtype=dtype, device=device)}
    k_cache, v_cache = empty_ring(3, total if window is None else window + step - 1 + slack, dtype, device)
    outs, lengths = [], -padding
    for first in range(0, total, step):
        part = slice(first, first + step)
        lengths = lengths + step
        append_to_cache(k[:, :, part], v[:, :, part], k_cache, v_cache, lengths, rope=rope, backend=backend)
        outs.append(
            sliding_gqa_decode(q[:, :, part], k_cache, v_cache, lengths, window, **options, rope=rope, backend=backend)
        )
    out = torch.cat(outs, dim=2)
    for b, pad in enumerate(padding.tolist()):
        assert not out[b, :, :pad].any()  # queries of the padding see nothing
        own = (x[b : b + 1, :, pad:] for x in (q, k, v))
        expected, _ = reference.attention(*own, window, **{"scale": D**-0.5, **options}, rope=rope)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(out[b, :, pad:], expected[0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window, T", [(None, 1), (40, 1), (40, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_one_split_a_row_has_the_same_bits_alone_and_in_any_batch(backend, window, T, device):
    """Rows begin at odd places in memory, where MKL adds up in another order."""
    rows, slots, head = 5, 71, 17
    q = torch.randn(rows, T, Hkv, head, device=device).transpose(1, 2)
    k_cache, v_cache = torch.randn(2, rows, Hkv, slots, head, device=device)
    lengths = torch.tensor([70, 3, 33, 70, 1] if window is None else [700, 3, 40, 77, 1], dtype=torch.int32)
    options = {"rope": rope_tables(701, 8, device=device), "sinks": torch.randn(Hkv, device=device), "backend": backend}
    arguments = q, k_cache, v_cache, lengths.to(device)

    def decode(batch, num_splits):
        own = (x[batch] for x in arguments)
        return sliding_gqa_decode(*own, window, num_splits=num_splits, **options)

    for batch in ([0, 1], [4, 0], [2, 3], [0, 1, 2, 3, 4]):
        for row, out in zip(batch, decode(batch, 1), strict=True):
            assert torch.equal(out, decode([row], 1)[0])
    whole = slice(None)
    torch.testing.assert_close(decode(whole, 1), decode(whole, None), atol=1e-5, rtol=1e-5)


def test_triton_cuts_the_keys_into_as_many_parts_as_it_is_told(device):
    q, (k_cache, v_cache) = torch.randn(1, Hq, 1, D, device=device), torch.randn(2, 1, Hkv, 300, D, device=device)
    arguments = q, k_cache, v_cache, torch.tensor([300], dtype=torch.int32, device=device)
    whole, cut = (sliding_gqa_decode(*arguments, num_splits=n, backend="triton") for n in (1, 3))
    assert torch.equal(cut, triton.attend_to_cache(*arguments, scale=D**-0.5, num_splits=3))
    assert not torch.equal(cut, whole)  # as the parts are added up, they are rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_keeps_dtype_and_layout(dtype):
    q = torch.randn(2, 1, Hq, D, dtype=dtype).transpose(1, 2)
    k_cache, v_cache = torch.randn(2, 2, Hkv, 8, D, dtype=dtype)
    lengths = torch.tensor([20, 3], dtype=torch.int32)
    out = sliding_gqa_decode(q, k_cache, v_cache, lengths, 8, backend="banded")
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    exact = reference.attend_to_cache(q.double(), k_cache.double(), v_cache.double(), lengths, 8, scale=D**-0.5)
    assert (out - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rope", [None, 8])
def test_operators_pass_opcheck(backend, rope, device):
    q, k = (torch.randn(2, 2, heads, D, device=device).transpose(1, 2) for heads in (Hq, Hkv))
    k_cache, v_cache = torch.randn(2, 2, Hkv, 9, D, device=device)
    lengths = torch.tensor([12, 1], dtype=torch.int32, device=device)
    cos, sin = (None, None) if rope is None else rope_tables(16, rope, device=device)
    library.opcheck(torch.ops.sliding_gqa.append, (k, k, k_cache, v_cache, lengths, cos, sin, backend))
    sinks = None if rope is None else torch.randn(Hq, device=device)
    library.opcheck(
        torch.ops.sliding_gqa.decode, (q, k_cache, v_cache, lengths, sinks, cos, sin, 8, 0.25, None, 2, backend, True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_serves_every_step(backend, device):
    """Nothing on the host depends on the position, so a compiled step is compiled once."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=count)
    def step(q, k, v, k_cache, v_cache, lengths):
        lengths += 1
        append_to_cache(k, v, k_cache, v_cache, lengths, backend=backend)
        return sliding_gqa_decode(q, k_cache, v_cache, lengths, 5, backend=backend)

    q, k, v = (torch.randn(1, heads, 20, D, device=device) for heads in (Hq, Hkv, Hkv))
    expected = sliding_gqa_attention(q, k, v, 5, backend="banded")
    k_cache, v_cache = empty_ring(1, 5, torch.float32, device)
    lengths = torch.zeros(1, dtype=torch.int32, device=device)
    for i in range(20):
        out = step(*(x[:, :, i : i + 1] for x in (q, k, v)), k_cache, v_cache, lengths)
        torch.testing.assert_close(out, expected[:, :, i : i + 1])
    assert len(graphs) == 1


class Listener(TorchDispatchMode):
    """Writes down our operators that it sees."""

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "sliding_gqa":
            self.__dict__.setdefault("seen", []).append(operator._opname)
        return operator(*arguments, **(options or {}))


@pytest.mark.parametrize("rope", [False, True])
def test_who_listens_hears_operators_and_who_does_not_gets_the_same(rope):
    k, v = torch.randn(2, 2, 2, 1, 8)
    rings = torch.randn(2, 2, 2, 5, 8)
    lengths = torch.tensor([9, 3], dtype=torch.int32)
    rope = rope_tables(9, 8) if rope else None

    def step(q, k_cache, v_cache):
        append_to_cache(k, v, k_cache, v_cache, lengths, rope=rope)
        return sliding_gqa_decode(q, k_cache, v_cache, lengths, 5, rope=rope)

    q = torch.randn(2, 4, 1, 8, requires_grad=True)
    heard, unheard = rings.clone(), rings.clone()
    with Listener() as listener:
        out = step(q, *heard)
    assert listener.seen == ["append", "decode"]
    assert torch.equal(step(q, *unheard), out) and torch.equal(heard, unheard)
    assert not out.requires_grad and not step(q, *unheard).requires_grad


def test_fake_tensors_and_torch_func_reach_the_operators():
    with FakeTensorMode() as mode:
        q, k_cache, v_cache = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
        lengths = torch.ones(2, dtype=torch.int32)
    assert sliding_gqa_decode(q, k_cache, v_cache, lengths, 5).fake_mode is mode
    q, ring, lengths = torch.randn(3, 2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.tensor([9, 3], dtype=torch.int32)
    mapped = torch.func.vmap(lambda q: sliding_gqa_decode(q, ring, ring, lengths, 5))(q)
    for row, out in zip(q, mapped, strict=True):
        assert torch.equal(sliding_gqa_decode(row, ring, ring, lengths, 5), out)


@pytest.mark.parametrize("backend", ["banded", "reference"])
def test_no_rows_take_a_step(backend):
    ring, lengths = torch.randn(0, 2, 5, 8), torch.ones(0, dtype=torch.int32)
    append_to_cache(ring[:, :, :1], ring[:, :, :1], ring, ring, lengths, backend=backend)
    assert sliding_gqa_decode(torch.randn(0, 4, 1, 8), ring, ring, lengths, 5, backend=backend).shape == (0, 4, 1, 8)


def call(**changed):
    arguments = {
        "q": torch.randn(2, 4, 2, 8),
        "k_cache": torch.randn(2, 2, 6, 8),
        "v_cache": torch.randn(2, 2, 6, 8),
        "lengths": torch.tensor([3, 4], dtype=torch.int32),
        "window": 5,
        **changed,
    }
    return sliding_gqa_decode(**arguments)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"window": 6}, "k_cache has 6 slots, expected at least window \\+ T_new - 1 = 7"),
        ({"window": None, "lengths": torch.tensor([3, 7], dtype=torch.int32)}, "6 slots, fewer than the longest row"),
        ({"lengths": torch.ones(2)}, "lengths is torch.float32 \\(2,\\) on cpu, expected int32 or int64 \\(2,\\)"),
        ({"lengths": torch.tensor([3], dtype=torch.int32)}, "lengths is torch.int32 \\(1,\\)"),
        ({"lengths": torch.ones(2, dtype=torch.int32, device="meta")}, "\\(2,\\) on meta, expected .* on cpu"),
        ({"q": torch.randn(2, 3, 2, 8)}, "k_cache has 2 heads, which do not divide q's 3"),
        ({"v_cache": torch.randn(2, 2, 5, 8)}, "v_cache has shape \\(2, 2, 5, 8\\), expected k_cache's"),
        ({"window": 0}, "window is 0"),
        ({"num_splits": 0}, "num_splits is 0, expected None or a whole number of at least 1"),
        ({"num_splits": 1.0}, "num_splits is 1.0, expected a whole number"),
        ({"backend": "cuda"}, "backend is 'cuda', expected one of"),
    ],
)
def test_bad_decode_calls_are_named(changed, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changed)


def test_more_tokens_than_slots_cannot_be_appended():
    k_cache, v_cache = torch.randn(2, 1, 2, 4, 8)
    k = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="k has 5 tokens, more than the 4 slots of k_cache"):
        append_to_cache(k, k, k_cache, v_cache, torch.tensor([5], dtype=torch.int32))


@pytest.mark.parametrize("rings", [lambda x: x.unbind(1), lambda x: x.flatten(1, 2).chunk(2, dim=1)])
def test_rings_may_be_parts_of_one_buffer(rings):
    k, v = torch.randn(2, 3, 2, 1, 8)
    k_cache, v_cache = rings(torch.zeros(3, 2, 2, 4, 8))
    append_to_cache(k, v, k_cache, v_cache, torch.full((3,), 6))
    assert torch.equal(k_cache[:, :, 1:2], k) and torch.equal(v_cache[:, :, 1:2], v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_int64_are_taken(backend, device):
    k, q = torch.randn(2, Hkv, 1, D, device=device), torch.randn(2, Hq, 1, D, device=device)
    results = []
    for dtype in (torch.int32, torch.int64):
        rings, lengths = torch.zeros(2, 2, Hkv, 4, D, device=device), torch.tensor([6, 2], dtype=dtype, device=device)
        append_to_cache(k, k, *rings, lengths, backend=backend)
        results.append((rings, sliding_gqa_decode(q, *rings, lengths, 4, backend=backend)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_cache_serves_attention_before_the_ring_turns():
    """Decoding the last token equals the last row of plain attention: one oracle for both entry points."""
    q = torch.randn(1, Hq, 10, D)
    k, v = torch.randn(2, 1, Hkv, 10, D)
    full = sliding_gqa_attention(q, k, v, 4)
    lengths = torch.tensor([10], dtype=torch.int32)
    torch.testing.assert_close(sliding_gqa_decode(q[:, :, -1:], k, v, lengths, 4), full[:, :, -1:])
