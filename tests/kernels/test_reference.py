"""The specification itself, held to PyTorch's SDPA, to Hugging Face's rotary tables and to a drawing of the mask."""

import pytest
import torch
import torch.nn.functional as F

from kernels import rope_tables, sliding_gqa_attention
from kernels.backends import reference
from kernels.band import visible_mask


def draw(seen):
    return [" ".join("1" if x else "." for x in row) for row in seen.tolist()]


def test_the_mask_is_the_one_in_the_docstring():
    assert draw(visible_mask(3, 5, window=3)) == ["1 1 1 . .", ". 1 1 1 .", ". . 1 1 1"]
    assert draw(visible_mask(3, 3)) == ["1 . .", "1 1 .", "1 1 1"]


def test_window_counts_the_query_itself():
    v = torch.randn(1, 1, 6, 8, dtype=torch.float64)
    out = sliding_gqa_attention(torch.randn_like(v), torch.randn_like(v), v, window=1, backend="reference")
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("T, S, window, group", [(7, 7, None, 1), (7, 7, 3, 2), (5, 9, 4, 3), (1, 9, 20, 2)])
def test_reference_is_sdpa_with_the_mask(T, S, window, group):
    q = torch.randn(2, 2 * group, T, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, S, 8, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), visible_mask(T, S, window), scale=0.3
    )
    out = sliding_gqa_attention(q, k, v, window, scale=0.3, backend="reference")
    torch.testing.assert_close(out, expected)


def test_a_sink_takes_probability_and_gives_no_value():
    """A sink is one more key whose score is its logit and whose value is zero."""
    q, k, v = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64)
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64)
    out, lse = reference.attention(q, k, v, scale=1.0, sinks=sinks)
    scores = (q @ k.mT).masked_fill(~visible_mask(4, 4), float("-inf"))
    scores = torch.cat([scores, sinks.view(1, 2, 1, 1).expand(1, 2, 4, 1)], -1)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1)[..., :-1] @ v)


def test_softcap_bounds_the_scores():
    q, k, v = torch.randn(3, 1, 1, 4, 8, dtype=torch.float64)
    _, lse = reference.attention(1e4 * q, k, v, scale=1.0, softcap=5.0)
    assert lse.max() <= 5.0 + torch.log(torch.tensor(4.0))
    capped = (5.0 * torch.tanh(q @ k.mT / 5.0)).masked_fill(~visible_mask(4, 4), float("-inf"))
    torch.testing.assert_close(reference.attention(q, k, v, scale=1.0, softcap=5.0)[1], capped.logsumexp(-1))


def test_scores_depend_on_relative_positions_only():
    q, k = torch.randn(2, 1, 1, 1, 16)
    cos, sin = rope_tables(64, 16)
    at = [reference.rotated(q, cos[i], sin[i]) @ reference.rotated(k, cos[i - 5], sin[i - 5]).mT for i in (5, 20, 63)]
    torch.testing.assert_close(at[0], at[1])
    torch.testing.assert_close(at[0], at[2])


HF_SCALINGS = {
    "none": (None, {"rope_type": "default"}),
    "linear": (("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        ("yarn", {"factor": 8.0, "original_max_position_embeddings": 64}),
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    ),
    "yarn, not truncated, own temperature": (
        ("yarn", {"factor": 32.0, "original_max_position_embeddings": 128, "beta_fast": 16, "truncate": False}
         | {"attention_factor": 1.2}),
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 128, "beta_fast": 16}
        | {"truncate": False, "attention_factor": 1.2},
    ),
    "llama3": (
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
         | {"original_max_position_embeddings": 64}),
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 64},
    ),
}  # fmt: skip


def hugging_face_tables(length, parameters, head_dim=32, trained=512):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    configuration = pytest.importorskip("transformers.models.llama.configuration_llama")
    config = configuration.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=trained,
        rope_parameters={"rope_theta": 10000.0, **parameters},
    )
    rotary = modeling.LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, length, 4 * head_dim), torch.arange(length)[None])
    return cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]


@pytest.mark.parametrize("case", HF_SCALINGS)
def test_tables_are_hugging_faces(case):
    scaling, parameters = HF_SCALINGS[case]
    ours = rope_tables(512, 32, scaling=scaling)
    for table, expected in zip(ours, hugging_face_tables(512, parameters), strict=True):
        torch.testing.assert_close(table, expected, atol=1e-6, rtol=0)


def test_ntk_tables_are_hugging_faces_dynamic_ones_at_a_fixed_stretch():
    """Hugging Face's "dynamic" stretches theta by factor * length / trained - (factor - 1): 3 here."""
    ours = rope_tables(256, 32, scaling=("ntk", 3.0))
    theirs = hugging_face_tables(256, {"rope_type": "dynamic", "factor": 2.0}, trained=128)
    for table, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(table, expected, atol=1e-6, rtol=0)


def test_rotation_is_hugging_faces():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 2, 3, 9, 16)
    cos, sin = rope_tables(9, 16)
    expected = modeling.apply_rotary_pos_emb(q, k, torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None])
    torch.testing.assert_close(reference.rotated(q, cos, sin), expected[0])
    torch.testing.assert_close(reference.rotated(k, cos, sin), expected[1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rotary_dim": 7}, "rotary_dim is 7, expected a positive even"),
        ({"rotary_dim": 8, "length": -1}, "length is -1"),
        ({"rotary_dim": 8, "scaling": "linear"}, "scaling is 'linear', expected None or a pair"),
        ({"rotary_dim": 8, "scaling": ("cubic", 2.0)}, "of kind 'cubic'"),
        ({"rotary_dim": 8, "scaling": ("llama3", {"factor": 2.0})}, "'llama3' lacks high_freq_factor, low_freq_factor"),
    ],
)
def test_bad_tables_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        rope_tables(**{"length": 4, **arguments})


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rotary_dim", [0, 4])
@pytest.mark.parametrize("T, window", [(7, None), (7, 3), (4, 5)])
def test_its_backward_is_what_autograd_makes_of_its_forward(T, window, rotary_dim, softcap, sinks):
    q, k, v = (torch.randn(2, H, L, 8, dtype=torch.float64) for H, L in ((4, T), (2, 7), (2, 7)))
    options = {"scale": 0.7, "softcap": softcap, "rope": rope_tables(7, rotary_dim) if rotary_dim else None}
    options["sinks"] = torch.randn(4, dtype=torch.float64) if sinks else None
    leaves = [x.requires_grad_() for x in (q, k, v, options["sinks"]) if x is not None]
    out, lse = reference.attention(q, k, v, window, **options)
    grads = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), leaves, grads)
    ours = reference.attend_backward(*grads, q, k, v, out, lse, window, **options)
    for a, b in zip([x for x in ours if x is not None], expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
