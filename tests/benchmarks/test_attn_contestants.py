import json

import attn_contestants
import attn_speed
import pytest
import torch
import torch.nn.functional as F
from attn_contestants import CONTESTANTS, Contestant, Oracle, Problem
from document_contestants import DOCUMENT_CONTESTANTS, document_lengths

from kernels import sliding_gqa_attention

PROBLEM = Problem(T=300, window=21, Hq=4, Hkv=2, D=16, backward=True)


def variant(**changes):
    """A contestant that is right but for the changes: a window, a scale, or the shape of its heads."""

    def prepare(problem):
        options = {"window": problem.window, **changes}
        return lambda q, k, v: sliding_gqa_attention(q, k, v, **options)

    return Contestant({"": prepare})


def other_groups(problem):
    """Query head h reads KV head h % Hkv, which is what repeat() instead of repeat_interleave() does."""

    def attend(q, k, v):
        k, v = (x.repeat(1, problem.group, 1, 1) for x in (k, v))
        return sliding_gqa_attention(q, k, v, problem.window)

    return attend


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.01


def wrong_backward(problem):
    return lambda q, k, v: sliding_gqa_attention(q, WrongGradient.apply(k), v, problem.window)


def nan_in_one_row(problem):
    def attend(q, k, v):
        out = sliding_gqa_attention(q, k, v, problem.window)
        return torch.where(torch.arange(problem.T)[:, None] == problem.T - 1, torch.nan, out)

    return attend


WRONG = {
    "a window one too long": (variant(window=22), "is off by"),
    "a window one too short": (variant(window=20), "is off by"),
    "another scale": (variant(scale=0.3), "is off by"),
    "other groups": (Contestant({"": other_groups}), "is off by"),
    "a gradient of k that is 1 % off": (Contestant({"": wrong_backward}), "dk is off by"),
    "a NaN": (Contestant({"": nan_in_one_row}), "is off by inf"),
    "another shape": (Contestant({"": lambda problem: lambda q, k, v: q.mT @ q}), "RuntimeError|of shape"),
    "an exception": (Contestant({"": lambda problem: lambda q, k, v: 1 / 0}), "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_contestant_is_refused_and_not_timed(name):
    contestant, reason = WRONG[name]
    (row,) = attn_speed.measure_point(PROBLEM, {name: contestant}, 0)
    assert "median_ms" not in row and "failed the check" in row["not_timed"]
    assert any(part in row["not_timed"] for part in reason.split("|")), row["not_timed"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("shape", [dict(T=300, window=21), dict(T=70, window=64, Hkv=4), dict(T=40, window=None)])
def test_contestants_are_right_or_say_why_they_are_not_there(name, shape, monkeypatch):
    problem = PROBLEM._replace(**shape, backward=name != "FlexAttention")
    contestant = CONTESTANTS[name]
    if name == "FlexAttention":  # its mask and layout are checked; compiling takes longer than all other tests here
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    if (reason := contestant.why_not(problem)) is not None:
        pytest.skip(reason)
    inputs = problem.inputs()
    oracle = Oracle(problem, inputs, contestant.windowed)
    for way, prepare in contestant.ways.items():
        error, objection = oracle.objection(prepare(problem))
        assert objection is None and error <= 1, way


@pytest.mark.parametrize("name", DOCUMENT_CONTESTANTS)
@pytest.mark.parametrize("shape", [dict(window=21), dict(window=None, Hkv=4)])
def test_contestants_for_documents_are_right_or_say_why_they_are_not_there(name, shape, monkeypatch):
    problem = PROBLEM._replace(**shape, lengths=(40, 1, 100, 19, 140), backward=name != "FlexAttention")
    contestant = DOCUMENT_CONTESTANTS[name]
    if name == "FlexAttention":
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    if (reason := contestant.why_not(problem)) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(attn_contestants, "CHECK_BLOCK", 64)  # so that a document begins before its block
    inputs = problem.inputs()
    oracle = Oracle(problem, inputs, contestant.windowed, contestant.in_documents)
    across = Oracle(problem._replace(lengths=None), inputs)
    for way, prepare in contestant.ways.items():
        error, objection = oracle.objection(prepare(problem))
        assert objection is None and error <= 1, way
        assert (across.objection(prepare(problem))[1] is None) == (not contestant.in_documents)


def test_lengths_of_documents_fill_the_row_and_have_the_mean():
    lengths = document_lengths(300_000, 300)
    assert sum(lengths) == 300_000 and min(lengths) >= 1
    assert 250 < 300_000 / len(lengths) < 350
    assert document_lengths(1000, 50) == document_lengths(1000, 50) != document_lengths(1000, 50, seed=1)


def test_pairs_are_counted_in_each_document():
    assert Problem(T=7, Hq=1, Hkv=1, D=1, lengths=(3, 4)).flops == 4 * (6 + 10)


def test_one_wrong_way_is_not_taken():
    ways = {"wrong": variant(window=5).ways[""], "right": variant().ways[""]}
    (row,) = attn_speed.measure_point(PROBLEM, {"both": Contestant(ways)}, 0)
    assert row["way"] == "right" and row["not_timed"] is None and "(wrong)" in row["refused_ways"][0]


def test_a_sampled_check_sees_errors_in_the_last_rows(monkeypatch):
    monkeypatch.setattr(attn_contestants, "CHECK_ALL_PAIRS", 100)
    monkeypatch.setattr(attn_contestants, "CHECK_BLOCK", 16)

    def late_error(problem):
        def attend(q, k, v):
            out = sliding_gqa_attention(q, k, v, problem.window)
            return torch.cat([out[:, :, :-1], out[:, :, -1:] * 1.01], dim=2)

        return attend

    inputs = PROBLEM.inputs()
    oracle = Oracle(PROBLEM, inputs)
    assert 4 * 16 - 5 <= len(oracle.rows) <= 4 * 16 and PROBLEM.T - 1 in oracle.rows
    assert oracle.objection(variant().ways[""](PROBLEM))[1] is None
    assert "is off by" in oracle.objection(late_error(PROBLEM))[1]
    assert oracle.objection(wrong_backward(PROBLEM))[1].startswith("dk is off by")


def test_the_oracle_is_sdpa_in_fp64():
    problem = PROBLEM._replace(window=None)
    q, k, v, grad_out = inputs = problem.inputs()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    expected = (out, *torch.autograd.grad(out, exact, grad_out.double()))
    for mine, theirs in zip(Oracle(problem, inputs).exact.values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 9), (torch.float16, 80), (torch.float32, 10_000)])
def test_rounding_passes_and_a_window_off_by_one_does_not(dtype, least):
    """In every dtype, for all four results, where a row of dq is a small difference of large terms."""
    problem = Problem(T=1024, window=256, Hq=4, Hkv=2, D=64, backward=True, dtype=dtype)
    inputs = problem.inputs()
    oracle = Oracle(problem, inputs)
    for name in ("ours", "SDPA masked"):
        for prepare in CONTESTANTS[name].ways.values():
            assert oracle.objection(prepare(problem))[1] is None, name
    causal = Oracle(problem, inputs, windowed=False)
    assert causal.objection(CONTESTANTS["SDPA causal"].ways["grouped heads"](problem))[1] is None
    for window in (255, 257):
        attend = variant(window=window).ways[""](problem)
        assert oracle.error_of(attend)[0] > least
        out, *gradients = attn_contestants.call_of(attend, oracle.inputs, (oracle.grad_out,), True)()
        for result, (name, exact) in zip((out, *gradients), oracle.exact.items(), strict=True):
            error = attn_contestants._by_block(result.detach().double() - exact) / oracle.budget[name]
            assert error.max() > least / 2, name


def test_only_visible_pairs_are_counted():
    # 4 queries see 1, 2, 2 and 2 keys; forward 2 products of 2 FLOPs an element, backward 5 more
    problem = Problem(T=4, window=2, Hq=3, Hkv=1, D=5, B=2)
    assert problem.flops == 7 * 3 * 2 * 5 * 4
    assert problem._replace(backward=True).flops == 3.5 * problem.flops


def test_growth_is_against_half_the_length_of_the_same_contestant():
    def row(who, T, ms, window=8):
        fields = dict(contestant=who, T=T, window=window, Hq=1, Hkv=1, D=8, B=1, median_ms=ms, not_timed=None)
        return {**fields, "pass": "fwd"}

    rows = [
        row("a", 64, 1.0),
        row("a", 128, 4.0),
        row("b", 128, 9.0),
        row("a", 128, 9.0, window=16),
        row("a", 512, 9.0),
    ]
    attn_speed.add_growth(rows)
    assert [row.get("growth") for row in rows] == [None, 4.0, None, None, None]
    assert rows[1]["exponent"] == 2.0


def test_speed_ups_are_over_sdpa_in_the_same_rotation():
    rows = attn_speed.measure_point(
        PROBLEM, {name: CONTESTANTS[name] for name in ("ours", "SDPA masked", "SDPA causal")}, 0
    )
    ours, masked, causal = rows
    assert ours["x_masked"] == pytest.approx(masked["median_ms"] / ours["median_ms"])
    assert ours["x_causal"] == pytest.approx(causal["median_ms"] / ours["median_ms"])
    assert masked["x_masked"] == causal["x_causal"] == 1
    assert 0 < ours["of_matmul"] and ours["p20_ms"] <= ours["median_ms"] <= ours["p80_ms"]
    mask = PROBLEM.T**2  # bytes of the bool mask, which the masked one has to have
    assert masked["peak_mb"] * 1e6 > mask


def test_a_wrong_result_of_ours_makes_the_exit_status_1(monkeypatch, capsys):
    monkeypatch.setitem(CONTESTANTS, "ours", variant(window=3))
    arguments = "--shapes 32,8 --only ours --passes fwd --device cpu --seconds 0.01 --plot none"
    assert attn_speed.main(arguments.split(" ")) == 1
    captured = capsys.readouterr()
    assert "FAILED: ours at 32, W 8" in captured.out
    assert json.loads(captured.out.splitlines()[-1])["failed"] == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("64", "wanted T,W"),
        ("64,8,4", "wanted T,W"),
        ("64,x", "wanted T,W"),
        ("none,8", "wanted T,W"),
        ("64,0", "wanted T,W"),
        ("64,8,6,4", "whose 4 KV heads do not divide 6 heads"),
    ],
)
def test_bad_shapes_are_named(shape, message):
    with pytest.raises(attn_speed.harness.BadInput, match=message):
        attn_speed.parse(shape)


def test_shapes_are_read():
    assert attn_speed.parse("64,none") == Problem(T=64, window=None)
    assert attn_speed.parse("64,8,6,3,32,2") == Problem(T=64, window=8, Hq=6, Hkv=3, D=32, B=2)


def test_the_shapes_that_were_promised_are_in_the_default_grid():
    shapes = [attn_speed.parse(shape) for shape in attn_speed.DEFAULT["cpu"].split()]
    for T, W in ((256, 25), (1024, 128), (2048, 128), (4096, 256), (8192, 256)):
        assert Problem(T=T, window=W, Hq=8, Hkv=2, D=64, B=1) in shapes
    assert max(shape.T for shape in shapes) == 32768


def test_a_plot_of_one_length_has_bars_and_one_of_several_lines():
    def row(who, T, ms):
        fields = dict(contestant=who, shape=f"{T}, W 8", T=T, window=8, Hq=1, Hkv=1, D=8, B=1, median_ms=ms)
        return {**fields, "pass": "fwd"}

    (bars,) = attn_speed.plots([row("ours", 64, 1.0), row("SDPA masked", 64, 4.0)], ["fwd", "fwd+bwd"])
    assert bars["bars"] == {"64, W 8": {"ours": 1.0, "SDPA masked": 4.0}} and "series" not in bars
    (lines,) = attn_speed.plots([row("ours", 64, 1.0), row("ours", 128, 2.0)], ["fwd"])
    assert lines["series"] == {"ours": [[64, 1.0], [128, 2.0]]} and "bars" not in lines
