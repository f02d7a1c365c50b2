"""One token a row in one go is what append and decode are one after the other."""

import pytest
import torch

from kernels import append_to_cache, rope_tables, sliding_gqa_decode
from kernels.backends.banded.token_step import CachedAttention, RowAttention, RowPositions, StepPositions

Hq, Hkv, D = 6, 2, 16


@pytest.mark.parametrize("window", [1, 5, None])
@pytest.mark.parametrize("rotary_dim", [0, 8, 16])
@pytest.mark.parametrize("lengths", [[0], [3, 3], [3, 0, 9], [40, 40], [40, 6, 13]], ids=str)
def test_it_equals_append_and_decode(lengths, rotary_dim, window):
    lengths = torch.tensor(lengths, dtype=torch.int32)
    B, total, dtype = len(lengths), int(lengths.max()) + 12, torch.float64
    rope = tuple(t.to(dtype) for t in rope_tables(total, rotary_dim)) if rotary_dim else None
    angles = None if rope is None else lambda position: tuple(table[position] for table in rope)
    shape = (2, B, Hkv, total if window is None else window, D)
    k_cache, v_cache = torch.randn(shape, dtype=dtype)
    for row, length in enumerate(lengths.tolist()):  # poison: slots never written must not be read
        k_cache[row, :, length:], v_cache[row, :, length:] = float("nan"), float("nan")
    k_expected, v_expected = k_cache.clone(), v_cache.clone()
    ring = CachedAttention(k_cache, v_cache, Hq, rotary_dim, lengths)
    for _ in range(12):
        lengths += 1
        qkv = torch.randn(B, (Hq + 2 * Hkv) * D, dtype=dtype)
        out = ring(qkv, StepPositions(lengths, D, angles))
        q, k, v = qkv.view(B, Hq + 2 * Hkv, 1, D).split([Hq, Hkv, Hkv], dim=1)
        append_to_cache(k, v, k_expected, v_expected, lengths, rope=rope, backend="banded")
        expected = sliding_gqa_decode(q, k_expected, v_expected, lengths, window, rope=rope, backend="banded")
        torch.testing.assert_close(out.view(B, Hq, 1, D), expected, atol=1e-12, rtol=1e-12)
    written = k_expected.isfinite()
    torch.testing.assert_close(k_cache[written], k_expected[written], atol=1e-12, rtol=1e-12)
    assert torch.equal(v_cache[written], v_expected[written])


@pytest.mark.parametrize("window", [1, 5, None])
@pytest.mark.parametrize("rotary_dim", [0, 8])
@pytest.mark.parametrize("length", [0, 3, 40])
def test_several_tokens_of_a_row_equal_append_and_decode(length, rotary_dim, window):
    total, dtype, most = length + 40, torch.float64, 4
    lengths = torch.tensor([length], dtype=torch.int32)
    rope = tuple(t.to(dtype) for t in rope_tables(total, rotary_dim)) if rotary_dim else None
    angles = None if rope is None else lambda position: tuple(table[position] for table in rope)
    shape = (2, 1, Hkv, total if window is None else window + most - 1, D)
    k_cache, v_cache = torch.randn(shape, dtype=dtype)
    k_cache[:, :, length:], v_cache[:, :, length:] = float("nan"), float("nan")
    k_expected, v_expected, masks = k_cache.clone(), v_cache.clone(), {}
    ring = RowAttention(k_cache, v_cache, Hq, rotary_dim, lengths, window)
    for T in (4, 1, 2, 3, 1, 1, 4, 4, 2, 1):
        lengths += T
        qkv = torch.randn(T, (Hq + 2 * Hkv) * D, dtype=dtype)
        if T == 1:
            positions = StepPositions(lengths, D, angles, masks=masks)
        else:
            positions = RowPositions(lengths, T, D, angles, masks)
        out = ring(qkv, positions)
        q, k, v = qkv.view(1, T, Hq + 2 * Hkv, D).transpose(1, 2).split([Hq, Hkv, Hkv], dim=1)
        append_to_cache(k, v, k_expected, v_expected, lengths, rope=rope, backend="banded")
        expected = sliding_gqa_decode(q, k_expected, v_expected, lengths, window, rope=rope, backend="banded")
        torch.testing.assert_close(out.view(1, T, Hq, D).transpose(1, 2), expected, atol=1e-12, rtol=1e-12)
