"""flash-attention's functions against an oracle that is written from its documentation, position by position."""

from itertools import pairwise

import pytest
import torch

from kernels import rope_tables
from kernels.backends import reference
from kernels.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

BACKENDS = ["reference", "banded", "triton"]
WINDOWS = [(-1, -1), (3, 0), (-1, 0), (2, 1), (3, -1), (-1, 2), (0, 0), (50, 50)]
CASES = [(backend, window) for backend in ("reference", "banded") for window in WINDOWS]
CASES += [("triton", window) for window in ((-1, -1), (2, 1), (3, 0))]  # its interpreter is slow


def oracle(q, k, v, causal=False, window_size=(-1, -1), softmax_scale=None, softcap=0.0):
    """(out (T, H, D), lse (H, T)) of one sequence: query i sees keys i + S - T - left .. i + S - T + right."""
    T, S, group = len(q), len(k), q.shape[1] // k.shape[1]
    left, right = (T + S if side < 0 else side for side in window_size)
    right = 0 if causal else right
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("thd,shd->hts", q, k) * (q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(T)[:, None] + S - T
    key = torch.arange(S)
    scores = scores.masked_fill((key < place - left) | (key > place + right), float("-inf"))
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return torch.einsum("hts,shd->thd", weights, v), torch.logsumexp(scores, -1)


def tensors(*lengths, B=2, Hq=4, Hkv=2, D=8, dtype=torch.float64):
    return [
        torch.randn(B, length, Hq if i == 0 else Hkv, D, dtype=dtype, requires_grad=True)
        for i, length in enumerate(lengths)
    ]


def agree(ours, expected, leaves):
    """Results and gradients are equal."""
    torch.testing.assert_close(ours, expected)
    grads = [torch.randn_like(x) for x in expected]
    for a, b in zip(*(torch.autograd.grad(x, leaves, grads) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend, window_size", CASES)
@pytest.mark.parametrize("T, S", [(9, 9), (4, 9), (1, 9), (9, 4)])
def test_attention_sees_what_the_documentation_says(T, S, window_size, causal, backend):
    q, k, v = leaves = tensors(T, S, S)
    call = {"causal": causal, "window_size": window_size, "softmax_scale": 0.3, "softcap": 5.0}
    if T > S and not causal and window_size[1] != 0 and window_size != (-1, -1):
        with pytest.raises(ValueError, match="then window_size needs no bound, or no right side"):
            flash_attn_func(q, k, v, **call, backend=backend)
        return
    out, lse, probabilities = flash_attn_func(q, k, v, **call, return_attn_probs=True, backend=backend)
    assert probabilities is None and out.shape == q.shape
    expected = [torch.stack(x) for x in zip(*(oracle(*row, **call) for row in zip(q, k, v, strict=True)), strict=True)]
    if lse.isneginf().any():  # rows without keys: their gradient is 0 here, NaN in the oracle
        torch.testing.assert_close((out, lse), tuple(expected))
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))
    else:
        agree((out, lse), tuple(expected), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_tensors_are_views(backend):
    qkv = torch.randn(2, 9, 3, 4, 8, requires_grad=True)
    kv, q = qkv[:, :, 1:], qkv[:, :, 0]
    out = flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], causal=True, window_size=(3, 0), backend=backend)
    assert torch.equal(out, flash_attn_qkvpacked_func(qkv, causal=True, window_size=(3, 0), backend=backend))
    assert torch.equal(out, flash_attn_kvpacked_func(q, kv, causal=True, window_size=(3, 0), backend=backend))
    assert out.is_contiguous()


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend, window_size", CASES)
@pytest.mark.parametrize(
    "lengths_q, lengths_k", [((3, 1, 5), (3, 1, 5)), ((2, 1, 3), (5, 1, 3)), ((5, 2, 0), (2, 2, 3))]
)
def test_packed_sequences_are_each_alone(lengths_q, lengths_k, window_size, causal, backend):
    cu_q, cu_k = ends(lengths_q), ends(lengths_k)
    q, k, v = leaves = [x[0] for x in tensors(sum(lengths_q), sum(lengths_k), sum(lengths_k), B=1)]
    call = {"causal": causal, "window_size": window_size}
    if lengths_q[0] > lengths_k[0] and not causal and window_size[1] != 0:
        with pytest.raises(ValueError, match="sequence 0 has more queries than keys"):
            flash_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 9, **call, backend=backend)
        return
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 9, **call, return_attn_probs=True, backend=backend)
    parts = [
        oracle(q[a:b], k[c:d], v[c:d], **call) for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True)
    ]
    expected = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], 1)
    if lse.isneginf().any():
        torch.testing.assert_close((out, lse), expected)
    else:
        agree((out, lse), expected, leaves)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend, window_size", CASES)
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("rotary", [None, "halves", "neighbours"])
def test_a_linear_cache_is_written_and_read(T, window_size, causal, rotary, backend):
    """The cache is longer than the window, and its rows hold different numbers of tokens."""
    C, before = 12, torch.tensor([5, 0, 8], dtype=torch.int32)
    q, k, v = (x.detach() for x in tensors(T, T, T, B=3))
    k_cache, v_cache = (x.detach() for x in tensors(C, C, C, B=3)[1:])
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    call = {"causal": causal, "window_size": window_size, "softcap": 5.0}
    how = {}
    rotated_q, rotated_k = q, k
    if rotary is not None:
        cos, sin = rope_tables(C, 8)
        how = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rotary == "neighbours"}
        place = before[:, None] + torch.arange(T)
        at_q = place if causal or window_size != (-1, -1) else before[:, None].expand(-1, T)
        rotated_q, rotated_k = (
            reference.rotated(x, cos[at][:, :, None], sin[at][:, :, None], rotary == "neighbours")
            for x, at in ((q, at_q), (k, place))
        )
    for row, n in enumerate(before.tolist()):
        expected_k[row, n : n + T], expected_v[row, n : n + T] = rotated_k[row], v[row]
    rows = [
        oracle(rotated_q[row], expected_k[row, : n + T], expected_v[row, : n + T], **call)
        for row, n in enumerate(before.tolist())
    ]
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=before, **how, **call, return_softmax_lse=True, backend=backend
    )
    torch.testing.assert_close((k_cache, v_cache), (expected_k, expected_v))
    torch.testing.assert_close((out, lse), tuple(torch.stack(x) for x in zip(*rows, strict=True)))
    read = flash_attn_with_kvcache(rotated_q, k_cache, v_cache, cache_seqlens=before + T, **call, backend=backend)
    torch.testing.assert_close(read, out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_without_lengths_is_full_and_a_number_is_every_rows(backend):
    q, k_cache, v_cache = (x.detach() for x in tensors(1, 6, 6))
    full = flash_attn_with_kvcache(q, k_cache, v_cache, backend=backend)
    torch.testing.assert_close(full, flash_attn_func(q, k_cache, v_cache, backend=backend))
    part = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=4, backend=backend)
    torch.testing.assert_close(part, flash_attn_func(q, k_cache[:, :4], v_cache[:, :4], backend=backend))


Q, K = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
CACHE = {"q": Q[:, :1], "k_cache": K, "v_cache": K.clone()}
BAD_CALLS = [
    (flash_attn_func, {"dropout_p": 0.1}, "dropout_p is 0.1, expected 0: these kernels have no dropout"),
    (flash_attn_func, {"alibi_slopes": torch.ones(4)}, "alibi_slopes is not supported here, expected None"),
    (flash_attn_func, {"window_size": 3}, "window_size is 3, expected a pair \\(left, right\\)"),
    (flash_attn_func, {"window_size": (-2, 0)}, "window's left side is -2"),
    (
        flash_attn_func,
        {"q": Q[0]},
        "q is a tensor \\(5, 4, 8\\), expected a tensor \\(batch, length, heads, head size\\)",
    ),
    (flash_attn_func, {"q": None}, "q is None, expected a tensor"),
    (flash_attn_func, {"softcap": -1.0}, "softcap is -1.0"),
    (flash_attn_varlen_func, {"block_table": torch.ones(2)}, "block_table is not supported here"),
    (
        flash_attn_varlen_func,
        {"q": Q},
        "q is a tensor \\(2, 5, 4, 8\\), expected a tensor \\(total, heads, head size\\)",
    ),
    (flash_attn_varlen_func, {"cu_seqlens_q": torch.tensor([0, 2, 5])}, "cu_seqlens_q has 3 numbers, cu_seqlens_k 2"),
    (flash_attn_varlen_func, {"cu_seqlens_k": torch.tensor([1, 5])}, "cu_seqlens is \\[1, 5\\], expected 0"),
    (
        flash_attn_qkvpacked_func,
        {"qkv": torch.randn(2, 5, 2, 4, 8)},
        "qkv is a tensor .*, expected a tensor \\(batch, len",
    ),
    (flash_attn_kvpacked_func, {"kv": K}, "kv is a tensor .*, expected a tensor \\(batch, length, 2, heads"),
    (flash_attn_with_kvcache, {"block_table": torch.ones(2)}, "block_table is not supported here"),
    (flash_attn_with_kvcache, {"cache_batch_idx": torch.ones(2)}, "cache_batch_idx is not supported here"),
    (flash_attn_with_kvcache, {"cache_leftpad": torch.ones(2)}, "cache_leftpad is not supported here"),
    (flash_attn_with_kvcache, {"k": K[:, :1]}, "k and v belong together, but one of them is None"),
    (flash_attn_with_kvcache, {"k": K[:, :1], "v": K[:, :1]}, "cache_seqlens is None: it says where k is written"),
    (flash_attn_with_kvcache, {"rotary_cos": torch.ones(5, 4)}, "rotary_cos is for new keys"),
    (flash_attn_with_kvcache, {"cache_seqlens": 6}, "the caches have 5 slots, but cache_seqlens and k make 6 tokens"),
    (
        flash_attn_with_kvcache,
        {"cache_seqlens": torch.ones(3).int()},
        "cache_seqlens is a tensor \\(3,\\), expected a num",
    ),
    (flash_attn_with_kvcache, {"cache_seqlens": 2.5}, "cache_seqlens is 2.5, expected a whole number"),
]


@pytest.mark.parametrize("function, changed, message", BAD_CALLS)
def test_what_is_not_supported_is_named(function, changed, message):
    good = {
        flash_attn_func: {"q": Q, "k": K, "v": K},
        flash_attn_kvpacked_func: {"q": Q, "kv": torch.stack([K, K], 2)},
        flash_attn_qkvpacked_func: {"qkv": torch.stack([Q, Q, Q], 2)},
        flash_attn_varlen_func: {"q": Q[0], "k": K[0], "v": K[0], "cu_seqlens_q": ends([5]), "cu_seqlens_k": ends([5])}
        | {"max_seqlen_q": 5, "max_seqlen_k": 5},
        flash_attn_with_kvcache: CACHE,
    }[function]
    function(**good, backend="reference")
    with pytest.raises(ValueError, match=message) as error:
        function(**{**good, **changed}, backend="reference")
    assert "\n" not in str(error.value)


def test_names_order_and_defaults_are_flash_attentions():
    """As documented in flash_attn_interface.py 2.8; one more keyword is ours."""
    import inspect

    shared = "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None"
    shared += " deterministic=False return_attn_probs=False"
    expected = {
        flash_attn_func: f"q k v {shared}",
        flash_attn_kvpacked_func: f"q kv {shared}",
        flash_attn_qkvpacked_func: f"qkv {shared}",
        flash_attn_varlen_func: "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q=None max_seqlen_k=None "
        f"{shared} block_table=None",
        flash_attn_with_kvcache: "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None "
        "cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1,-1) "
        "softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
    }
    for function, names in expected.items():
        parameters = inspect.signature(function).parameters.values()
        ours = [str(p).replace(" ", "") for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert ours == names.split()
        assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == ["backend"]
