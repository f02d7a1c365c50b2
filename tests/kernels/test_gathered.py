"""Documents, and windows to both sides, in the banded backend: against the specification, and what they cost."""

import pytest
import torch
from budget import excess, run
from test_banded import CUTS, LargestTensor

from kernels import document_starts, rope_tables, sliding_gqa_attention
from kernels.backends.banded import gathered as banded_gathered
from kernels.backends.banded import keeping as banded_keeping
from kernels.backends.banded import plan as banded_plan
from kernels.band import visible_mask
from kernels.checks import check_window

B, D = 2, 16
SHAPES = {  # T, S, Hq, Hkv, window, the lengths of the documents of two rows, repeated; without them, no starts
    "documents of one token": (70, 70, 4, 2, 16, [1], [1]),
    "short documents": (150, 150, 4, 2, 16, [3, 1, 7, 20, 2], [5, 11]),
    "short ones, no window": (150, 150, 6, 2, None, [3, 1, 7, 20, 2], [19, 33]),
    "begins at the borders of blocks": (160, 160, 4, 2, 20, [16, 32, 48, 64], [128, 32]),
    "begins beside the borders": (160, 160, 4, 2, 20, [17, 30, 33, 15, 65], [127, 33]),
    "long documents, group 7": (300, 300, 7, 1, 24, [120, 180], [299, 1]),
    "long documents, no window": (300, 300, 3, 1, None, [120, 180], [1, 299]),
    "one row has one document": (200, 200, 2, 2, 30, [200], [90, 20, 90]),
    "padding in front and behind": (130, 130, 4, 2, 40, [*[1] * 50, 80], [60, *[1] * 70]),
    "window 1": (50, 50, 4, 2, 1, [9, 4], [50]),
    "window beyond every document": (150, 150, 4, 1, 149, [40, 30], [9, 50, 91]),
    "last queries only": (5, 100, 4, 2, 24, [97, 3], [40, 60]),
    "last queries, cut within a document": (37, 100, 4, 2, 24, [50, 30, 20], [70, 10]),
    "one query": (1, 70, 4, 1, 8, [66, 4], [70]),
    "a few dozen tokens": (64, 64, 4, 2, 32, [10, 54], [40, 24]),
    "two tokens": (2, 2, 2, 1, None, [1, 1], [2]),
    "both sides": (150, 150, 4, 2, (20, 9)),
    "both sides, more to the right": (150, 150, 6, 2, (3, 40)),
    "to the right only": (100, 100, 4, 2, (0, 16)),
    "all later keys": (100, 100, 4, 2, (7, None)),
    "all keys": (100, 100, 3, 1, (None, None)),
    "all keys of a few dozen tokens": (30, 30, 4, 2, (None, None)),
    "all keys of one token": (1, 1, 2, 1, (None, None)),
    "sides beyond S": (40, 40, 4, 2, (40, 39)),
    "both sides, short documents": (150, 150, 4, 2, (9, 12), [3, 1, 7, 20, 2], [5, 11]),
    "both sides, long documents": (300, 300, 7, 1, (24, 30), [120, 180], [299, 1]),
    "all keys of the document": (160, 160, 4, 2, (None, None), [16, 32, 48, 64], [1, 159]),
    "all later keys of the document": (130, 130, 4, 2, (5, -1), [*[1] * 50, 80], [60, *[1] * 70]),
}

OPTIONS = {
    "plain": {},
    "rope": {"rope": D},
    "everything": {"scale": 0.7, "softcap": 2.0, "sinks": True, "rope": D // 2},
}


def starts_of(S, *rows):
    """(B, S): documents of these lengths, repeated, and cut off at S."""
    ids = [torch.arange(S).repeat_interleave(torch.tensor(row * S)[:S])[:S] for row in rows]
    return document_starts(document_ids=torch.stack(ids))


def problem(shape, options, dtype=torch.float64):
    T, S, Hq, Hkv, window, *rows = shape
    tensors = [torch.randn(B, n, h, D).to(dtype).transpose(1, 2) for n, h in ((T, Hq), (S, Hkv), (S, Hkv))]
    options = {"scale": D**-0.5, **options, "starts": starts_of(S, *rows) if rows else None}
    if options.pop("sinks", False):
        tensors.append(torch.randn(Hq).to(dtype))
    if "rope" in options:
        options["rope"] = rope_tables(S + 3, options["rope"])
    return tensors, [torch.randn(B, Hq, T, D).to(dtype), torch.randn(B, Hq, T).to(dtype)], window, options


def cut(monkeypatch, threads, scores):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(banded_plan, "STEP_SCORES_PER_THREAD", scores)
    banded_gathered._plan.cache_clear()


def attend(backend):
    return lambda *inputs, **options: sliding_gqa_attention(*inputs, **options, return_lse=True, backend=backend)


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("case", SHAPES)
def test_every_row_is_in_exactly_one_step_with_every_key_it_sees(case, how, monkeypatch):
    cut(monkeypatch, *CUTS[how])
    (q, k, *_), _, window, options = problem(SHAPES[case], {})
    (_, Hq, T, _), (Hkv, S) = q.shape, k.shape[1:3]
    window, right = check_window(window)
    seen = visible_mask(T, S, window, right=right, starts=options["starts"]).view(-1, T, S).expand(B, T, S).int()
    first, last = seen.argmax(-1), S - 1 - seen.flip(-1).argmax(-1)
    counts = torch.zeros(B, Hq, T, 1)
    for step in banded_gathered.gathered_steps(q, k, options["starts"], window, right, CUTS[how][0]):
        step.write(counts, Hq // Hkv, torch.ones(step.products, step.length * Hq // Hkv, 1))
        begin = step.first_piece * step.piece
        assert (begin <= first[step.sequence, step.row]).all() and begin.min() >= 0
        assert (begin + step.width > last[step.sequence, step.row]).all()
        assert begin.max() + step.width <= banded_gathered.padded_length(S, [step])
    assert (counts == 1).all()


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize(
    "option, how, keep",
    [
        *((option, "all blocks at once", True) for option in OPTIONS),
        *((option, "all blocks at once", False) for option in ("plain", "rope")),
        *((option, how, True) for option in ("rope", "everything") for how in CUTS),
    ],
)
def test_documents_equal_reference(case, option, how, keep, monkeypatch):
    cut(monkeypatch, *CUTS[how])
    if not keep:
        monkeypatch.setattr(banded_keeping, "KEPT_KEYS", 0)
    tensors, grads, window, options = problem(SHAPES[case], OPTIONS[option])
    results = (run(attend(backend), tensors, grads, window, **options) for backend in ("banded", "reference"))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    ["short documents", "long documents, group 7", "last queries, cut within a document", "both sides, long documents"],
)
@pytest.mark.parametrize("option", OPTIONS)
def test_documents_stay_within_the_error_budget(case, option, dtype):
    tensors, grads, window, options = problem(SHAPES[case], OPTIONS[option], dtype)
    ratios = excess(run(attend("banded"), tensors, grads, window, **options), tensors, grads, window, **options)
    assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize("T, window", [(7, 3), (9, (2, 1))])
def test_gradients_are_those_of_finite_differences(T, window):
    tensors, _, window, options = problem((T, 9, 2, 1, window, [4, 5], [2, 7]), OPTIONS["everything"])
    options["rope"] = tuple(table.double() for table in options["rope"])
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks: attend("banded")(q, k, v, window, sinks=sinks, **options), leaves
    )


@pytest.mark.parametrize(
    "window, seen", [(None, slice(30, 41)), (8, slice(33, 41)), ((8, 4), slice(32, 45)), ((8, None), slice(32, 60))]
)
def test_keys_of_other_documents_get_zero_gradient(window, seen):
    tensors, _, _, options = problem((90, 90, 4, 2, window, [30], [45]), {})
    q, k, v = (x.requires_grad_() for x in tensors)
    out = sliding_gqa_attention(q, k, v, window, **options, backend="banded")
    for grad in torch.autograd.grad(out[0, :, 40].square().sum(), (k, v)):
        assert grad[0, :, seen].abs().amin(dim=(0, 2)).min() > 0
        grad[0, :, seen] = 0
        assert not grad.any()


@pytest.mark.parametrize("case", ["short documents", "long documents, group 7"])
def test_rows_of_one_document_are_computed_as_without_starts(case):
    tensors, grads, window, options = problem(SHAPES[case], OPTIONS["rope"], torch.float32)
    options["starts"].zero_()
    with_starts = run(attend("banded"), tensors, grads, window, **options)
    options["starts"] = None
    for ours, expected in zip(with_starts, run(attend("banded"), tensors, grads, window, **options), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("layout", ["contiguous", "one projection", "heads far apart", "an expanded gradient"])
@pytest.mark.parametrize("Hq, Hkv", [(4, 2), (3, 3)])
def test_every_memory_layout_is_read(layout, Hq, Hkv):
    tensors, grads, window, options = problem((70, 70, Hq, Hkv, 20, [30, 9], [51]), OPTIONS["rope"])
    if layout == "contiguous":
        tensors = [x.contiguous() for x in tensors]
    elif layout == "one projection":
        fused = torch.cat([x.transpose(1, 2).flatten(2) for x in tensors], dim=-1)
        tensors = [x.unflatten(-1, (-1, D)).transpose(1, 2) for x in fused.split([n * D for n in (Hq, Hkv, Hkv)], -1)]
    elif layout == "heads far apart":
        tensors = [x.repeat(1, 1, 2, 3)[:, :, 1:71, 5 : 5 + D] for x in tensors]
    else:
        grads[0] = torch.tensor(0.3, dtype=torch.float64).expand(grads[0].shape)
    results = []
    for backend in ("banded", "reference"):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attend(backend)(*leaves, window, **options)
        assert out[0].stride() == torch.empty_like(tensors[0]).stride()
        results.append([*out, *torch.autograd.grad(out, leaves, grads)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-9)


def test_kept_probabilities_serve_a_second_backward_pass(monkeypatch):
    cut(monkeypatch, 1, 2**11)
    tensors, _, window, options = problem(SHAPES["short documents"], OPTIONS["rope"])
    leaves = [x.requires_grad_() for x in tensors]
    out = sliding_gqa_attention(*leaves, window, **options, backend="banded")
    first = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # which would cut the work otherwise
    for again, grad in zip(torch.autograd.grad(out.square().sum(), leaves), first, strict=True):
        torch.testing.assert_close(again, grad, atol=1e-12, rtol=1e-12)


def test_a_call_gives_the_same_bits_again():
    tensors, grads, window, options = problem(SHAPES["short documents"], OPTIONS["rope"], torch.float32)
    results = [run(attend("banded"), tensors, grads, window, **options) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_short_documents_share_steps():
    """1,024 documents of four tokens are a few batches of products, not one each, and little more than their pairs."""
    q, k = torch.empty(1, 4, 4096, D), torch.empty(1, 2, 4096, D)
    steps = banded_gathered.gathered_steps(q, k, starts_of(4096, [4]), 256, 0, 1)
    assert len(steps) == 1 and steps[0].width <= 32
    assert sum(step.products * step.length * step.width for step in steps) <= 2 * 4096 * 32


@pytest.mark.parametrize("window, documents", [(32, [[50, 9], [300]]), ((32, 20), [])])
def test_memory_is_linear_in_the_length(window, documents):
    sizes = []
    for T in (512, 1024, 2048):
        tensors, grads, window, options = problem((T, T, 4, 2, window, *documents), {}, torch.float32)
        with LargestTensor() as largest:
            run(attend("banded"), tensors, grads, window, **options)
        sizes.append(largest.numel)
    assert sizes[2] <= 2.05 * sizes[1] <= 4.2 * sizes[0]


def test_a_full_graph_takes_any_documents():
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        lambda q, k, v, starts: sliding_gqa_attention(q * 1.0, k, v, 16, starts=starts, backend="banded"),
        fullgraph=True,
        backend=lambda graph, _: graphs.append(graph) or graph,
    )
    for case in ("short documents", "documents of one token", "short documents"):
        (q, k, v), grads, _, options = problem((70, 70, *SHAPES[case][2:]), {})
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        options.pop("scale")
        expected = sliding_gqa_attention(q, k, v, 16, **options, backend="reference")
        out = compiled(q, k, v, options["starts"])
        for ours, theirs in zip(
            (out, *torch.autograd.grad(out, (q, k, v), grads[0])),
            (expected, *torch.autograd.grad(expected, (q, k, v), grads[0])),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)
    assert len(graphs) == 1
