"""What does not fit is refused in one line that names the argument, what came and the way out, on every backend."""

import numpy
import pytest
import torch

from kernels import append_to_cache, apply_rope, resolve_backend, rope_tables, sliding_gqa_attention, sliding_gqa_decode
from kernels.backends import banded, reference, triton

B, T, Hq, Hkv, D, C = 2, 6, 4, 2, 8, 5
COS, SIN = rope_tables(T, D)


def heads(H, length=T, **options):
    return torch.randn(B, H, length, D, **options)


def attend(**changed):
    return sliding_gqa_attention(**{"q": heads(Hq), "k": heads(Hkv), "v": heads(Hkv), "window": 3, **changed})


def rotate(**changed):
    return apply_rope(**{"q": heads(Hq), "k": heads(Hkv), "cos": COS, "sin": SIN, **changed})


def append(**changed):
    new, rings = {"k": heads(Hkv, 1), "v": heads(Hkv, 1)}, {"k_cache": heads(Hkv, C), "v_cache": heads(Hkv, C)}
    return append_to_cache(**{**new, **rings, "lengths": torch.tensor([3, 4], dtype=torch.int32), **changed})


def decode(**changed):
    rings = {"k_cache": heads(Hkv, C), "v_cache": heads(Hkv, C), "lengths": torch.tensor([3, 4], dtype=torch.int32)}
    return sliding_gqa_decode(**{"q": heads(Hq, 1), **rings, "window": 3, **changed})


def tables(**changed):
    return rope_tables(**{"length": 4, "rotary_dim": 8, **changed})


def meta(*shape):
    return torch.zeros(*shape, device="meta")


RING, WIDE = heads(Hkv, C), heads(Hkv + 1, C + 1)
YARN = {"factor": 2.0, "original_max_position_embeddings": 8}
LLAMA3 = {**YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BAD_CALLS = [  # (function, what is changed, message)
    *(
        (function, changed, message)
        for function in (attend, decode)
        for changed, message in (
            ({"window": 4.0}, "window is 4.0, expected a whole number"),
            ({"window": 2.5}, "window is 2.5, expected a whole number"),
            ({"window": "4"}, "window is '4', expected a whole number"),
            ({"window": True}, "window is True, expected a whole number"),
            ({"window": torch.tensor(4)}, "window is a tensor, expected a whole number: window.item\\(\\)"),
            ({"window": numpy.int64(0)}, "window is 0, expected None or at least 1"),
            ({"window": 2**70}, "window is 1180591620717411303424, expected less than 2\\*\\*63: None sees every"),
            ({"scale": "x"}, "scale is 'x', expected a positive number"),
            ({"scale": True}, "scale is True, expected a positive number"),
            ({"scale": float("inf")}, "scale is inf, expected a positive number that is finite"),
            ({"scale": float("nan")}, "scale is nan, expected a positive number that is finite"),
            ({"scale": torch.tensor(0.1)}, "scale is a tensor, expected a number: scale.item\\(\\)"),
            ({"softcap": float("inf")}, "softcap is inf, expected None or a positive number that is finite"),
            ({"softcap": [5.0]}, "softcap is \\[5.0\\], expected None or a positive number"),
            ({"sinks": [0.0] * Hq}, "sinks is a list, expected a tensor \\(4,\\), one number for each head of q"),
            ({"sinks": torch.zeros(Hq, dtype=torch.int32)}, "sinks is torch.int32 \\(4,\\), expected one float"),
            ({"sinks": meta(Hq)}, "sinks is on meta, q is on cpu: move it with .to\\(q.device\\)"),
            ({"rope": COS}, "rope is a tensor \\(6, 4\\), expected None or the pair \\(cos, sin\\) of rope_tables"),
            ({"rope": False}, "rope is False, expected None or the pair"),
            ({"rope": (COS, SIN, SIN)}, "rope is 3 of them, expected None or the pair"),
            ({"rope": (COS, None)}, "rope table sin is None, expected a tensor \\(length, R/2\\)"),
            ({"rope": (COS.int(), SIN)}, "rope table cos has dtype torch.int32, expected a floating one"),
            ({"rope": (meta(T, 4), meta(T, 4))}, "on meta, q is on cpu: rope_tables\\(..., device=q.device\\)"),
            ({"rope": (COS, meta(T, 4))}, "rope tables are on cpu and meta, q is on cpu"),
            ({"q": heads(Hq, 1).numpy()}, "q is a numpy.ndarray, expected a tensor"),
            ({"q": heads(Hq, 1).to(torch.float8_e4m3fn)}, "q has dtype torch.float8_e4m3fn, expected a floating one"),
            ({"q": heads(Hq, 1).int()}, "q has dtype torch.int32, expected a floating one"),
            ({"q": heads(Hq, 1)[..., :0]}, "q has head size 0, expected at least 1"),
        )
    ),
    (attend, {"rope": rope_tables(5, D)}, "rope tables hold 5 positions.* 6 of the sequence: rope_tables\\(6, ...\\)"),
    (attend, {"q": heads(0)}, "q has 0 heads, expected at least 1"),
    (attend, {"k": None}, "k is None, expected a tensor"),
    (attend, {"v": meta(B, Hkv, T, D)}, "v is on meta, q is on cpu: move it with .to\\(q.device\\)"),
    (rotate, {"k": None}, "k is None, expected a tensor"),
    (rotate, {"q": heads(Hq).int(), "k": heads(Hkv).int()}, "q has dtype torch.int32, expected a floating one"),
    (rotate, {"k": meta(B, Hkv, T, D)}, "k is on meta, q is on cpu"),
    (
        rotate,
        {"cos": meta(T, 4), "sin": meta(T, 4)},
        "rope tables are on meta, q is on cpu: rope_tables\\(..., device=",
    ),
    (rotate, {"positions": 1}, "rope tables hold 6 positions, which is fewer than the 7"),
    (rotate, {"positions": 1.5}, "positions is 1.5, expected a whole number"),
    (rotate, {"positions": True}, "positions is True, expected a whole number"),
    (rotate, {"positions": [0] * T}, "positions is a list, expected None, an offset or a tensor"),
    (
        rotate,
        {"positions": torch.ones(T, dtype=torch.bool)},
        "positions is torch.bool \\(6,\\), expected int64 or int32",
    ),
    (rotate, {"positions": torch.ones(T)}, "positions is torch.float32 \\(6,\\), expected int64 or int32"),
    (rotate, {"positions": meta(T).long()}, "positions is on meta, q is on cpu"),
    (rotate, {"positions": torch.arange(1, T + 1)}, "hold 6 positions, but position 6 was .*: rope_tables\\(7, ...\\)"),
    (rotate, {"positions": torch.arange(T) - 1}, "hold 6 positions, but position -1 was asked for: they begin at 0"),
    (decode, {"lengths": [3, 4]}, "lengths is a list, expected a tensor int32 or int64 \\(2,\\) on cpu"),
    (decode, {"k_cache": meta(B, Hkv, C, D)}, "k_cache is on meta, q is on cpu"),
    (decode, {"lengths": torch.tensor([3, 7], dtype=torch.int32), "rope": (COS, SIN)}, "but position 6 was asked for"),
    (append, {"lengths": torch.tensor([3, 7], dtype=torch.int32), "rope": (COS, SIN)}, "but position 6 was asked for"),
    (append, {"lengths": [3, 4]}, "lengths is a list"),
    (append, {"v": meta(B, Hkv, 1, D)}, "v is on meta, k is on cpu: move it with .to\\(k.device\\)"),
    (append, {"v": heads(Hkv, 1).half()}, "v has dtype torch.float16, expected k's torch.float32"),
    (append, {"v": heads(Hkv, 2)}, "v has shape \\(2, 2, 2, 8\\), expected k's \\(2, 2, 1, 8\\)"),
    (append, {"rope": (meta(T, 4), meta(T, 4))}, "tables are on meta, k is on cpu: rope_tables\\(..., device=k.device"),
    *(
        (append, {"k_cache": k_cache, "v_cache": v_cache}, "k_cache and v_cache share memory, expected one tensor for")
        for k_cache, v_cache in (
            (RING, RING),
            (RING[:, :], RING[:, :]),
            (WIDE[:, :Hkv], WIDE[:, 1:]),
            (WIDE[:, :Hkv, 1:], WIDE[:, :Hkv, :-1]),
        )
    ),
    (append, {"v_cache": RING[:1].expand(B, -1, -1, -1)}, "v_cache is expanded, so that its rows share memory"),
    (tables, {"length": 10.5}, "length is 10.5, expected a whole number"),
    (tables, {"rotary_dim": 8.0}, "rotary_dim is 8.0, expected a whole number"),
    (tables, {"theta": 0}, "theta is 0.0, expected a positive number"),
    (tables, {"theta": -3.0}, "theta is -3.0, expected a positive number"),
    (tables, {"rotary_dim": 2, "scaling": ("ntk", 2.0)}, "rotary_dim is 2, expected at least 4 for scaling 'ntk'"),
    (tables, {"scaling": ("linear", 0)}, "the factor of scaling 'linear' is 0.0, expected a positive number"),
    (tables, {"scaling": ("linear", None)}, "the factor of scaling 'linear' is None, expected a positive number"),
    (tables, {"scaling": ("yarn", 2.0)}, "scaling 'yarn' comes with 2.0, expected a dict with its factor"),
    (tables, {"scaling": ("yarn", {**YARN, "factor": 0.0})}, "factor of scaling 'yarn' is 0.0"),
    (tables, {"theta": 1.0, "scaling": ("yarn", YARN)}, "theta is 1.0, expected another for scaling 'yarn'"),
    (tables, {"scaling": ("llama3", {**LLAMA3, "low_freq_factor": 4.0})}, "low_freq_factor and high_.* are equal"),
]


@pytest.mark.parametrize("case", range(len(BAD_CALLS)), ids=lambda case: f"{BAD_CALLS[case][0].__name__}-{case}")
def test_bad_calls_are_named_in_one_line(case):
    function, changed, message = BAD_CALLS[case]
    function()
    names = ["auto", "banded", "reference", *(["triton"] if triton.interpreted() else [])]
    for name in [{}] if function is tables else [{"backend": name} for name in names]:
        with pytest.raises(ValueError, match=message) as error:
            function(**changed, **name)
        assert "\n" not in str(error.value)


def test_whole_numbers_are_those_that_pytorch_takes():
    q, k, v = heads(Hq), heads(Hkv), heads(Hkv)
    for name in ("banded", "reference"):
        same = [attend(q=q, k=k, v=v, window=w, scale=s, backend=name) for w, s in ((2, 1.0), (numpy.int64(2), 1))]
        assert torch.equal(*same)
    assert torch.equal(attend(q=q, k=k, v=v, scale=numpy.float32(0.5)), attend(q=q, k=k, v=v, scale=0.5))
    cos, sin = rope_tables(numpy.int64(9), 8, theta=10000)
    assert torch.equal(*(rotate(q=q, k=k, cos=cos, sin=sin, positions=p)[0] for p in (3, numpy.int64(3))))


def test_tensors_on_meta_are_taken():
    q, k, v = (x.to("meta").requires_grad_() for x in (heads(Hq), heads(Hkv), heads(Hkv)))
    out, lse = sliding_gqa_attention(q, k, v, 3, rope=rope_tables(T, D, device="meta"), return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and out.device.type == "meta"
    out.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape
    assert apply_rope(q, k, *rope_tables(T, D, device="meta"))[1].shape == k.shape


@pytest.mark.parametrize("backend", ["banded", "reference", "triton"])
@pytest.mark.parametrize("function", [attend, rotate])
def test_tables_are_constants(function, backend, device):
    """Whoever learns his tables has to rotate himself: no backend gives them a gradient, or half of one."""
    learned = {"cos": COS.clone().to(device).requires_grad_(), "sin": SIN.clone().to(device).requires_grad_()}
    q, k, v = (heads(H, device=device, requires_grad=True) for H in (Hq, Hkv, Hkv))
    rope = {"v": v, "rope": tuple(learned.values())} if function is attend else learned
    out = function(q=q, k=k, backend=backend, **rope)
    out = sum(x.square().sum() for x in out) if isinstance(out, tuple) else out.square().sum()
    grads = torch.autograd.grad(out, (q, k, *learned.values()), allow_unused=True)
    assert grads[0].abs().sum() > 0 and grads[1].abs().sum() > 0 and grads[2:] == (None, None)


@pytest.fixture
def a_gpu(monkeypatch):
    """As where Triton runs: the answer to whether it does is all that is made up."""
    monkeypatch.setattr(triton, "why_not_on", lambda device: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_is_banded_for_what_triton_has_no_tiles_for(a_gpu):
    assert resolve_backend("auto", "cuda") == ("triton", "it runs on this GPU")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert resolve_backend("auto", "cuda", dtype, 256)[0] == "triton"
    name, why = resolve_backend("auto", "cuda", torch.float64, 64)
    assert name == "banded" and "no tiles for float64" in why
    name, why = resolve_backend("auto", "cuda", torch.bfloat16, 264)
    assert name == "banded" and "no tiles for head size 264" in why and "head sizes to 256" in why


@pytest.mark.parametrize(
    "dtype, head_dim, what", [(torch.float64, 64, "float64"), (torch.float32, 257, "head size 257")]
)
def test_a_named_triton_without_tiles_is_refused(a_gpu, dtype, head_dim, what):
    with pytest.raises(ValueError, match=f"'triton' cannot run on cuda: Triton has no tiles for {what}.*'banded'$"):
        resolve_backend("triton", "cuda", dtype, head_dim)
    assert resolve_backend("reference", "cuda", dtype, head_dim)[0] == "reference"


def test_the_interpreter_needs_no_tiles(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", "cpu", torch.float64, 512) == ("triton", "named by the caller")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, head_dim", [(torch.float64, 16), (torch.float16, 320)])
def test_auto_attends_and_decodes_in_any_dtype_and_head_size(dtype, head_dim, device):
    q, k = (torch.randn(1, H, 5, head_dim, dtype=dtype, device=device) for H in (4, 2))
    full = sliding_gqa_attention(q, k, k, 3)
    torch.testing.assert_close(full, sliding_gqa_attention(q, k, k, 3, backend="reference"))
    lengths = torch.tensor([5], dtype=torch.int32, device=device)
    decoded = sliding_gqa_decode(q[:, :, -1:], k, k, lengths, 3)
    torch.testing.assert_close(decoded, full[:, :, -1:], atol=4 * torch.finfo(dtype).eps, rtol=1e-3)


class Unseen(torch.Tensor):
    """A tensor whose elements the host does not look at, like one on a GPU."""

    is_cpu = property(lambda self: False)


def test_banded_gives_nan_for_lengths_that_it_cannot_refuse():
    """What the kernels do, where it stands in for them on a GPU: the rows apart, nothing changes."""
    lengths = torch.tensor([5, 7, 2], dtype=torch.int32)
    unseen, fits = lengths.as_subclass(Unseen), lengths.clamp(max=5)
    q, k, ring = torch.randn(3, Hq, 1, D), torch.randn(3, Hkv, 1, D), torch.randn(2, 3, Hkv, 5, D)
    out = banded.attend_to_cache(q, *ring, unseen, scale=1.0)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[::2], reference.attend_to_cache(q, *ring, fits, scale=1.0)[::2])
    out = banded.attend_to_cache(q, *ring, unseen, 5, scale=1.0, rope=(COS, SIN))
    assert out[1].isnan().all()
    torch.testing.assert_close(out[::2], reference.attend_to_cache(q, *ring, fits, 5, scale=1.0, rope=(COS, SIN))[::2])
    banded.append(k, k, *ring, unseen, rope=(COS, SIN))
    assert ring[0, 1, :, 6 % 5].isnan().all() and ring.isnan().sum() == Hkv * D


def test_compiled_rotation_gives_nan_where_the_tables_end():
    q, k = heads(Hq), heads(Hkv)
    positions = torch.tensor([0, 5, 6, -1, 1, 2])
    compiled = torch.compile(apply_rope, fullgraph=True, backend="eager")
    turned = compiled(q, k, COS, SIN, positions=positions)
    exact = apply_rope(q, k, COS, SIN, positions=positions.clamp(0, 5))
    for ours, theirs in zip(turned, exact, strict=True):
        assert ours[:, :, 2:4].isnan().all()
        torch.testing.assert_close(ours[:, :, [0, 1, 4, 5]], theirs[:, :, [0, 1, 4, 5]])


@pytest.mark.parametrize("backend", ["banded", "reference", "triton"])
@pytest.mark.parametrize("length, window", [(6, 3), (6, None), (100, 7)])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_of_nan_is_nan_in_out_and_lse(backend, length, window, sinks, device):
    """And no other is: a query of NaN, attended to and decoded."""
    q, k, v = (heads(H, length, device=device) for H in (Hq, Hkv, Hkv))
    q[0, 1, -1] = float("nan")
    sinks = torch.zeros(Hq, device=device) if sinks else None
    out, lse = sliding_gqa_attention(q, k, v, window, sinks=sinks, return_lse=True, backend=backend)
    lengths = torch.full((B,), length, dtype=torch.int32, device=device)
    decoded = sliding_gqa_decode(q[:, :, -1:], k, v, lengths, window, sinks=sinks, backend=backend)
    for x in (out, lse[..., None], decoded):
        assert x[0, 1, -1].isnan().all() and x.isnan().sum() == x.shape[-1]
