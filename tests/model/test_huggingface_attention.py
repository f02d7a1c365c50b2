"""Hugging Face's models give on our attention what they give on their own `eager`, whatever the mask."""

import pytest
import torch
from hugging import (
    BACKENDS,
    LENGTH,
    WINDOW,
    every_family,
    family,
    generated,
    padding,
    refused,
    results,
    same,
    tokens,
)

from model.huggingface import attention as ours
from model.huggingface import register_attention

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True, params=BACKENDS)
def registered(request):
    register_attention(backend=request.param)


@every_family
def test_a_plain_prompt_runs_on_the_kernels_and_gives_eagers_logits_and_gradients(name, calls):
    model = family(name)
    same(model, tokens())
    assert calls == ["sliding_gqa_attention"] * model.config.num_hidden_layers
    calls.clear()
    same(model, tokens(), attention_mask=padding())  # all ones: nothing is padded
    assert set(calls) == {"sliding_gqa_attention"}


@every_family
def test_the_users_own_mask_is_applied_unchanged(name):
    model = family(name)
    seen = torch.rand(2, 1, LENGTH, LENGTH) < 0.5
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    numbers = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    inputs = tokens()
    model.set_attn_implementation("eager")
    expected = model(inputs, attention_mask=numbers).logits
    model.set_attn_implementation("sliding_gqa")
    for mask in (numbers, seen):
        torch.testing.assert_close(model(inputs, attention_mask=mask).logits, expected, atol=2e-4, rtol=0)


@every_family
@pytest.mark.parametrize("left", [0, 6])
def test_generation_gives_the_tokens_of_eager(name, left, calls):
    model, inputs, mask = family(name), tokens(), padding(left=left)
    caches = {
        "sliding": lambda: {},
        "full": lambda: {"past_key_values": transformers.DynamicCache()},  # keeps what has left the window
        "static": lambda: {"cache_implementation": "static"},
        "none": lambda: {"use_cache": False},
    }
    expected = generated(model, "eager", inputs, attention_mask=mask)
    for cache, options in caches.items():
        calls.clear()
        assert torch.equal(generated(model, "sliding_gqa", inputs, attention_mask=mask, **options()), expected), cache
        layers = model.config.num_hidden_layers
        prompt, steps = calls[:layers], calls[layers:]
        assert set(prompt) == {"sliding_gqa_attention"}
        # single tokens into a static cache have a mask of one row, whose shape stays
        assert set(steps) == {"_masked_attention" if cache == "static" else "sliding_gqa_attention"}


@every_family
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(name, calls):
    model, inputs = family(name), tokens()
    model.set_attn_implementation("sliding_gqa")
    whole = model(inputs).logits
    cache = transformers.DynamicCache(config=model.config)
    chunks = [model(chunk, past_key_values=cache).logits for chunk in inputs.split((9, 1, 8, 7), dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, atol=2e-4, rtol=0)
    assert set(calls) == {"sliding_gqa_attention"}


@every_family
def test_these_comparisons_detect_a_window_that_is_off_by_one(name):
    inputs, model = tokens(), family(name)
    logits = model(inputs).logits
    for window in (WINDOW - 1, WINDOW + 1):
        other = family(name, sliding_window=window)
        other.load_state_dict(model.state_dict())
        assert (other(inputs).logits - logits).abs().max() > 2e-3


def test_a_model_that_does_not_pass_its_window_has_it_read_from_its_config(calls):
    """Qwen2-MoE's attention is not told the window of its layers."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    model = family(
        (Qwen2MoeForCausalLM, Qwen2MoeConfig),
        dict(use_sliding_window=True, max_window_layers=1, num_experts=2, moe_intermediate_size=32,
             num_experts_per_tok=1, shared_expert_intermediate_size=32),
    )  # fmt: skip
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    same(model, tokens())
    assert set(calls) == {"sliding_gqa_attention"}


def test_a_model_without_a_window_runs_on_the_kernels(calls):
    from transformers import LlamaConfig, LlamaForCausalLM

    same(family((LlamaForCausalLM, LlamaConfig), {}, sliding_window=None), tokens())
    assert set(calls) == {"sliding_gqa_attention"}


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_compiled_model_gives_the_same_logits(name):
    """While a graph is captured neither the padding nor the positions can be looked at."""
    model, inputs, mask = family(name), tokens(), padding(left=6)
    positions = torch.arange(LENGTH).remainder(10)[None].expand(2, -1)
    model.set_attn_implementation("sliding_gqa")
    torch._dynamo.reset()  # other tests compile the same functions, and recompilations are counted
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs, use_cache=False).logits, model(inputs, use_cache=False).logits)
        found = compiled(inputs, attention_mask=mask, use_cache=False).logits
        expected = model(inputs, attention_mask=mask, use_cache=False).logits
        packed = [module(inputs, position_ids=positions, use_cache=False).logits for module in (compiled, model)]
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
    torch.testing.assert_close(*packed)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_attention_dropout_runs_in_plain_pytorch_and_warns(name, calls):
    model = family(name, attention_dropout=0.9)
    model.set_attn_implementation("sliding_gqa")
    inputs = tokens()
    evaluated = model(inputs).logits
    assert set(calls) == {"sliding_gqa_attention"}
    calls.clear()
    with pytest.warns(UserWarning, match="attention_dropout is 0.9 while training: attention runs in plain PyTorch"):
        dropped = model.train()(inputs).logits
    assert set(calls) == {"_masked_attention"}
    assert (dropped - evaluated).abs().max() > 0.05
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 1e-9  # still that path, and nothing is dropped
    with pytest.warns(UserWarning, match="plain PyTorch"):
        torch.testing.assert_close(model(inputs).logits, evaluated, atol=2e-4, rtol=0)


def test_unsupported_arguments_are_refused():
    refused("output_attentions: the weights are never computed; load with", family("mistral"), output_attentions=True)
    with pytest.raises(ValueError, match="continuous batching is not supported"):
        ours._attend(torch.nn.Identity(), *[torch.zeros(1, 1, 2, 8)] * 3, None, cache=object())
    with pytest.raises(ValueError, match="Identity adds a position bias"):
        ours._attend(torch.nn.Identity(), *[torch.zeros(1, 1, 2, 8)] * 3, None, position_bias=torch.zeros(1))


@pytest.mark.parametrize("name", ["flash_sliding", "org/repository", "sdpa", "eager", ""])
def test_a_name_that_transformers_takes_for_another_is_refused(name):
    with pytest.raises(ValueError, match="which transformers takes for one of its own"):
        register_attention(name)


def test_name_and_backend_can_be_chosen(calls):
    assert register_attention("by_reference", backend="reference") == "by_reference"
    model, inputs = family("mistral"), tokens()
    expected, _ = results(model, "eager", inputs)
    torch.testing.assert_close(results(model, "by_reference", inputs)[0], expected, atol=2e-4, rtol=0)
    with pytest.raises(ValueError, match="backend is 'bandit', expected one of"):
        register_attention("mistyped", backend="bandit")


def test_an_older_transformers_is_an_import_error(monkeypatch):
    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", lambda cache_position: None)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5.4'"):
        register_attention()
