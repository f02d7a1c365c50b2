"""The Triton decode kernels against the specification: on a GPU as they are, elsewhere through the interpreter.

Tiles are 16 keys wide, so that short rings have tiles of every kind. What a call must not read is NaN: slots that it
does not need, what lies around the ring in memory, and what torch.empty returns.
"""

import math
import random

import pytest
import torch
import triton
import triton.language as tl
from budget import eager

from kernels import rope_tables
from kernels.backends import reference
from kernels.backends.triton import decode as decode_kernels
from kernels.backends.triton import tile_configs, tiles
from kernels.backends.triton.decode import append, attend_to_cache, split_count
from kernels.backends.triton.tile_configs import DecodeTile

TINY = DecodeTile(64, 16, 4, 1)
ON_GPU = torch.cuda.is_available()
EXACT = torch.float32 if ON_GPU else torch.float64  # the widest that matrix products have


@pytest.fixture(autouse=True)
def empty_is_nan():
    """Deterministic mode fills what torch.empty returns with NaN: an element that no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def in_nan(*shape, dtype, device):
    """Random (B, H, T, D), cut out of a larger tensor of NaN."""
    around = torch.full([size + 2 for size in shape], float("nan"), dtype=dtype, device=device)
    return around[:-2, 1:-1, :-2, :-2].normal_()


def problem(device, lengths, T=1, window=None, spare=0, Hq=4, Hkv=2, D=16, dtype=EXACT, rotary_dim=0, sinks=False):
    """(arguments, options) of a decode call on a ring that has `spare` slots more than it must have."""
    C = max(*lengths, 1) if window is None else window + T - 1
    C += spare
    B = len(lengths)
    q = in_nan(B, T, Hq, D, dtype=dtype, device=device).transpose(1, 2)
    k_cache, v_cache = (in_nan(B, Hkv, C, D, dtype=dtype, device=device) for _ in range(2))
    v_cache = v_cache.transpose(1, 2).contiguous().transpose(1, 2)  # another layout than k's
    for b, length in enumerate(lengths):
        first = max(0, length - T + 1 - (C if window is None else window))
        unneeded = torch.ones(C, dtype=torch.bool, device=device)
        unneeded[[position % C for position in range(first, length)]] = False
        k_cache[b, :, unneeded] = v_cache[b, :, unneeded] = float("nan")
    options = {"scale": D**-0.5}
    if rotary_dim:
        options["rope"] = rope_tables(max(*lengths, 1), rotary_dim, theta=100.0, device=device)
    if sinks:
        options["sinks"] = torch.randn(Hq, dtype=dtype, device=device)
    return (q, k_cache, v_cache, torch.tensor(lengths, dtype=torch.int32, device=device), window), options


def eager_decode(q, k_cache, v_cache, lengths, window, *, rope=None, **options):
    """The same in PyTorch, with every intermediate result in q's dtype."""
    T, C = q.shape[2], k_cache.shape[2]
    out = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        real = min(T, max(length, 0))  # tokens that are no padding
        if real == 0:
            continue
        first = 0 if window is None else max(0, length - real + 1 - window)
        slots = torch.arange(first, length, device=q.device) % C
        own = q[b : b + 1, :, T - real :]
        if rope is not None:
            own = reference.rotated(own, *(table[length - real : length] for table in rope))
        keys, values = k_cache[b : b + 1, :, slots], v_cache[b : b + 1, :, slots]
        out[b : b + 1, :, T - real :] = eager(own, keys, values, window, **options)[0]
    return out


def assert_right(arguments, options, config=TINY, num_splits=2):
    """The specification's numbers in fp64; below, twice as far off as eager PyTorch in that dtype and a rounding."""
    out = attend_to_cache(*arguments, **options, config=config, num_splits=num_splits)
    q, k_cache, v_cache, *rest = arguments
    wide = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    exact = reference.attend_to_cache(q.double(), k_cache.double(), v_cache.double(), *rest, **wide)
    if q.dtype == torch.float64:
        budget = 1e-12
    else:
        same = eager_decode(*arguments, **options)
        eps = torch.finfo(q.dtype).eps
        if q.dtype == torch.float32 and q.is_cuda:
            eps *= 4  # a product of three TF32 ones keeps 22 bits
        budget = 2 * ((same - exact).abs().max() + eps * exact.abs().max()).item()
    torch.testing.assert_close(out.double(), exact, atol=budget, rtol=0)


# -- every way to be in the ring -------------------------------------------------------------------------------------

LENGTHS = [100, 41, 12, 1, -3]  # turned over its end, just about to, not full, first token, all padding


@pytest.mark.parametrize("T", range(1, 17))
@pytest.mark.parametrize("spare", [0, 7])
def test_every_number_of_new_tokens(T, spare, device):
    assert_right(*problem(device, LENGTHS, T, window=20, spare=spare, Hq=3, Hkv=1), num_splits=1)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 2, 15, 16, 17, 40])
def test_every_window(window, T, device):
    assert_right(*problem(device, LENGTHS, T, window=window, Hq=2, Hkv=1))


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("Hq, Hkv", [(2, 2), (6, 2), (4, 1), (7, 1), (8, 1), (24, 1)])
def test_every_group(Hq, Hkv, T, device):
    """Groups of 1, 3, 4, 7 heads, all heads on one, and more than the 16 rows of a matrix product."""
    assert_right(*problem(device, [70, 9], T, window=33, Hq=Hq, Hkv=Hkv), num_splits=1 if T > 1 else 2)


@pytest.mark.parametrize("T, Hq", [(1, 40), (12, 3), (16, 7)])
def test_more_rows_than_a_tile(T, Hq, device):
    """The keys of a row block are those of its own tokens: blocks of 16 rows begin in the midst of a token's heads."""
    config = DecodeTile(16, 16, 4, 1)
    assert_right(*problem(device, [70, 9], T, window=33, Hq=Hq, Hkv=1), config=config, num_splits=1)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 5, 8])
def test_every_number_of_parts(num_splits, device):
    """Of 6 tiles of keys, and of fewer in short rows: some parts are longer than others, or empty."""
    assert_right(*problem(device, [200, 60, 5, 0], 2, window=90, Hkv=1, sinks=True), num_splits=num_splits)


def test_more_parts_than_are_added_up_at_a_time(device):
    assert_right(*problem(device, [400, 30], window=290, Hq=1, Hkv=1, sinks=True), num_splits=19)


FEATURES = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "sinks and softcap": {"sinks": True, "softcap": 1.5},
    "a scale": {"scale": 0.9},
    "rope": {"rotary_dim": 16},
    "rope on half of the head": {"rotary_dim": 8},
    "rope with odd halves": {"rotary_dim": 12, "D": 24},
    "everything": {"softcap": 1.5, "sinks": True, "rotary_dim": 80, "D": 80},
}
DTYPES = [EXACT, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, num_splits, dtype, device):
    shape = dict(FEATURES[feature])
    changed = {name: shape.pop(name) for name in ("softcap", "scale") if name in shape}
    arguments, options = problem(device, [70, 9], 3, window=33, spare=2, dtype=dtype, **shape)
    assert_right(arguments, {**options, **changed}, num_splits=num_splits)


@pytest.mark.parametrize("D", [8, 16, 24, 80, 96, 256])
def test_head_sizes(D, device):
    assert_right(*problem(device, [70, 9], window=33, D=D, rotary_dim=8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 16])
def test_shipped_tiles(T, dtype, device):
    """The configs and splits that users get: the interpreter's here, the table's on a GPU."""
    arguments, options = problem(device, [500, 150, 30], T, window=200, D=64, dtype=dtype, rotary_dim=64, sinks=True)
    assert_right(arguments, options, None, None)


@pytest.mark.parametrize("rotary_dim, D", [(0, 16), (16, 16), (8, 16), (12, 24), (80, 80), (0, 8)])
@pytest.mark.parametrize("T", [1, 5, 16])
def test_append_writes_its_slots_and_no_other(T, rotary_dim, D, device):
    lengths = torch.tensor([100, 41, 12, 1, -3], dtype=torch.int32, device=device)
    k, v = (in_nan(5, T, 3, D, dtype=EXACT, device=device).transpose(1, 2) for _ in range(2))
    v = v.transpose(2, 3).contiguous().transpose(2, 3)  # a last stride that is not 1
    ours = [torch.full((5, 3, 21, D), float("nan"), dtype=EXACT, device=device) for _ in range(2)]
    ours[1] = ours[1].transpose(1, 2).contiguous().transpose(1, 2)
    expected = [x.clone() for x in ours]
    rope = rope_tables(100, rotary_dim, theta=100.0, device=device) if rotary_dim else None
    append(k, v, *ours, lengths, rope=rope)
    wide = None if rope is None else tuple(table.to(EXACT) for table in rope)
    reference.append(k, v, *expected, lengths, rope=wide)
    tolerance = 1e-15 if EXACT == torch.float64 else 1e-6
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, equal_nan=True)


def test_nothing_to_do(device):
    for B, T in ((0, 1), (2, 0)):
        q, k = torch.empty(B, 4, T, 16, device=device), torch.empty(B, 2, T, 16, device=device)
        cache = torch.full((B, 2, 5, 16), float("nan"), device=device)
        lengths = torch.full((B,), 3, dtype=torch.int32, device=device)
        append(k, k, cache, cache.clone(), lengths)
        assert cache.isnan().all()
        assert attend_to_cache(q, cache, cache, lengths, 5, scale=1.0).shape == q.shape


# -- exactness -------------------------------------------------------------------------------------------------------


def test_neither_the_ring_nor_where_it_has_turned_changes_a_bit(device):
    """Keys are walked from the oldest on, so the order of the sums is that of the positions."""
    (q, k_cache, v_cache, _, window), options = problem(device, [33], window=33, Hq=2, Hkv=1)
    outs = []
    for length in (33, 50, 66):
        for C in (33, 34, 60):
            slots = torch.arange(length - 33, length) % C
            rings = [torch.full((1, 1, C, 16), float("nan"), dtype=EXACT, device=device) for _ in range(2)]
            for ring, cache in zip(rings, (k_cache, v_cache), strict=True):
                ring[:, :, slots] = cache
            lengths = torch.full((1,), length, dtype=torch.int32, device=device)
            outs.append(attend_to_cache(q, *rings, lengths, window, **options, config=TINY, num_splits=2))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_very_negative_scores_are_scores(device):
    """A finite stand-in for minus infinity would hide scores below it."""
    (q, k_cache, v_cache, lengths, window), options = problem(device, [70, 9], 2, window=33, dtype=torch.float32)
    q.fill_(1.0)
    k_cache[:] = torch.where(k_cache.isnan(), k_cache, k_cache * 1e5 - 1e6)
    out = attend_to_cache(q, k_cache, v_cache, lengths, window, **options, config=TINY, num_splits=2)
    exact = reference.attend_to_cache(q.double(), k_cache.double(), v_cache.double(), lengths, window, **options)
    torch.testing.assert_close(out.double(), exact, atol=1e-3, rtol=1e-3)


# -- what the compiler and the launchers rely on ---------------------------------------------------------------------


def test_slots_go_round_the_ring_once(device):
    @triton.jit
    def slots_kernel(out_ptr, oldest_slot, num_slots):
        key = tl.arange(0, 8)
        tl.store(out_ptr + key, tiles.ring_slot(oldest_slot, key, num_slots))

    for oldest_slot in range(11):
        slots = torch.empty(8, dtype=torch.int32, device=device)
        slots_kernel[(1,)](slots, oldest_slot, 11)
        assert slots.tolist() == [(oldest_slot + key) % 11 for key in range(8)]


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    torch.use_deterministic_algorithms(False)  # nothing is to be filled
    D, C = 128, 2**24 + 100
    k_cache, v_cache = (torch.empty(1, 1, C, D, dtype=torch.float16, device=device) for _ in range(2))
    q, k, v = (torch.randn(1, heads, 16, D, dtype=torch.float16, device=device) for heads in (4, 1, 1))
    lengths = torch.tensor([C], dtype=torch.int32, device=device)
    append(k, v, k_cache, v_cache, lengths)
    assert_right((q[:, :, -1:], k_cache, v_cache, lengths, 16), {"scale": D**-0.5}, None, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("T", [1, 4, 16])
def test_large_shapes(T, D, dtype, device):
    for window in (None, 128, 1000):
        arguments, options = problem(
            device, [3000, 1001, 77, 1, 0], T, window, Hq=32, Hkv=8, D=D, dtype=dtype, rotary_dim=D, sinks=True
        )
        for num_splits in (None, 1, 7):
            assert_right(arguments, options, None, num_splits)


@pytest.mark.gpu
def test_one_cuda_graph_serves_every_step(device):
    torch.use_deterministic_algorithms(False)
    q, k, v = (torch.randn(2, heads, 300, 64, device=device) for heads in (8, 2, 2))
    expected = reference.attention(q.double(), k.double(), v.double(), 100, scale=0.125)[0]
    rings = [torch.full((2, 2, 100, 64), float("nan"), device=device) for _ in range(2)]
    lengths = torch.ones(2, dtype=torch.int32, device=device)
    token = [x[:, :, :1].clone() for x in (q, k, v)]

    def step():
        append(*token[1:], *rings, lengths)
        out = attend_to_cache(token[0], *rings, lengths, 100, scale=0.125, num_splits=3)
        lengths.add_(1)
        return out

    stream = torch.cuda.Stream()  # the first launches compile, which a capture cannot
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    lengths.fill_(1)
    for i in range(300):
        for now, x in zip(token, (q, k, v), strict=True):
            now.copy_(x[:, :, i : i + 1])
        graph.replay()
        torch.testing.assert_close(out.double(), expected[:, :, i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("processors", [46, 108, 132])
def test_few_rows_are_split_until_the_gpu_is_full_and_many_are_not(processors):
    room = decode_kernels.RESIDENT * processors
    for programs in (1, 8, 16):
        running = split_count(programs, 1000, processors) * programs
        assert running / (triton.cdiv(running, room) * room) > 0.9
        # of 16 tiles, the longest part is as short as the room allows
        longest = triton.cdiv(16, split_count(programs, 16, processors))
        assert longest == triton.cdiv(16, min(16, room // programs))
    assert split_count(10 * room, 1000, processors) == 1
    assert split_count(1, 1, processors) == 1


def test_the_number_of_parts_is_that_of_an_exhaustive_search():
    def exhaustive(programs, tiles, processors):
        def time(splits):
            waves = math.ceil(programs * splits / (decode_kernels.RESIDENT * processors))
            combine = decode_kernels.COMBINE if splits > 1 else 0
            return waves * (math.ceil(tiles / splits) + decode_kernels.START) + combine

        candidates = {splits: time(splits) for splits in range(1, max(1, tiles) + 1)}
        shortest = min(candidates.values())
        return next(splits for splits, time in candidates.items() if time <= 1.05 * shortest)

    dice = random.Random(0)
    for _ in range(3000):
        # as many small as large
        point = [int(2 ** dice.uniform(0, bits)) for bits in (11, 11, 8)]
        assert split_count(*point) == exhaustive(*point), point
    assert split_count(1, 0, 132) == exhaustive(1, 0, 132)


def test_the_search_for_the_number_of_parts_stalls_no_step():
    """To weigh every number of parts of a billion tiles would take minutes; the cache keeps fewer than asked for."""
    assert 251 <= split_count(1, 10**9, 132) <= 264
    for programs in range(1, 3001):
        split_count(programs, 64, 132)
    assert split_count.cache_info().currsize == split_count.cache_info().maxsize < 3000


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_head_size_has_tiles(arch, dtype):
    for head_dim in (16, 24, 64, 80, 96, 128, 256):
        config = tile_configs.tile_config("decode", head_dim, dtype, arch)
        assert min(config.BLOCK_M, config.BLOCK_N) >= 16 and config.BLOCK_M & (config.BLOCK_M - 1) == 0


def test_steps_of_every_length_share_a_binary():
    """Nothing that changes from one step to the next may become part of what Triton specialises a kernel for."""
    for kernel, names in (
        (decode_kernels.append_kernel, {"num_rows", "num_new", "num_heads", "num_slots", "num_positions"}),
        (
            decode_kernels.decode_kernel,
            {"num_new", "num_kv_heads", "num_slots", "window", "max_length", "num_positions", "num_splits"},
        ),
        (decode_kernels.combine_kernel, {"num_new", "num_heads", "num_splits"}),
    ):
        fixed = kernel.do_not_specialize if ON_GPU else kernel.kwargs["do_not_specialize"]
        assert names <= set(fixed)


BEHIND = 7.0  # what lies in memory behind the tables


def short_tables(rows, rotary_dim, device):
    """Tables of fewer rows than the memory that they lie in."""
    return [torch.cat([table, torch.full_like(table, BEHIND)])[:rows]
            for table in rope_tables(rows, rotary_dim, device=device)]  # fmt: skip


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("rotary_dim", [8, 16])
def test_positions_past_the_tables_give_nan_and_are_not_read(rotary_dim, num_splits, device):
    """The last of row 0's three tokens is just past the tables, row 2's are where no memory is; row 1 has padding."""
    lengths = torch.tensor([101, 1, 2**31 - 1], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(3, heads, 3, 16, device=device) for heads in (4, 2, 2))
    rope = short_tables(100, rotary_dim, device)
    k_cache, v_cache = torch.zeros(2, 3, 2, 40, 16, device=device)
    append(k, v, k_cache, v_cache, lengths, rope=rope)
    lost = [(0, 100 % 40), *((2, position % 40) for position in range(2**31 - 4, 2**31 - 1))]
    expected = torch.zeros_like(k_cache, dtype=torch.bool)
    for row, slot in lost:
        expected[row, :, slot] = True
    assert torch.equal(k_cache.isnan(), expected) and not v_cache.isnan().any()

    k_cache, v_cache = torch.randn(2, 3, 2, 40, 16, device=device)
    out = attend_to_cache(q, k_cache, v_cache, lengths, 38, scale=0.25, rope=rope, num_splits=num_splits)
    assert out[2].isnan().all() and out[0, :, 2].isnan().all()
    exact = reference.attend_to_cache(*(x[:2] for x in (q, k_cache, v_cache, lengths)), 38, scale=0.25,
                             rope=rope_tables(101, rotary_dim, device=device))  # fmt: skip
    torch.testing.assert_close(out[0, :, :2], exact[0, :, :2])
    torch.testing.assert_close(out[1], exact[1])


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("sinks", [False, True])
def test_without_a_window_a_row_longer_than_its_ring_is_nan(sinks, num_splits, device):
    q, k_cache, v_cache = (torch.randn(3, heads, n, 16, device=device) for heads, n in ((4, 1), (2, 40), (2, 40)))
    lengths = torch.tensor([40, 41, 3], dtype=torch.int32, device=device)
    options = {"scale": 0.25, "sinks": torch.zeros(4, device=device) if sinks else None}
    out = attend_to_cache(q, k_cache, v_cache, lengths, **options, num_splits=num_splits)
    assert out[1].isnan().all() and out.isnan().sum() == out[1].numel()
    exact = reference.attend_to_cache(q, k_cache, v_cache, lengths.clamp(max=40), **options)
    torch.testing.assert_close(out[::2], exact[::2])
    windowed = attend_to_cache(q, k_cache, v_cache, lengths, 40, **options, num_splits=num_splits)
    assert not windowed.isnan().any()
