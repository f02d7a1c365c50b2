"""Rings of int8: what is stored, that decoding reads exactly that, and what is refused."""

import pytest
import torch
from mutants import copy_of_kernels
from torch import library

from kernels import append_to_cache, rope_tables, sliding_gqa_decode
from kernels.backends import reference, triton
from kernels.backends.triton.tile_configs import DecodeTile
from kernels.int8 import dequantized, quantized

BACKENDS = ["banded", "reference", "triton"]
Hq, Hkv, D = 6, 2, 16


def exact_dtype(backend, device):
    return torch.float32 if backend == "triton" and device.type == "cuda" else torch.float64


def empty_rings(batch, slots, device):
    """(k_cache, v_cache), {scales}: scales are NaN, so that a slot that was never written must never be read."""
    rings = torch.full((2, batch, Hkv, slots, D), 77, dtype=torch.int8, device=device).unbind(0)
    k_scales, v_scales = torch.full((2, batch, Hkv, slots), float("nan"), device=device).unbind(0)
    return rings, {"k_scales": k_scales, "v_scales": v_scales}


def test_an_element_is_off_by_half_a_scale_at_most():
    x = torch.randn(50, D, dtype=torch.float64) * torch.logspace(-30, 30, 50, dtype=torch.float64)[:, None]
    codes, scales = quantized(x)
    assert codes.dtype == torch.int8 and codes.abs().amax(-1).eq(127).all()
    torch.testing.assert_close(scales.double(), x.abs().amax(-1) / 127, rtol=1e-6, atol=0)
    assert ((dequantized(codes, scales, torch.float64) - x).abs() <= scales.double()[:, None] * (0.5 + 1e-4)).all()


def test_zeros_stay_zeros_and_no_tiny_or_wrong_token_hides():
    x = torch.zeros(5, D)
    x[1], x[2, 3], x[3, 3], x[4] = 1e-42, float("nan"), float("inf"), -1.0
    codes, scales = quantized(x)
    back = dequantized(codes, scales, torch.float32)
    assert not back[0].any() and scales[0] == 0
    assert back[1].abs().max() <= 1e-42
    assert back[2].isnan().all() and back[3].isnan().all()
    assert codes[4].eq(-127).all() and torch.equal(back[4], x[4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lengths", [[6, 6], [6, 2]])
@pytest.mark.parametrize("rope", [False, True])
def test_append_stores_codes_and_scales_of_rotated_keys(backend, dtype, lengths, rope, device):
    """In the slots of its positions and no other; a row of zeros has the scale 0."""
    (k_cache, v_cache), scales = empty_rings(2, 5, device)
    k, v = torch.randn(2, 2, 3, Hkv, D, device=device).to(dtype).transpose(2, 3)
    v[:, 1] = 0
    rope = rope_tables(10, 8, device=device) if rope else None
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    append_to_cache(k, v, k_cache, v_cache, lengths, rope=rope, **scales, backend=backend)
    plain_k, plain_v = torch.full((2, 2, Hkv, 5, D), float("nan"), dtype=dtype, device=device)
    append_to_cache(k, v, plain_k, plain_v, lengths, rope=rope, backend=backend)
    for codes, scale, plain in ((k_cache, scales["k_scales"], plain_k), (v_cache, scales["v_scales"], plain_v)):
        unwritten = plain[..., 0].isnan()
        assert torch.equal(scale.isnan(), unwritten) and codes[unwritten].eq(77).all()
        wanted_codes, wanted_scales = quantized(plain)
        wanted_codes[unwritten] = 77
        # rotation in another order, or a division, may round another way at a half
        assert (codes.int() - wanted_codes.int()).abs().max() <= 1
        tolerance = 2e-3 if dtype == torch.float16 else 1e-6
        torch.testing.assert_close(scale, wanted_scales, rtol=tolerance, atol=0, equal_nan=True)
    assert scales["v_scales"][:, 1].nan_to_num().eq(0).all()


CASES = {  # window, slots to spare, new tokens, prefix, num_splits, all features
    "a full ring": (5, 0, 1, 0, None, False),
    "everything, several tokens": (5, 2, 3, 0, None, True),
    "no window": (None, 0, 2, 0, None, True),
    "a prefix in its own ring": (3, 0, 1, 2, None, True),
    "a prefix, several tokens": (5, 1, 4, 2, None, True),
    "row by row": (5, 1, 2, 0, 1, True),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [(0, 0), (0, 5)])
@pytest.mark.parametrize("case", CASES)
def test_decoding_reads_what_was_stored(case, padding, backend, device):
    """The same as a ring of floats that holds codes * scales, round the ring and on."""
    window, spare, step, prefix, splits, everything = CASES[case]
    total = 8 if backend == "triton" and step == 1 else 24  # Triton's interpreter is slow
    slots = total if window is None else window + step - 1 + spare
    dtype = exact_dtype(backend, device)
    rope, options = None, {"num_splits": splits, "return_lse": True, "prefix": prefix}
    if everything:
        rope = tuple(table.to(dtype) for table in rope_tables(total, D // 2, device=device))
        options |= {"scale": 0.5, "softcap": 3.0, "sinks": torch.randn(Hq, dtype=dtype, device=device)}
        options |= {"prefix_distance": 9} if prefix and step > 1 else {}
    q, k, v = (torch.randn(2, heads, total, D, dtype=dtype, device=device) for heads in (Hq, Hkv, Hkv))
    rings, scales = empty_rings(2, prefix + slots, device)
    lengths = -torch.tensor(padding, dtype=torch.int32, device=device)
    for first in range(0, total, step):
        part = slice(first, first + step)
        lengths = lengths + step
        new = k[:, :, part], v[:, :, part]
        append_to_cache(*new, *rings, lengths, prefix=prefix, rope=rope, **scales, backend=backend)
        floats = [dequantized(*pair, dtype) for pair in zip(rings, scales.values(), strict=True)]
        arguments = {"rope": rope, **options}
        ours = sliding_gqa_decode(q[:, :, part], *rings, lengths, window, **scales, **arguments, backend=backend)
        exact = sliding_gqa_decode(q[:, :, part], *floats, lengths, window, **arguments, backend="reference")
        real = (lengths[:, None] - step + torch.arange(step, device=device) >= 0)[:, None]  # no padding
        assert not ours[0].masked_select(~real[..., None]).any()
        for a, b in ((ours[0], exact[0]), (ours[1].where(real, 0), exact[1].where(real, 0))):
            tolerance = 1e-6 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("lengths, T", [([200, 60], 1), ([200, 2], 3)])
def test_parts_of_several_tiles(lengths, T, device):
    """Of six tiles of keys each part has its own scales; heads of 24 elements, which fill no tile."""
    dtype = exact_dtype("triton", device)
    q = torch.randn(2, 4, T, 24, dtype=dtype, device=device)
    rings = torch.randint(-127, 128, (2, 2, 2, 93, 24), dtype=torch.int8, device=device)
    scales = torch.rand(2, 2, 2, 93, device=device)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    scales[:, 1, :, lengths[1] :] = float("nan")
    options = {"scale": 0.01, "scales": tuple(scales), "sinks": torch.randn(4, dtype=dtype, device=device)}
    tile = {"config": DecodeTile(16, 16, 4, 1), "num_splits": 3}
    ours = triton.attend_to_cache(q, *rings, lengths, 90, **options, **tile)
    exact = reference.attend_to_cache(q, *rings, lengths, 90, **options)
    torch.testing.assert_close(ours, exact, atol=1e-10 if dtype == torch.float64 else 1e-3, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_is_near_that_of_floats(backend, device):
    """Of normal values: an element of int8 is off by 1/254 of the largest of its head, and errors average out."""
    q, k, v = (torch.randn(2, heads, n, 64, device=device) for heads, n in ((Hq, 1), (Hkv, 60), (Hkv, 60)))
    lengths = torch.full((2,), 60, dtype=torch.int32, device=device)
    codes, scales = torch.zeros(2, 2, Hkv, 60, 64, dtype=torch.int8, device=device), torch.zeros(2, 2, Hkv, 60)
    scales = dict(zip(("k_scales", "v_scales"), scales.to(device), strict=True))
    append_to_cache(k, v, *codes, lengths, **scales, backend=backend)
    ours = sliding_gqa_decode(q, *codes, lengths, 60, **scales, backend=backend)
    plain = sliding_gqa_decode(q, k, v, lengths, 60, backend="banded")
    error = (ours - plain).norm() / plain.norm()
    assert 1e-3 < error < 1e-2  # and int8 was in use


@pytest.mark.parametrize("backend, dtype", [("banded", torch.float16), ("banded", torch.bfloat16),
                                            ("triton", torch.float16)])  # fmt: skip
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e4])
def test_16_bits_neither_overflow_nor_lose_small_values(backend, dtype, size, device):
    q = torch.randn(1, Hq, 1, D, device=device).to(dtype)
    v = (torch.randn(1, Hkv, 100, D, device=device).clamp(-2, 2) * size).to(dtype)
    lengths = torch.tensor([100], dtype=torch.int32, device=device)
    rings, scales = empty_rings(1, 100, device)
    append_to_cache(v / size, v, *rings, lengths, **scales, backend=backend)
    ours = sliding_gqa_decode(q, *rings, lengths, **scales, backend=backend)
    exact = reference.attend_to_cache(q.double(), *rings, lengths, scale=D**-0.5, scales=tuple(scales.values()))
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rope", [None, 8])
def test_operators_pass_opcheck(backend, rope, device):
    q, k = (torch.randn(2, 2, heads, D, device=device).transpose(1, 2) for heads in (Hq, Hkv))
    lengths = torch.tensor([12, 1], dtype=torch.int32, device=device)
    rings = torch.zeros(2, 2, Hkv, 9, D, dtype=torch.int8, device=device)
    scales = torch.ones(2, 2, Hkv, 9, device=device)
    cos, sin = (None, None) if rope is None else rope_tables(16, rope, device=device)
    library.opcheck(torch.ops.sliding_gqa.append, (k, k, *rings, lengths, cos, sin, backend, *scales))
    arguments = (q, *rings, lengths, None, cos, sin, 8, 0.25, None, 2, backend, True, *scales)
    library.opcheck(torch.ops.sliding_gqa.decode, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix", [0, 2])
def test_one_graph_serves_every_step(backend, prefix, device):
    """A compiled step writes codes and scales in place, as the step does."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    def step(q, k, v, rings, scales, lengths):
        lengths += 1
        append_to_cache(k, v, *rings, lengths, prefix=prefix, **scales, backend=backend)
        return sliding_gqa_decode(q, *rings, lengths, 5, prefix=prefix, **scales, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend=count)
    q, k, v = (torch.randn(1, heads, 12, D, device=device) for heads in (Hq, Hkv, Hkv))
    states = [(*empty_rings(1, prefix + 5, device), torch.zeros(1, dtype=torch.int32, device=device)) for _ in range(2)]
    for i in range(8):
        token = [x[:, :, i : i + 1] for x in (q, k, v)]
        ours, plain = (run(*token, *state) for run, state in zip((compiled, step), states, strict=True))
        torch.testing.assert_close(ours, plain)
    assert len(graphs) == 1
    assert all(torch.equal(*pair) for pair in zip(states[0][0], states[1][0], strict=True))
    torch._dynamo.reset()


def test_a_key_past_the_tables_is_seen_by_nobody_without_notice(device):
    """On a CPU it is refused; where nothing reads lengths, its scale is NaN, and no other is."""
    rings, scales = empty_rings(1, 8, device)
    k = torch.randn(1, Hkv, 3, D, device=device)
    lengths, rope = torch.tensor([6], dtype=torch.int32, device=device), rope_tables(5, 8, device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="rope tables hold 5 positions, but position 5 was asked for"):
            append_to_cache(k, k, *rings, lengths, rope=rope, **scales)
    triton.append(k, k, *rings, lengths, rope=rope, scales=tuple(scales.values()))
    assert scales["k_scales"][..., 5].isnan().all() and not scales["k_scales"][..., 3:5].isnan().any()
    assert not scales["v_scales"][..., 3:6].isnan().any()


MUTATIONS = {  # {fault: (file, text, replacement)}
    "a score without its scale": ("tiles.py", "scores *= load_tile(scales[0]", "scores += 0 * load_tile(scales[0]"),
    "a value with the scale of its key": ("tiles.py", "load_tile(scales[1] + slot", "load_tile(scales[0] + slot"),
    "scales of the first slots": ("tiles.py", "scales[1] + slot, in_keys", "scales[1] + k_pos, in_keys"),
    "values stay too large": ("decode.py", "acc = acc / VALUE_UNIT", "acc = acc * 1.0"),
    "the scales of v by k's strides": ("decode.py", "[1] * scale_strides[1][1]", "[1] * scale_strides[0][1]"),
    "rounded down": ("decode.py", "inverse[:, None] + ROUNDING", "inverse[:, None] - 0.5 + ROUNDING"),
    "the scale of v beside its slot": ("decode.py", "slot, scale_strides[1])", "slot ^ 1, scale_strides[1])"),
}  # fmt: skip


def error_of(module, device):
    """The largest difference from the specification of what a module's `append` and `attend_to_cache` make."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 2, D, device=device) for heads in (Hq, Hkv, Hkv))
    lengths = torch.tensor([70, 30], dtype=torch.int32, device=device)
    codes = torch.randint(-127, 128, (2, 2, Hkv, 33, D), dtype=torch.int8, device=device)
    of_keys, of_values = torch.rand(2, Hkv, 33, device=device), torch.rand(2, Hkv, 40, device=device)[..., 3:36]
    found = []
    for one in (module, reference):
        rings, scales = codes.clone(), (of_keys.clone(), of_values.clone().repeat(1, 1, 2)[..., :33])
        one.append(k, v, *rings, lengths, scales=scales)
        options = {"num_splits": 2, "config": DecodeTile(16, 16, 4, 1)} if one is module else {}
        out = one.attend_to_cache(q, *rings, lengths, 32, scale=0.01, scales=scales, **options)
        found.append(torch.cat([x.flatten() for x in (out, *scales, rings / 127)]))
    return (found[0] - found[1]).abs().max().item()


def test_the_check_passes_on_an_unchanged_copy(tmp_path, device):
    assert error_of(*copy_of_kernels(tmp_path, ["decode"]), device) < 1e-3


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation, tmp_path, device):
    assert error_of(*copy_of_kernels(tmp_path, ["decode"], MUTATIONS[mutation]), device) > 0.005


def call(function, **changed):
    (k_cache, v_cache), scales = empty_rings(2, 6, "cpu")
    k, lengths = torch.randn(2, Hkv, 1, D), torch.tensor([3, 4], dtype=torch.int32)
    own = {"k": k, "v": k} if function is append_to_cache else {"q": torch.randn(2, Hq, 1, D), "window": 5}
    return function(**{**own, "k_cache": k_cache, "v_cache": v_cache, "lengths": lengths, **scales, **changed})


WRONG = {
    "k_scales is None": ({"k_scales": None}, "k_scales is None, expected a tensor torch.float32 \\(2, 2, 6\\)"),
    "v_scales is None": ({"v_scales": None}, "v_scales is None, expected a tensor torch.float32 \\(2, 2, 6\\)"),
    "no scales": ({"k_scales": None, "v_scales": None}, "k_cache has dtype torch.int8, which needs its scales"),
    "floats": ({"k_cache": torch.zeros(2, 2, 6, D)}, "k_cache has dtype torch.float32, expected torch.int8 beside"),
    "one of two": ({"v_cache": torch.zeros(2, 2, 6, D)}, "v_cache has dtype torch.float32, expected torch.int8"),
    "shape": ({"v_scales": torch.ones(2, 2, 5)}, "v_scales is torch.float32 \\(2, 2, 5\\), expected .* \\(2, 2, 6\\)"),
    "dtype": ({"k_scales": torch.ones(2, 2, 6).half()}, "k_scales is torch.float16 .*, expected torch.float32"),
    "device": ({"k_scales": torch.ones(2, 2, 6, device="meta")}, "k_scales is on meta, k_cache is on cpu"),
    "stride": ({"k_scales": torch.ones(2, 6, 2).mT}, "k_scales has last stride 2, expected 1"),
}


@pytest.mark.parametrize("function", [append_to_cache, sliding_gqa_decode])
@pytest.mark.parametrize("wrong", WRONG)
def test_bad_calls_are_named(function, wrong):
    call(function)
    changed, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        call(function, **changed)


def test_scales_that_share_memory_are_refused():
    scales = torch.ones(2, 2, 6)
    with pytest.raises(ValueError, match="k_scales and v_scales share memory"):
        call(append_to_cache, k_scales=scales, v_scales=scales)
    with pytest.raises(ValueError, match="k_scales and v_scales share memory"):
        call(append_to_cache, k_scales=scales, v_scales=scales.view(2, 2, 6))
    with pytest.raises(ValueError, match="k_scales is expanded"):
        call(append_to_cache, k_scales=torch.ones(1, 2, 6).expand(2, 2, 6))
