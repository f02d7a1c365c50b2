"""The Triton attention kernels against fp64, on hard shapes: on a GPU as they are, elsewhere through the interpreter.

Tiles are 16 rows by 16 keys (32 in the interior where a test says so), so that short sequences have every kind of tile.
What torch.empty returns is NaN, and the inputs lie in tensors full of NaN.
"""

import pytest
import torch
import triton
import triton.language as tl
from budget import excess

from kernels import rope_tables, sliding_gqa_attention
from kernels.backends import reference
from kernels.backends.triton import attention_backward, attention_forward, launch, tile_configs, tiles
from kernels.backends.triton import rope as rope_kernel
from kernels.backends.triton.attention_backward import attend_backward, head_parts
from kernels.backends.triton.attention_forward import attend
from kernels.backends.triton.tile_configs import KeyTile, RowTile

TINY = RowTile(16, 16, 16, 4, 1)
WIDE = RowTile(32, 16, 32, 4, 1)
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def empty_is_nan():
    """Deterministic mode fills what torch.empty returns with NaN: an element that no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def head_view(B, H, T, D, dtype, device):
    """Random (B, H, T, D) of the layout (B, T, H, D), cut out of a larger tensor of NaN."""
    around = torch.full((B, T + 3, H + 1, D + 8), float("nan"), dtype=dtype, device=device)
    view = around[:, :T, :H, :D]
    return view.normal_().transpose(1, 2)


def problem(device, T=40, S=None, Hq=4, Hkv=2, D=16, B=1, dtype=torch.float32, sinks=False, rotary_dim=0):
    """(inputs, grads, options): q, k, v (, sinks), the gradients of out and lse, and rope if rotary_dim is given."""
    S = T if S is None else S
    inputs = [head_view(B, *shape, D, dtype, device) for shape in ((Hq, T), (Hkv, S), (Hkv, S))]
    if sinks:
        inputs.append(torch.randn(Hq, device=device, dtype=dtype))
    grads = head_view(B, Hq, T, D, dtype, device), torch.randn(B, Hq, T, device=device)
    options = {"scale": D**-0.5}
    if rotary_dim:
        options["rope"] = rope_tables(S + 3, rotary_dim, device=device, theta=100.0)
    return inputs, grads, options


def attention(inputs, grads, window, config=TINY, **options):
    """[out, lse, dq, dk, dv (, dsinks)] of the kernels with all passes in tiles of `config`; None for the table's."""
    q, k, v = inputs[:3]
    options["sinks"] = inputs[3] if len(inputs) == 4 else None
    out, lse = attend(q, k, v, window, config=config, **options)
    configs = config, config and KeyTile(*config)
    results = attend_backward(*grads, q, k, v, out, lse, window, configs=configs, **options)
    return [out, lse, *(x for x in results if x is not None)]


def assert_within_budget(inputs, grads, window, config=TINY, **options):
    ratios = excess(attention(inputs, grads, window, config, **options), inputs, grads, window, **options)
    assert max(ratios.values()) <= 1, ratios


# -- every edge of the band, for every way to pack a group ---------------------------------------------------------

LENGTHS = {"T = S": (32, 32), "ragged": (37, 37), "T < S": (21, 50), "T = 1": (1, 35)}


@pytest.mark.parametrize("window", [None, 1, 2, 15, 16, 17, 50])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_window_length_and_group(lengths, window, device):
    """Groups of 1, 3, 4, 7 heads, and all heads on one: 1, 1, 4, 1 and 8 of them packed into a tile."""
    T, S = LENGTHS[lengths]
    for Hq, Hkv in ((2, 2), (3, 1), (4, 1), (7, 1), (8, 1)):
        inputs, grads, options = problem(device, T, S, Hq, Hkv)
        assert_within_budget(inputs, grads, window, **options)


@pytest.mark.parametrize("T, S, window", [(100, 100, 50), (100, 117, 70), (96, 96, 64), (70, 130, None), (65, 65, 64)])
def test_long_bands_have_an_interior(T, S, window, device):
    """Enough keys between the edges for tiles of 32 without a mask, and for odd ones left over to the edges."""
    for Hq, Hkv in ((2, 2), (4, 1)):
        inputs, grads, options = problem(device, T, S, Hq, Hkv)
        assert_within_budget(inputs, grads, window, WIDE, **options)


def test_the_tiling_changes_nothing_but_rounding(device):
    inputs, grads, options = problem(device, T=90, S=101)
    expected = attention(inputs, grads, 37, TINY, **options)
    for config in (WIDE, RowTile(16, 16, 64, 4, 1), RowTile(64, 32, 32, 4, 1), RowTile(32, 32, 64, 4, 1)):
        for a, b in zip(attention(inputs, grads, 37, config, **options), expected, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


# -- features ------------------------------------------------------------------------------------------------------

FEATURES = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "a scale": {"scale": 0.9},
    "rope": {"rotary_dim": 16},
    "rope on half of the head": {"rotary_dim": 8},
    "rope on a quarter of the head": {"rotary_dim": 4},
    "rope with odd halves": {"rotary_dim": 12, "D": 24},
    "rope on a head of 48": {"rotary_dim": 48, "D": 48},
    "rope on three quarters, whose halves pad to a wider tile": {"rotary_dim": 24, "D": 32},
    "everything": {"softcap": 1.5, "sinks": True, "rotary_dim": 16, "B": 2},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, dtype, device):
    shape = dict(FEATURES[feature])
    changed = {name: shape.pop(name) for name in ("softcap", "scale") if name in shape}
    inputs, grads, options = problem(device, 37, 53, dtype=dtype, **shape)
    assert_within_budget(inputs, grads, 20, **{**options, **changed})


@pytest.mark.parametrize("D", [8, 16, 24, 72, 80, 96, 128, 256])
def test_head_sizes(D, device):
    inputs, grads, options = problem(device, 20, 25, Hq=2, Hkv=1, D=D)
    assert_within_budget(inputs, grads, 11, **options)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("shape", [{"B": 2}, {"B": 1, "rotary_dim": 16}, {"B": 1, "rotary_dim": 24, "D": 32}])
def test_heads_of_a_group_spread_over_programs(shape, parts, device):
    """The sum over the query heads of a KV head, made by several programs of the dk/dv kernel."""
    inputs, grads, options = problem(device, 6, 14, Hq=128, Hkv=2, **shape)  # 16 heads a tile: 4 packs
    out, lse = attend(*inputs, 7, config=TINY, **options)
    one, several = (
        attend_backward(*grads, *inputs, out, lse, 7, configs=(TINY, KeyTile(*TINY)), parts=among, **options)[:3]
        for among in (1, parts)
    )
    for a, b in zip(several, one, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_heads_are_spread_where_programs_are_few():
    # 4,096 tokens of one KV head in blocks of 64 keys, 8 packs of 4 heads, 132 multiprocessors
    assert head_parts(64, 8, 132) == 8 and head_parts(64, 2, 132) == 2
    assert head_parts(264, 8, 132) == 1 and head_parts(64, 3, 132) == 1 and head_parts(1, 1, 132) == 1


def test_keys_before_the_oldest_window_are_not_rotated(device, monkeypatch):
    """A chunk of a prompt at the end of a long cache: what the window does not reach costs nothing."""
    rotated = []

    def counting(k, *rest, **options):
        rotated.append(k.shape[2])
        return rope_kernel.rotate(k, *rest, **options)

    for module in (attention_forward, attention_backward):
        monkeypatch.setattr(module, "rotate", counting)
    inputs, grads, options = problem(device, 6, 90, rotary_dim=16)
    assert_within_budget(inputs, grads, 11, **options)
    assert rotated == [16, 16]
    assert_within_budget(inputs, grads, None, **options)
    assert rotated[2:] == [90, 90]


def test_a_common_offset_of_scores_does_not_add_up(device):
    """Rescaling where no maximum has risen is by 1, whatever the pivot was rounded to."""
    q, k, v = (torch.randn(1, 1, length, 16, device=device) for length in (4, 2048, 2048))
    q[..., 0], k[..., 0] = 6.0, 20.0
    out, lse = attend(q, k, v, None, scale=0.25, config=TINY)
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), None, scale=0.25)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


def test_nan_is_not_hidden(device):
    inputs, _, options = problem(device, T=20)
    inputs[0][0, 1, 5, 3] = float("nan")
    for result in attend(*inputs, 7, config=TINY, **options):
        assert result[0, 1, 5].isnan().all()
        assert result.isnan().sum() == result[0, 1, 5].numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shipped_tiles(dtype, device):
    """The configs that users get: the interpreter's here, the table's on a GPU."""
    inputs, grads, options = problem(device, 150, 170, D=32, dtype=dtype, sinks=True, rotary_dim=32)
    assert_within_budget(inputs, grads, 100, None, **options)


def test_values_of_bf16_through_an_upcast(device):
    """The interpreter cannot multiply bf16; numbers that bf16 can hold, it can."""
    inputs, grads, options = problem(device, 37, 53, rotary_dim=16)
    inputs = [x.bfloat16().float() for x in inputs]
    assert_within_budget(inputs, grads, 20, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 128, 1000])
def test_large_shapes(D, window, dtype, device):
    everything = {"sinks": True, "rotary_dim": D}
    inputs, grads, options = problem(device, 1500, 2000, Hq=8, Hkv=2, D=D, B=2, dtype=dtype, **everything)
    assert_within_budget(inputs, grads, window, None, **options, softcap=30.0)


# -- exactness -----------------------------------------------------------------------------------------------------


def test_keys_out_of_sight_change_nothing(device):
    """Neither values of, nor gradients to, keys that no query sees: exact zeros and equal bits."""
    inputs, grads, options = problem(device, T=10, S=60)
    out, lse, _, dk, dv = attention(inputs, grads, 7, **options)
    seen = slice(60 - 10 - 6, 60)
    for x in (dk, dv):
        assert x[:, :, seen].abs().min() > 0
        assert not x[:, :, : seen.start].any()
    q, k, v = (x.clone() for x in inputs)
    k[:, :, : seen.start] = 1e4
    v[:, :, : seen.start] = -1e4
    again = attend(q, k, v, 7, config=TINY, **options)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def test_later_keys_change_no_earlier_query(device):
    inputs, grads, options = problem(device, T=40)
    out, _ = attend(*inputs, 9, config=TINY, **options)
    for x in inputs:
        x[:, :, 25:] = 1e4
    again, _ = attend(*inputs, 9, config=TINY, **options)
    assert torch.equal(out[:, :, :25], again[:, :, :25])


def test_a_window_of_all_but_one_key_is_not_full_attention(device):
    inputs, grads, options = problem(device, T=37)
    almost = attention(inputs, grads, 36, **options)
    full = attention(inputs, grads, None, **options)
    torch.testing.assert_close(almost[0][:, :, :36], full[0][:, :, :36])
    assert (almost[0][:, :, 36] - full[0][:, :, 36]).abs().max() > 1e-3
    for a, b in zip(full, attention(inputs, grads, 37, **options), strict=True):
        assert torch.equal(a, b)


def test_very_negative_scores_are_scores(device):
    """A finite stand-in for minus infinity would hide scores below it."""
    inputs, grads, options = problem(device, T=20)
    inputs[0].fill_(1.0)
    inputs[1].copy_(-1e6 + 1e5 * torch.randn_like(inputs[1]))
    out, lse = attend(*inputs, 5, config=TINY, scale=1.0)
    exact, exact_lse = reference.attention(*(x.double() for x in inputs), 5, scale=1.0)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)


def test_a_gradient_of_lse_alone(device):
    """lse is a result like any other: its gradient is folded into delta."""
    q, k, v = (x.clone().requires_grad_() for x in problem(device, T=20)[0])
    weight = torch.randn(1, 4, 20, device=device)
    ours = sliding_gqa_attention(q, k, v, 7, return_lse=True, backend="triton")[1]
    exact = reference.attention(q.double(), k.double(), v.double(), 7, scale=0.25)[1]
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k)) for x in (ours, exact)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 matrix products are the interpreter's")
def test_gradcheck_in_fp64(device):
    (q, k, v, sinks), _, options = problem(device, 9, 12, D=16, dtype=torch.float64, sinks=True, rotary_dim=8)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]

    def attend(q, k, v, sinks):
        return sliding_gqa_attention(
            q, k, v, 5, sinks=sinks, rope=options["rope"], softcap=2.0, return_lse=True, backend="triton"
        )

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("B, T, S", [(0, 5, 5), (1, 0, 5), (1, 0, 0), (2, 0, 3)])
def test_nothing_to_do(B, T, S, device):
    q, k, v = (torch.randn(B, H, L, 16, device=device, requires_grad=True) for H, L in ((4, T), (2, S), (2, S)))
    sinks = torch.zeros(4, device=device, requires_grad=True)
    out, lse = sliding_gqa_attention(q, k, v, 3, sinks=sinks, return_lse=True, backend="triton")
    assert out.shape == q.shape and lse.shape == (B, 4, T)
    for x in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, sinks)):
        assert not x.any()


# -- what the compiler and the launchers rely on -------------------------------------------------------------------


def test_row_addresses_are_64_bit(device):
    """3 batches and 5 heads of 2**31 elements, positions 2**30 apart."""

    @triton.jit
    def offsets_kernel(offset_ptr, strides, batch, head, position):
        tl.store(offset_ptr, tiles.row_offset(batch, head, position, strides))

    offset = torch.zeros(1, dtype=torch.int64, device=device)
    offsets_kernel[(1,)](offset, (2**31 + 16, 2**31 - 16, 2**30), 3, 5, 70)
    assert offset.item() == 3 * (2**31 + 16) + 5 * (2**31 - 16) + 70 * 2**30


def test_strides_come_in_units_of_eight_where_that_says_more():
    def strides(*shape):
        return launch.strides_of(torch.empty(shape))

    assert strides(2, 4, 8, 64) == (1, ((2048, 512, 64),))  # all multiples of 16, which Triton sees
    assert strides(2, 4, 8, 72) == (8, ((288, 72, 9),))
    assert strides(2, 4, 8, 60) == (1, ((1920, 480, 60),))
    mixed = launch.strides_of(torch.empty(2, 4, 8, 72), torch.empty(2, 4, 8, 64))
    assert mixed == (8, ((288, 72, 9), (256, 64, 8)))


def brute_force_spans(queries, first_key, last_key, window, offset):
    """Which of `queries` see some, and which see all, of the keys first_key .. last_key."""
    some, every = [], []
    for query in queries:
        seen = [offset + query - window < key <= offset + query for key in range(first_key, last_key + 1)]
        some += [query] * any(seen)
        every += [query] * all(seen)
    return some, every


@pytest.mark.skipif(torch.cuda.is_available(), reason="calls the helpers as Python functions, in the interpreter")
@pytest.mark.parametrize("window", [1, 3, 16, 17, 40, 90])
def test_spans_cover_what_is_seen_and_no_interior_needs_a_mask(window, device):
    """The walks over keys and, transposed, over queries, against the definition of the band."""

    @triton.jit
    def spans_kernel(out_ptr, first, last, window, offset, length, KEYS: tl.constexpr):
        if KEYS:
            edges, interior = tiles.key_spans(first, last, window, 4, 8)
        else:
            edges, interior = tiles.query_spans(first, last, window, offset, length, 4, 8)
        for i in tl.static_range(4):
            tl.store(out_ptr + i, edges[i])
            tl.store(out_ptr + 4 + i, interior[i])

    def walk(span, block):
        first, end_first, second, tiles_left = span
        tile = second if first == end_first else first
        for _ in range(tiles_left):
            yield range(tile, tile + block)
            tile = second if tile + block == end_first else tile + block

    T, S = 61, 90
    offset = S - T
    for keys, own, length in ((True, 8, T), (False, 16, S)):
        for start in range(0, length, own):
            last = min(start + own, length) - 1
            first, last = (start + offset, last + offset) if keys else (start, last)
            out = torch.zeros(8, dtype=torch.int32, device=device)
            spans_kernel[(1,)](out, first, last, window, offset, T, KEYS=keys)
            edge_tiles, full_tiles = list(walk(out[:4].tolist(), 4)), list(walk(out[4:].tolist(), 8))
            visited = sorted(i for tile in edge_tiles + full_tiles for i in tile)
            assert len(visited) == len(set(visited))
            if keys:
                seen = [key for key in range(S) if first - window < key <= last]
                full = [key for key in range(S) if last - window < key <= first]
            else:
                seen, full = brute_force_spans(range(T), first, last, window, offset)
            assert set(seen) <= set(visited)
            assert all(set(tile) <= set(full) for tile in full_tiles)
            assert all(set(tile) & set(seen) for tile in edge_tiles)
            assert sum(set(range(i, i + 8)) <= set(full) for i in range(0, S, 4)) == 0 or full_tiles


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_head_size_has_tiles(arch, dtype):
    for name in ("forward", "dq", "dkdv"):
        for head_dim in (16, 24, 64, 80, 96, 128, 256):
            own, edge, step, *_ = tile_configs.tile_config(name, head_dim, dtype, arch)
            assert step % edge == 0 and min(own, edge) >= 16


def test_heads_without_a_tile_are_refused():
    with pytest.raises(ValueError, match=r"q has head size 264, expected at most 256, .*use backend='banded'"):
        tile_configs.tile_config("forward", 264, torch.float16, 90)


def test_lengths_and_windows_share_a_binary():
    """Neither the lengths nor the window may become part of what Triton specialises a kernel for."""
    for kernel in (
        attention_forward.attention_forward_kernel,
        attention_backward.attention_dq_kernel,
        attention_backward.attention_dkdv_kernel,
    ):
        assert {"num_queries", "num_keys", "num_kv_heads", "window"} <= unspecialised(kernel)
    assert {"num_tokens", "offset", "num_q_heads", "num_k_heads"} <= unspecialised(rope_kernel.rope_kernel)


def unspecialised(kernel):
    if hasattr(kernel, "do_not_specialize"):
        return set(kernel.do_not_specialize)
    return set(kernel.kwargs["do_not_specialize"])  # the interpreter's
