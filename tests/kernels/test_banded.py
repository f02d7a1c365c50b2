"""The banded backend against the specification, in fp64 to the last digits, and its cost against the length."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import apply_rope, rope_tables, sliding_gqa_attention
from kernels.backends import reference
from kernels.backends.banded import keeping as banded_keeping
from kernels.backends.banded import plan as banded_plan
from kernels.backends.banded import rope as banded_rope
from kernels.band import visible_mask

B, D = 2, 16
SHAPES = {  # T, S, Hq, Hkv, window
    "one token": (1, 1, 2, 1, 3),
    "window 1": (9, 9, 2, 2, 1),
    "a block of 16": (16, 16, 4, 2, 16),
    "off the block by one": (17, 17, 4, 2, 16),
    "off the block below": (15, 15, 4, 2, 15),
    "window of S - 1": (33, 33, 2, 1, 32),
    "window beyond S": (20, 20, 3, 1, 50),
    "no window": (300, 300, 2, 1, None),
    "many blocks, group 3": (100, 100, 6, 2, 7),
    "group 7": (50, 50, 7, 1, 20),
    "last queries only": (5, 100, 4, 2, 24),
    "last queries, keys cut at the front": (40, 100, 4, 2, 24),
    "last queries, padded at the front": (90, 100, 4, 2, 24),
    "last queries, no window": (5, 100, 4, 2, None),
    "one query of many keys": (1, 70, 4, 1, 8),
}
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "rope": {"rope": D},
    "partial rope": {"rope": D // 2},
    "everything": {"scale": 0.7, "softcap": 2.0, "sinks": True, "rope": D // 2},
}


def inputs(shape, options, dtype=torch.float64):
    T, S, Hq, Hkv, window = shape
    q = torch.randn(B, T, Hq, D, dtype=dtype).transpose(1, 2).requires_grad_()
    k = torch.randn(B, S, Hkv, D, dtype=dtype).transpose(1, 2).requires_grad_()
    v = torch.randn(B, S, Hkv, D, dtype=dtype).transpose(1, 2).requires_grad_()
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.randn(Hq, dtype=dtype, requires_grad=True)
    if options.get("rope"):
        options["rope"] = rope_tables(S + 3, options["rope"])
    return (q, k, v, window), options


CUTS = {  # threads and scores per thread: they decide how the work is cut into steps
    "all blocks at once": (1, 2**20),
    "some sequences": (3, 2**15),
    "some heads": (3, 2**14),
    "blocks of one head": (3, 2**11),
    "one block": (1, 1),
}


def cut(monkeypatch, threads, scores):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(banded_plan, "STEP_SCORES_PER_THREAD", scores)
    banded_plan.plan.cache_clear()


def steps_of(case, threads):
    T, S, Hq, Hkv, window = SHAPES[case]
    window = window if window and window < S else None
    return banded_plan.plan(B, Hkv, Hq // Hkv, T, S, window, D, threads)


@pytest.mark.parametrize("case", SHAPES)
def test_every_row_is_in_exactly_one_step_with_every_key_it_sees(case, monkeypatch):
    T, S, Hq, Hkv, window = SHAPES[case]
    for threads, scores in CUTS.values():
        cut(monkeypatch, threads, scores)
        counts = torch.zeros(B, Hq, T, 1)
        for step in steps_of(case, threads):
            region = step.region
            step.rows(counts, Hq // Hkv).add_(1)
            for block in range(step.first, step.first + step.blocks):
                row, first = region.first_row + block * region.rows, region.first_key + block * region.rows
                newest = S - T + row + region.rows - 1
                assert first + region.keys - 1 == newest
                assert 0 <= first <= (0 if window is None else max(0, S - T + row - window + 1))
        assert (counts == 1).all()


def test_the_cuts_are_all_taken(monkeypatch):
    """The cases here are only worth something if each of these ways to cut comes up in them."""
    taken = {}
    for name, (threads, scores) in CUTS.items():
        cut(monkeypatch, threads, scores)
        step = banded_plan.plan(B, 2, 3, 400, 400, 7, D, threads)[-1]
        taken[name] = *step.pairs, step.blocks < step.region.blocks, step.blocks
    assert taken["all blocks at once"][:3] == (2, 2, False)
    assert taken["some sequences"][:3] == (1, 2, False)
    assert taken["some heads"][:3] == (1, 1, False)
    assert taken["blocks of one head"] == (1, 1, True, 6)  # as many for each of three threads
    assert taken["one block"] == (1, 1, True, 1)


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize(
    "option, how, keep",
    [
        *((option, "all blocks at once", True) for option in OPTIONS),
        *((option, "all blocks at once", False) for option in ("plain", "partial rope")),
        *((option, how, True) for option in ("partial rope", "everything") for how in CUTS),
    ],
)
def test_banded_equals_reference(case, option, how, keep, monkeypatch):
    cut(monkeypatch, *CUTS[how])
    if not keep:
        monkeypatch.setattr(banded_keeping, "KEPT_KEYS", 0)
    arguments, options = inputs(SHAPES[case], OPTIONS[option])
    leaves = [*arguments[:3], *([options["sinks"]] if "sinks" in options else [])]
    results = []
    for backend in ("banded", "reference"):
        out, lse = sliding_gqa_attention(*arguments, **options, return_lse=True, backend=backend)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        grads = torch.autograd.grad((out * weights).sum() + (lse * lse).sum(), leaves)
        results.append([out, lse, *grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("head_dim", [D, 15])
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("option", ["plain", "partial rope"])
def test_gradients_without_lse_equal_those_of_the_reference(case, option, head_dim):
    """Short sequences are PyTorch's own kernel then; and heads of an odd size are rotated in another way."""
    (q, k, v, window), options = inputs(SHAPES[case], OPTIONS[option])
    q, k, v = (x.detach()[..., :head_dim].requires_grad_() for x in (q, k, v))
    grads = []
    for backend in ("banded", "reference"):
        out = sliding_gqa_attention(q, k, v, window, **options, backend=backend)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        grads.append([out, *torch.autograd.grad((out * weights).sum(), (q, k, v))])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-9)


def test_kept_probabilities_serve_a_second_backward_pass(monkeypatch):
    cut(monkeypatch, 1, 2**11)
    arguments, options = inputs(SHAPES["many blocks, group 3"], OPTIONS["partial rope"])
    out = sliding_gqa_attention(*arguments, **options, backend="banded")
    first = torch.autograd.grad(out.square().sum(), arguments[:3], retain_graph=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # which would cut the work otherwise
    for again, grad in zip(torch.autograd.grad(out.square().sum(), arguments[:3]), first, strict=True):
        torch.testing.assert_close(again, grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_those_of_finite_differences(window):
    (q, k, v, _), options = inputs((4, 6, 2, 1, window), OPTIONS["everything"])
    options["rope"] = tuple(t.double() for t in options["rope"])
    sinks = options.pop("sinks")
    f = lambda q, k, v, s: sliding_gqa_attention(q, k, v, window, **options, sinks=s, return_lse=True, backend="banded")  # noqa: E731
    assert torch.autograd.gradcheck(f, (q, k, v, sinks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_within_its_error_budget(dtype):
    """At most twice the error of the same mathematics in the same dtype, plus one rounding."""
    (q, k, v, window), _ = inputs((100, 100, 4, 2, 24), {}, dtype)
    exact, _ = reference.attention(q.double(), k.double(), v.double(), window, scale=D**-0.5)
    seen = visible_mask(100, 100, window)
    p = (q @ k.repeat_interleave(2, 1).mT * D**-0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    naive = p @ v.repeat_interleave(2, 1)
    ours = sliding_gqa_attention(q, k, v, window, backend="banded")
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * ((naive - exact).abs().max() + rounding)


@pytest.mark.parametrize("backend", ["banded", "reference"])
@pytest.mark.parametrize("window", [None, 8])
def test_future_and_forgotten_keys_get_zero_gradient(backend, window):
    (q, k, v, _), _ = inputs((40, 40, 4, 2, window), {})
    out = sliding_gqa_attention(q, k, v, window, backend=backend)
    for grad in torch.autograd.grad(out[:, :, 20].square().sum(), (k, v)):
        oldest = 0 if window is None else 20 - window + 1
        assert not grad[:, :, :oldest].any() and not grad[:, :, 21:].any()
        assert grad[:, :, oldest:21].abs().amin(dim=(0, 1, 3)).min() > 0


@pytest.mark.parametrize("backend", ["banded", "reference"])
def test_output_has_the_layout_of_q(backend):
    (q, k, v, window), _ = inputs((40, 40, 4, 2, 8), {})
    out = sliding_gqa_attention(q, k, v, window, backend=backend)
    assert out.stride() == q.stride()
    flat = sliding_gqa_attention(*(x.contiguous() for x in (q, k, v)), window, backend=backend)
    assert flat.is_contiguous()
    torch.testing.assert_close(out, flat)


@pytest.mark.parametrize("backend", ["banded", "reference"])
@pytest.mark.parametrize("B, T, S", [(0, 4, 4), (2, 0, 0), (2, 0, 5)])
@pytest.mark.parametrize("window", [None, 2])
def test_empty_inputs_give_empty_outputs(backend, B, T, S, window):
    q, k = torch.randn(B, 4, T, 8), torch.randn(B, 2, S, 8)
    out, lse = sliding_gqa_attention(q, k, k, window, return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == (B, 4, T)


class LargestTensor(TorchDispatchMode):
    """The number of elements in the largest storage that an operation gave."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_memory_is_linear_in_the_length():
    sizes = []
    for T in (512, 1024, 2048):
        (q, k, v, window), _ = inputs((T, T, 4, 2, 32), {}, torch.float32)
        with LargestTensor() as largest:
            sliding_gqa_attention(q, k, v, window, backend="banded").sum().backward()
        sizes.append(largest.numel)
    assert sizes[2] <= 2.05 * sizes[1] <= 4.2 * sizes[0]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 6])
@pytest.mark.parametrize("positions", [None, 5, torch.tensor([3, 1, 4, 1]), torch.tensor([[0, 1, 2, 3], [9, 8, 7, 6]])])
def test_apply_rope_equals_reference(interleaved, rotary_dim, positions):
    q, k = torch.randn(2, 3, 4, 16, requires_grad=True), torch.randn(2, 1, 4, 16, requires_grad=True)
    cos, sin = rope_tables(10, rotary_dim)
    results = []
    for backend in ("banded", "reference"):
        rotated = apply_rope(q, k, cos, sin, positions=positions, interleaved=interleaved, backend=backend)
        grads = torch.autograd.grad((rotated[0] ** 3).sum() + (rotated[1] ** 3).sum(), (q, k))
        results.append([*rotated, *grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_each_pair_turns_by_the_angle_of_its_position(interleaved):
    q = torch.randn(1, 1, 3, 8, dtype=torch.float64)
    cos, sin = (t.double() for t in rope_tables(3, 4))
    out, _ = apply_rope(q, q, cos, sin, interleaved=interleaved, backend="banded")
    a, b = ((0, 2), (1, 3)) if interleaved else ((0, 1), (2, 3))
    turned = torch.complex(q[..., a], q[..., b]) * torch.complex(cos, sin)
    torch.testing.assert_close(torch.complex(out[..., a], out[..., b]), turned)
    torch.testing.assert_close(out[..., 4:], q[..., 4:])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation_in_pieces_is_exact_and_keeps_the_layout(dtype, interleaved, monkeypatch):
    """Pieces of 3 positions, heads rotated in part, rounded once: forward and backward."""
    monkeypatch.setattr(banded_rope, "PIECE", 3 * 2 * 4 * 16 * 4 // torch.get_num_threads())
    q, k = (torch.randn(2, 20, heads, 16, dtype=dtype).transpose(1, 2).requires_grad_() for heads in (3, 1))
    cos, sin = rope_tables(25, 12)
    tables = cos[5:].double(), sin[5:].double()
    ours = apply_rope(q, k, cos, sin, positions=5, interleaved=interleaved, backend="banded")
    sent = [torch.randn_like(x) for x in ours]
    for x, out, grad, back in zip((q, k), ours, torch.autograd.grad(ours, (q, k), sent), sent, strict=True):
        exact = reference.rotated(x.double(), *tables, interleaved)
        exact_grad = reference.rotated(back.double(), tables[0], -tables[1], interleaved)
        assert out.dtype == dtype and out.stride() == x.stride()
        for got, right in ((out, exact), (grad, exact_grad)):
            assert (got - right).abs().max() <= 1.01 * torch.finfo(dtype).eps * right.abs().max()


def test_rotation_is_seen_by_all_that_differentiates():
    """Twice, forward, under torch.func; and by torch.compile as its products."""
    q, k = torch.randn(1, 2, 4, 8, dtype=torch.float64), torch.randn(1, 1, 4, 8, dtype=torch.float64)
    cos, sin = (table.double() for table in rope_tables(4, 8))

    def rotate(q, k):
        return apply_rope(q, k, cos, sin, backend="banded")

    tracked = [x.clone().requires_grad_() for x in (q, k)]
    assert torch.autograd.gradcheck(rotate, tracked, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(rotate, tracked)
    torch.testing.assert_close(torch.func.vmap(rotate)(q[None], k[None])[0][0], rotate(q, k)[0])
    graphs = []
    torch.compile(rotate, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(q, k)
    assert len(graphs) == 1 and not any("addcmul" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("shape", [(0, 2, 4, 8), (2, 2, 0, 8)])
def test_nothing_can_be_rotated(shape):
    q = torch.randn(shape)
    assert apply_rope(q, q, *rope_tables(4, 8), backend="banded")[0].shape == shape
