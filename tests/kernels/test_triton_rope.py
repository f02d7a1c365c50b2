"""The rotation kernel and its operator, against the reference: on a GPU as they are, elsewhere interpreted."""

import pytest
import torch
from torch import library

from kernels import apply_rope, rope_tables
from kernels.backends import reference
from kernels.backends.triton import rope as rope_kernel
from kernels.backends.triton import tile_configs

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def empty_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def heads(H, T=21, D=16, B=2, dtype=torch.float32, device="cpu"):
    return torch.randn(B, T, H, D, dtype=dtype, device=device).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "Hq, Hkv, D, R", [(4, 2, 16, 16), (5, 1, 16, 8), (3, 3, 24, 12), (9, 1, 48, 48), (1, 1, 80, 40), (2, 1, 256, 256)]
)
def test_rotation_is_the_references_rounded_once(Hq, Hkv, D, R, interleaved, dtype, device):
    """More heads than a tile holds, fewer tokens, halves that are no power of two, heads rotated in part."""
    q, k = heads(Hq, 9, D, dtype=dtype, device=device), heads(Hkv, 9, D, dtype=dtype, device=device)
    cos, sin = rope_tables(12, R, device=device)
    for ours, x in zip(apply_rope(q, k, cos, sin, interleaved=interleaved, backend="triton"), (q, k), strict=True):
        exact = reference.rotated(x.double(), cos[:9].double(), sin[:9].double(), interleaved)
        assert ours.dtype == dtype and ours.stride() == x.stride()
        assert (ours - exact).abs().max() <= 1.01 * torch.finfo(dtype).eps * exact.abs().max()


def test_a_threads_share_of_a_tile_is_small():
    """Of 16 pairs, of which first, second, cos and sin are held: 64 registers."""
    for rotary_dim in (2, 16, 48, 64, 80, 128, 256, 512, 1024):
        tile = tile_configs.rotary_tile(rotary_dim)
        padded = 1 << (rotary_dim // 2 - 1).bit_length()
        assert tile.BLOCK_T * tile.BLOCK_H * padded <= 16 * 32 * tile.num_warps
    assert tile_configs.rotary_tile(2048).BLOCK_T == 1


@pytest.mark.parametrize("kind", ["offset", "by token", "by row and token", "int32"])
def test_positions(kind, device):
    q, k = heads(4, device=device), heads(2, device=device)
    cos, sin = rope_tables(64, 16, device=device)
    positions = {
        "offset": 30,
        "by token": torch.randperm(64, device=device)[:21],
        "by row and token": torch.randint(64, (2, 21), device=device),
        "int32": torch.randint(64, (2, 21), device=device, dtype=torch.int32),
    }[kind]
    ours = apply_rope(q, k, cos, sin, positions=positions, backend="triton")
    for a, b in zip(ours, apply_rope(q, k, cos, sin, positions=positions, backend="reference"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_is_the_inverse_rotation(interleaved, device):
    """Turning forth and back is the identity, and the gradient is the incoming one turned back."""
    q, k = heads(4, device=device).requires_grad_(), heads(2, device=device).requires_grad_()
    cos, sin = rope_tables(21, 8, device=device)
    turned = apply_rope(q, k, cos, sin, interleaved=interleaved, backend="triton")
    for grad, x in zip(
        torch.autograd.grad(turned, (q, k), [x.detach() for x in turned], retain_graph=True), (q, k), strict=True
    ):
        torch.testing.assert_close(grad, x.detach())
    expanded = torch.autograd.grad(turned[0].sum() + turned[1].sum(), (q, k))
    exact = apply_rope(q, k, cos, sin, interleaved=interleaved, backend="reference")
    for a, b in zip(expanded, torch.autograd.grad(exact[0].sum() + exact[1].sum(), (q, k)), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck_in_fp64(device):
    q, k = (heads(2, 3, 4, B=1, dtype=torch.float64, device=device).requires_grad_() for _ in range(2))
    cos, sin = (x.double() for x in rope_tables(3, 4, device=device))
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, cos, sin, backend="triton"), (q, k), fast_mode=True)


@pytest.mark.parametrize("positions", [None, torch.arange(21)])
def test_operator_passes_opcheck(positions, device):
    cos, sin = rope_tables(30, 8, device=device)
    positions = None if positions is None else positions.to(device)
    arguments = (heads(4, device=device), heads(2, device=device), cos, sin, positions, 3, False, False, "triton")
    library.opcheck(torch.ops.sliding_gqa.rotate, arguments)


def test_a_full_graph_serves_every_length_and_offset(device):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    cos, sin = rope_tables(64, 16, device=device)

    @torch.compile(fullgraph=True, backend=count)
    def turn(q, k, offset):
        return apply_rope(q * 1.0, k, cos, sin, positions=offset, backend="triton")

    for T, offset in ((5, 3), (6, 4), (9, 11), (12, 50), (21, 40)):
        q, k = heads(4, T, device=device), heads(2, T, device=device)
        for a, b in zip(turn(q, k, offset), apply_rope(q, k, cos, sin, positions=offset), strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) <= 2


@pytest.mark.parametrize("B, T", [(0, 3), (2, 0)])
def test_nothing_to_do(B, T, device):
    cos, sin = rope_tables(4, 8, device=device)
    q, k = apply_rope(heads(4, T, B=B, device=device), heads(2, T, B=B, device=device), cos, sin, backend="triton")
    assert q.shape == (B, 4, T, 16) and k.shape == (B, 2, T, 16)


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_that_the_tables_lack_give_nan_and_are_not_read(interleaved, device):
    q, k = heads(4, 3, device=device), heads(2, 3, device=device)
    behind = [torch.cat([table, torch.full_like(table, 7.0)]) for table in rope_tables(10, 16, device=device)]
    cos, sin = (table[:10] for table in behind)
    positions = torch.tensor([[9, 10, 0], [-1, 3, 2**40]], device=device)
    lacking = ((positions < 0) | (positions >= 10))[:, None, :, None]
    near = positions.clamp(0, 9)
    turned = rope_kernel.rotate(q, k, cos, sin, positions=positions, interleaved=interleaved)
    for ours, exact in zip(
        turned, rope_kernel.rotate(q, k, cos, sin, positions=near, interleaved=interleaved), strict=True
    ):
        assert torch.equal(ours.isnan(), lacking.expand_as(ours))
        torch.testing.assert_close(ours.nan_to_num(nan=0.0), exact.masked_fill(lacking, 0.0))


@pytest.mark.parametrize("backend", ["triton", "banded"])
def test_a_transposed_gradient_is_taken(backend, device):
    """A product that reads k^T sends back a gradient whose last stride is not 1."""
    cos, sin = rope_tables(9, 16, device=device)
    x = torch.randn(2, 2, 9, 16, device=device, requires_grad=True)
    weight = torch.randn(2, 2, 9, 16, device=device)
    transposed = weight.mT.contiguous().mT
    grads = []
    for grad in (weight, transposed):
        _, k = apply_rope(x, x, cos, sin, backend=backend)
        grads.append(torch.autograd.grad(k, x, grad)[0])
    assert torch.equal(*grads)
