"""The attention operators as PyTorch's own machinery sees them: opcheck, compile, autocast, checkpointing, FLOPs."""

import shutil

import pytest
import torch
from torch import library
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from kernels import document_starts, rope_tables, sliding_gqa_attention
from kernels.backends import reference
from kernels.backends.banded.keeping import stacks_of
from kernels.band import visible_mask, visible_pairs

BACKENDS = ["banded", "triton"]


def inputs(T=20, S=20, dtype=torch.float32, device="cpu", Hq=4, Hkv=2, D=16):
    q, k, v = (
        torch.randn(2, length, heads, D, dtype=dtype, device=device).transpose(1, 2).requires_grad_()
        for length, heads in ((T, Hq), (S, Hkv), (S, Hkv))
    )
    return q, k, v


def documents(S, device):
    """starts of two rows: three documents, and one behind padding."""
    first = document_starts(document_ids=torch.arange(S, device=device) // 6)
    return torch.cat([first, document_starts(attention_mask=torch.arange(S, device=device)[None] > 4)])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("everything", [False, True])
def test_operators_pass_opcheck(backend, everything, device):
    """With permuted and sliced inputs: only those tell a fake of other strides from a right one."""
    q, k, v = (x.detach() for x in inputs(12, 15, device=device))
    sinks = torch.randn(4, device=device) if everything else None
    cos, sin = rope_tables(15, 8, device=device) if everything else (None, None)
    shared = (None, sinks, cos, sin, 6, 0, 0.25, 5.0 if everything else None, backend)
    forward, backward = torch.ops.sliding_gqa.attention_forward, torch.ops.sliding_gqa.attention_backward
    if backend == "banded" and not everything:
        library.opcheck(forward, (q, k, v, *shared, False))
    library.opcheck(forward, (q, k, v, *shared, True))
    results = forward(q, k, v, *shared, True)
    library.opcheck(backward, (*grads_of(results, everything), q, k, v, *results, *shared))


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("T, S", [(12, 15), (12, 12), (80, 80)])
def test_operators_that_keep_probabilities_pass_opcheck(T, S, with_documents, with_lse, device):
    q, k, v = (x.detach() for x in inputs(T, S, device=device))
    starts = documents(S, device) if with_documents else None
    shared = (starts, *rope_tables(S, 8, device=device), 6, 0, 0.25)
    stacks = stacks_of(q, k, starts, 6, 0, 2)
    forward, backward = torch.ops.sliding_gqa.banded_forward, torch.ops.sliding_gqa.banded_backward
    library.opcheck(forward, (q, k, v, *shared, with_lse, 2, stacks))
    *results, kept = forward(q, k, v, *shared, with_lse, 2, stacks)
    assert kept
    library.opcheck(backward, (*grads_of(results, with_lse), q, k, v, *results, kept, *shared, 2))


@pytest.mark.parametrize("backend", ["banded", "reference"])
@pytest.mark.parametrize("everything", [False, True])
def test_operators_with_documents_pass_opcheck(backend, everything, device):
    q, k, v = (x.detach() for x in inputs(12, 15, device=device))
    sinks = torch.randn(4, device=device) if everything else None
    shared = (documents(15, device), sinks, *rope_tables(15, 8, device=device), 6, 0, 0.25, None, backend)
    forward, backward = torch.ops.sliding_gqa.attention_forward, torch.ops.sliding_gqa.attention_backward
    library.opcheck(forward, (q, k, v, *shared, True))
    results = forward(q, k, v, *shared, True)
    library.opcheck(backward, (*grads_of(results, everything), q, k, v, *results, *shared))


def grads_of(results, with_lse):
    grad_out, grad_lse = (torch.randn_like(x) for x in results)
    return grad_out.transpose(1, 3).contiguous().transpose(1, 3), grad_lse if with_lse else None


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_cut_from_one_projection_need_no_copy(backend, device):
    """q, k, v as slices of (B, T, (Hq + 2 Hkv) * D) are taken as they are; the result is a dense (B, T, Hq, D)."""
    fused = torch.randn(2, 20, 8 * 16, device=device, requires_grad=True)
    q, k, v = (x.unflatten(-1, (-1, 16)).transpose(1, 2) for x in fused.split([64, 32, 32], dim=-1))
    assert not q.is_contiguous() and not q.transpose(1, 2).is_contiguous()
    out = sliding_gqa_attention(q, k, v, 5, backend=backend)
    assert out.transpose(1, 2).is_contiguous()
    expected, _ = reference.attention(q, k, v, 5, scale=0.25)
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.square().sum(), fused)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), fused)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_graph_serves_every_length(backend, device):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    cos, sin = rope_tables(64, 16, device=device)

    @torch.compile(fullgraph=True, backend=count)
    def attend(q, k, v):
        return sliding_gqa_attention(q * 1.0, k, v, 7, rope=(cos, sin), backend=backend)

    for T in (20, 21, 33, 40, 64):
        q, k, v = inputs(T, T, device=device)
        out = attend(q, k, v)
        expected, _ = reference.attention(q, k, v, 7, scale=0.25, rope=(cos, sin))
        torch.testing.assert_close(out, expected)
        for ours, theirs in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert len(graphs) <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_graph_without_gradients(backend, device):
    torch._dynamo.reset()
    q, k, v = (x.detach() for x in inputs(device=device))
    attend = torch.compile(sliding_gqa_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(attend(q, k, v, 7, backend=backend), reference.attention(q, k, v, 7, scale=0.25)[0])


@pytest.mark.skipif(not (torch.cuda.is_available() or shutil.which("c++")), reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_step(device):
    """The default compiler, with gradients, on the default backend."""
    q, k, v = inputs(device=device)
    out = torch.compile(lambda q, k, v: sliding_gqa_attention(q, k, v, 7) + 1, fullgraph=True)(q, k, v)
    torch.testing.assert_close(out, sliding_gqa_attention(q, k, v, 7) + 1)
    out.sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_in_its_dtype(backend, device):
    q, k, v = inputs(device=device)
    dtype = torch.float16 if backend == "triton" and device.type == "cpu" else torch.bfloat16
    with torch.autocast(device.type, dtype=dtype):
        out = sliding_gqa_attention(q, k.to(dtype), v, 7, backend=backend)
    assert out.dtype == dtype
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), reference.attention(q, k, v, 7, scale=0.25)[0], atol=0.03, rtol=0.03)


@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_checkpointing_keeps_attention_and_recomputes_the_rest(backend, device):
    q, k, v = inputs(device=device)
    calls = []

    def policy(ctx, op, *args, **kwargs):
        if op in (torch.ops.sliding_gqa.attention_forward.default, torch.ops.sliding_gqa.banded_forward.default):
            calls.append(ctx.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q, k, v):
        return sliding_gqa_attention(q.sin(), k, v, 7, backend=backend).cos()

    out = checkpoint(
        layer, q, k, v, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    kept = torch.autograd.grad(out.sum(), (q, k, v))
    plain = torch.autograd.grad(layer(q, k, v).sum(), (q, k, v))
    for a, b in zip(kept, plain, strict=True):
        assert torch.equal(a, b)
    assert calls and calls[0] is False


@pytest.mark.parametrize(
    "T, S, window", [(20, 20, 7), (20, 20, None), (5, 20, 7), (20, 20, 50), (18, 20, 7), (1, 1, 1)]
)
def test_flops_count_visible_pairs_only(T, S, window, device):
    q, k, v = inputs(T, S, device=device)
    pairs = int(visible_mask(T, S, window).sum())
    assert visible_pairs(T, S, window) == pairs
    with FlopCounterMode(display=False) as counter:
        out = sliding_gqa_attention(q, k, v, window, backend="banded")
    assert counter.get_total_flops() == 4 * 16 * 2 * 4 * pairs
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * 16 * 2 * 4 * pairs


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_bit_for_bit(backend, device):
    q, k, v = inputs(50, 50, device=device)
    runs = []
    for _ in range(2):
        out = sliding_gqa_attention(q, k, v, 9, backend=backend)
        runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_expanded_gradient_is_taken(device):
    """sum() sends back a gradient of strides 0."""
    q, k, v = inputs(device=device)
    sliding_gqa_attention(q, k, v, 7).sum().backward()
    dense = sliding_gqa_attention(q, k, v, 7)
    grads = torch.autograd.grad(dense, (q, k, v), torch.ones_like(dense))
    for x, grad in zip((q, k, v), grads, strict=True):
        torch.testing.assert_close(x.grad, grad)


BAD_CALLS = {
    "dtypes that differ": ({"k": torch.randn(2, 2, 6, 8).double()}, "k has dtype torch.float64, expected q's"),
    "whole numbers": ({"q": torch.ones(2, 4, 6, 8).long()}, "q has dtype torch.int64, expected a floating one"),
    "last stride": ({"v": torch.randn(2, 2, 8, 6).mT}, "v has last stride 6, expected 1: call .contiguous"),
    "head sizes": ({"k": torch.randn(2, 2, 6, 4), "v": torch.randn(2, 2, 6, 4)}, "k has head size 4, expected q's 8"),
    "lengths of k and v": ({"v": torch.randn(2, 2, 5, 8)}, "v has shape \\(2, 2, 5, 8\\), expected k's"),
    "batch sizes": ({"q": torch.randn(3, 4, 6, 8)}, "k has batch size 2, expected q's 3"),
    "groups": ({"q": torch.randn(2, 3, 6, 8)}, "k has 2 heads, which do not divide q's 3"),
    "dimensions": ({"q": torch.randn(4, 6, 8)}, "q has shape \\(4, 6, 8\\), expected 4 dimensions"),
    "T > S": ({"q": torch.randn(2, 4, 7, 8)}, "q has 7 positions, more than k's 6"),
    "window below 1": ({"window": 0}, "window is 0, expected None or at least 1.*flash-attn's \\(W - 1, 0\\)"),
    "flash-attn's window": (
        {"window": (3, 0, 1)},
        "window has 3 numbers, expected one, or the two of \\(left, right\\)",
    ),
    "sinks": ({"sinks": torch.zeros(2)}, "sinks is torch.float32 \\(2,\\), expected one float for each of q's 4 heads"),
    "short tables": ({"rope": rope_tables(5, 8)}, "rope tables hold 5 positions, which is fewer than the 6"),
    "wide tables": ({"rope": rope_tables(6, 16)}, "rope tables rotate 16 elements, more than the head size 8"),
    "scale": ({"scale": 0.0}, "scale is 0.0, expected a positive"),
    "softcap": ({"softcap": -1.0}, "softcap is -1.0, expected None or a positive"),
    "backend": ({"backend": "flash"}, "backend is 'flash', expected one of 'auto', 'triton', 'banded', 'reference'"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_named_in_one_line(case):
    changed, message = BAD_CALLS[case]
    good = {"q": torch.randn(2, 4, 6, 8), "k": torch.randn(2, 2, 6, 8), "v": torch.randn(2, 2, 6, 8), "window": 3}
    sliding_gqa_attention(**good)
    with pytest.raises(ValueError, match=message) as error:
        sliding_gqa_attention(**{**good, **changed})
    assert "\n" not in str(error.value)


def test_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = inputs(device="cpu")
    with pytest.raises(ValueError, match="backend 'triton' cannot run on cpu: Triton has no cpu backend"):
        sliding_gqa_attention(q, k, v, 3, backend="triton")
