"""`apply_rope(..., norm=)` on every backend: against the definition in fp64, and its gradients by PyTorch."""

import pytest
import torch
from mutants import copy_of_kernels
from torch import library
from torch.nn import functional as F

from kernels import apply_rope, rope_tables
from kernels.backends import banded, reference
from kernels.backends.triton import qk_norm, tile_configs

BACKENDS = ["triton", "banded", "reference"]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = {  # Hq, Hkv, T, D, R
    "whole heads": (4, 2, 21, 16, 16),
    "half of each head": (5, 1, 21, 16, 8),
    "no power of two": (3, 3, 9, 24, 12),
    "more heads than a tile, large ones": (9, 1, 5, 80, 48),
    "one head": (1, 1, 1, 64, 64),
}


@pytest.fixture(autouse=True)
def empty_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def heads(H, T=21, D=16, B=2, dtype=torch.float32, device="cpu"):
    return 3 * torch.randn(B, T, H, D, dtype=dtype, device=device).transpose(1, 2)


def problem(shape, dtype=torch.float32, device="cpu"):
    """q, k, the weights, the gradients of the results, and the tables."""
    Hq, Hkv, T, D, R = SHAPES[shape]
    q, k, gq, gk = (heads(H, T, D, dtype=dtype, device=device) for H in (Hq, Hkv, Hq, Hkv))
    weights = [1 + torch.randn(D, dtype=dtype, device=device) for _ in range(2)]
    return [q, k, *weights], [gq, gk], rope_tables(T + 4, R, theta=100.0, device=device)


def run(inputs, grads, tables, backend, dtype=None, **options):
    """[q, k, dq, dk, dq_weight, dk_weight] of apply_rope with a norm, in `dtype`."""
    dtype = dtype or inputs[0].dtype
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    q, k, *weights = leaves
    tables = [table.to(torch.promote_types(dtype, torch.float32)) for table in tables]
    out = apply_rope(q, k, *tables, norm=(*weights, 1e-3), backend=backend, **options)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, [grad.to(dtype) for grad in grads])]


def written_out(inputs, tables, dtype):
    """The definition in PyTorch's own functions: F.rms_norm, then the rotation of the reference."""
    q, k, *weights = inputs
    T, wide = q.shape[2], torch.promote_types(dtype, torch.float32)
    cos, sin = (table[:T].to(wide) for table in tables)
    normed = (F.rms_norm(x.to(wide), x.shape[-1:], w.to(wide), 1e-3) for x, w in zip((q, k), weights, strict=True))
    return [reference.rotated(x, cos, sin) for x in normed]


def test_the_reference_is_rms_norm_then_rotation_and_its_gradients_are_pytorchs():
    inputs, grads, tables = problem("half of each head", torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    exact = written_out(leaves, tables, torch.float64)
    exact += torch.autograd.grad(exact, leaves, grads)
    for ours, theirs in zip(run(inputs, grads, tables, "reference"), exact, strict=True):
        torch.testing.assert_close(ours, theirs.detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_and_gradients_are_exact_to_their_rounding(backend, shape, interleaved, dtype, device):
    inputs, grads, tables = problem(shape, dtype, device)
    exact = run(inputs, grads, tables, "reference", torch.float64, interleaved=interleaved)
    for ours, right, x in zip(
        run(inputs, grads, tables, backend, interleaved=interleaved), exact, [*inputs[:2], *inputs], strict=True
    ):
        assert ours.dtype == dtype and ours.stride() == torch.empty_like(x).stride()
        rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        assert (ours - right).abs().max() <= 1.01 * rounding * right.abs().max()


@pytest.mark.parametrize("backend", ["triton", "banded"])
@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
def test_a_weight_may_be_none_for_ones(given, backend, device):
    inputs, grads, tables = problem("half of each head", device=device)
    weights = [weight if there else None for weight, there in zip(inputs[2:], given, strict=True)]
    ones = [torch.ones(16, device=device) if weight is None else weight for weight in weights]
    q, k = (x.requires_grad_() for x in inputs[:2])
    leaves = [q, k, *(weight.requires_grad_() for weight in weights if weight is not None)]
    out = apply_rope(q, k, *tables, norm=(*weights, 1e-3), backend=backend)
    right = apply_rope(q, k, *tables, norm=(*ones, 1e-3), backend="reference")
    for ours, theirs in zip(
        (*out, *torch.autograd.grad(out, leaves, grads)),
        (*right, *torch.autograd.grad(right, leaves, grads)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["triton", "banded"])
@pytest.mark.parametrize("kind", ["offset", "by token", "by row and token"])
def test_positions(kind, backend, device):
    inputs, grads, _ = problem("whole heads", device=device)
    tables = rope_tables(64, 16, device=device)
    positions = {
        "offset": 30,
        "by token": torch.randperm(64, device=device)[:21],
        "by row and token": torch.randint(64, (2, 21), device=device, dtype=torch.int32),
    }[kind]
    exact = run(inputs, grads, tables, "reference", positions=positions)
    for ours, right in zip(run(inputs, grads, tables, backend, positions=positions), exact, strict=True):
        torch.testing.assert_close(ours, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "banded"])
def test_gradcheck_in_fp64(backend, device):
    q, k = (heads(2, 3, 6, B=1, dtype=torch.float64, device=device).requires_grad_() for _ in range(2))
    weights = [torch.randn(6, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    cos, sin = (x.double() for x in rope_tables(3, 4, device=device))

    def turn(q, k, *weights):
        return apply_rope(q, k, cos, sin, norm=(*weights, 1e-2), backend=backend)

    assert torch.autograd.gradcheck(turn, (q, k, *weights), fast_mode=True)


@pytest.mark.parametrize("backend", ["triton", "banded"])
def test_a_long_sequence_is_cut_and_the_sums_are_the_same_bits_every_time(backend, device, monkeypatch):
    monkeypatch.setattr(banded.rope, "PIECE", 1 << 12)
    inputs, grads, tables = problem("whole heads", device=device)
    first, second = (run(inputs, grads, tables, backend) for _ in range(2))
    exact = run(inputs, grads, tables, "reference", torch.float64)
    for a, b, right in zip(first, second, exact, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "banded"])
def test_operators_pass_opcheck(backend, device):
    (q, k, q_weight, _), grads, tables = problem("half of each head", device=device)
    for leaf in (q, k, q_weight):
        leaf.requires_grad_()
    arguments = (q, k, q_weight, None, 1e-3, *tables, None, 3, False, backend)
    library.opcheck(torch.ops.sliding_gqa.norm_rotate, [x.detach() if torch.is_tensor(x) else x for x in arguments])
    arguments = [x.detach() if torch.is_tensor(x) else x for x in (*grads, *arguments)]
    library.opcheck(torch.ops.sliding_gqa.norm_rotate_backward, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_graph_with_gradients(backend, device):
    torch._dynamo.reset()
    inputs, grads, tables = problem("half of each head", device=device)
    leaves = [x.requires_grad_() for x in inputs]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def turn(q, k, q_weight, k_weight):
        return apply_rope(q * 1.0, k, *tables, norm=(q_weight, k_weight, 1e-3), backend=backend)

    out = turn(*leaves)
    ours = *out, *torch.autograd.grad(out, leaves, grads)
    for a, b in zip(ours, run(inputs, grads, tables, "reference"), strict=True):
        torch.testing.assert_close(a.detach(), b, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["triton", "banded"])
def test_autocast_changes_nothing(backend, device):
    inputs, grads, tables = problem("whole heads", device=device)
    plain = run(inputs, grads, tables, backend)
    with torch.autocast(device.type, torch.bfloat16):
        for a, b in zip(run(inputs, grads, tables, backend), plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "banded"])
@pytest.mark.parametrize("B, T, Hkv", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_nothing_to_do(B, T, Hkv, backend, device):
    """The weights' gradients are zeros then, and k may have no heads, as where q is rotated alone."""
    q, k = heads(4, T, B=B, device=device), heads(Hkv, T, B=B, device=device)
    weights = [torch.ones(16, device=device, requires_grad=True) for _ in range(2)]
    out = apply_rope(q, k, *rope_tables(4, 8, device=device), norm=(*weights, 1e-6), backend=backend)
    assert [x.shape for x in out] == [q.shape, k.shape]
    grads = torch.autograd.grad(out, weights, [torch.ones_like(x) for x in out])
    assert (grads[0].abs().max() > 0) == (B * T > 0) and (grads[1].abs().max() > 0) == (B * T * Hkv > 0)


def test_a_transposed_gradient_is_taken(device):
    """A product that reads k^T sends back a gradient whose last stride is not 1."""
    inputs, grads, tables = problem("whole heads", device=device)
    transposed = [grad.mT.contiguous().mT for grad in grads]
    for a, b in zip(run(inputs, grads, tables, "triton"), run(inputs, transposed, tables, "triton"), strict=True):
        assert torch.equal(a, b)


WEIGHT = torch.ones(16)
WRONG = [
    (1e-6, "norm is a float, expected None or \\(q_weight, k_weight, eps\\)"),
    ((WEIGHT, 1e-6), "norm is 2 values, expected None or"),
    ((WEIGHT, 2.0, 1e-6), "norm's k_weight is .*, expected None or a tensor \\(16,\\)"),
    (
        (torch.ones(8), None, 1e-6),
        "norm's q_weight is torch.float32 \\(8,\\), expected one float for each .* 16 elements",
    ),
    ((WEIGHT.long(), None, 1e-6), "norm's q_weight is torch.int64 \\(16,\\), expected one float"),
    ((None, WEIGHT.to("meta"), 1e-6), "norm's k_weight is on meta, q is on cpu: move it"),
    ((None, None, 0), "norm's eps is 0.0, expected a positive number"),
    ((None, None, "small"), "norm's eps is 'small', expected a positive number"),
]


@pytest.mark.parametrize("norm, message", WRONG)
def test_what_a_norm_cannot_be_is_said_in_a_line(norm, message):
    with pytest.raises(ValueError, match=message) as caught:
        apply_rope(heads(2), heads(1), *rope_tables(21, 16), norm=norm)
    assert "\n" not in str(caught.value)


def test_a_threads_share_of_a_tile_is_small():
    """Of 16 pairs forward and 8 backward, of each tensor."""
    for head_dim in (2, 16, 64, 72, 80, 128, 256):
        padded = max(8, 1 << (head_dim // 2 - 1).bit_length())
        for backward, pairs in ((False, 16), (True, 8)):
            tile = tile_configs.norm_tile(head_dim, backward)
            assert tile.BLOCK_T * tile.BLOCK_H * padded <= pairs * 32 * tile.num_warps


# Deliberate faults in copies of the kernels, each of which must be noticed

MUTATIONS = {
    "eps ten times as large": ("n = _scaled(x, tl.rsqrt(_mean_product(x, x, HEAD_DIM, HALF) + eps))",
                     "n = _scaled(x, tl.rsqrt(_mean_product(x, x, HEAD_DIM, HALF) + 10 * eps))"),
    "the mean is over the rotated part": ("return total / HEAD_DIM", "return total / (2 * HALF)"),
    "what is not rotated left out of the mean": ("total += tl.sum(a[2] * b[2], 2, keep_dims=True)", "pass"),
    "the gradient is not rotated back": ("INTERLEAVED), cos, -sin)", "INTERLEAVED), cos, sin)"),
    "no projection in dx": ("mean = _mean_product(g, n, HEAD_DIM, HALF)", "mean = 0.0"),
    "sums of two programs in one row": ("block * q_chunks + chunk, token", "block * q_chunks, token"),
    "all sums of k in one row": ("block * tl.cdiv(num_k_heads, BLOCK_H) + k_chunk", "k_chunk"),
    "q's weight for k": ("k_ptr, k_out_ptr, k_weight_ptr", "k_ptr, k_out_ptr, q_weight_ptr"),
    "NaN of tokens past the end in the sums": ("cos = tl.where(in_seq[None, :, None], cos, 0.0)", "pass"),
}  # fmt: skip


def error(module, device):
    """The largest difference from the specification, in tolerances; infinite for NaN."""
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    torch.manual_seed(0)
    around = torch.randn(40, 3, 30, 24, dtype=dtype, device=device)  # a fault may read beside q and k
    q, k = around[:6].transpose(0, 1)[:2, :5, 4:25], around[20:22].transpose(0, 1)[:2, :, 4:25]
    grads = [torch.randn(2, 21, x.shape[1], 24, dtype=dtype, device=device).transpose(1, 2) for x in (q, k)]
    weights = [torch.randn(24, dtype=dtype, device=device) for _ in range(2)]
    tables = [table.to(dtype) for table in rope_tables(21, 16, theta=100.0, device=device)]
    results = []
    for backend in (module, reference):
        norm = (*weights, 0.1)
        results.append(
            [*backend.norm_rotate(q, k, norm, *tables), *backend.norm_rotate_backward(*grads, q, k, norm, *tables)]
        )
    worst = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True)]).max().item()
    tolerance = 1e-5 if device.type == "cuda" else 1e-7  # eps is an fp32 number in the kernels
    return worst / tolerance if worst == worst else float("inf")


def test_the_check_passes_on_the_kernels(device):
    assert error(qk_norm, device) <= 1


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation, tmp_path, device):
    """By numbers far off, not by an exception."""
    (module,) = copy_of_kernels(tmp_path, ["qk_norm"], ("qk_norm.py", *MUTATIONS[mutation]))
    assert error(module, device) > 100
