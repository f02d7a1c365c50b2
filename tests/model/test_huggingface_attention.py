"""Hugging Face's models give on our attention what they give on their own `eager`, whatever the mask."""

import pytest
import torch
from hugging import FAMILIES, WINDOW, family

from model.huggingface import attention as ours
from model.huggingface import register_attention

transformers = pytest.importorskip("transformers")

LENGTH = 25
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def registered():
    register_attention()


@pytest.fixture
def calls(monkeypatch):
    """How often the kernels and the masked path ran since the last clear()."""
    counted = []
    for name in ("sliding_gqa_attention", "_masked_attention"):
        function = getattr(ours, name)

        def count(*args, name=name, function=function, **kwargs):
            counted.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(ours, name, count)
    return counted


def tokens(rows=2, length=LENGTH):
    return torch.randint(2, 97, (rows, length))


def padding(left=0, right=0):
    """(2, LENGTH), the second row with that much padding."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :left] = 0
    mask[1, LENGTH - right :] = 0
    return mask


def results(model, implementation, inputs, counts=None, **options):
    """(logits of what counts, {parameter: gradient of a loss over them})."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(inputs, use_cache=False, **options).logits
    logits = logits if counts is None else logits[counts]
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(model, inputs, counts=None, **options):
    """Assert that logits and gradients are eager's, to 2e-4."""
    expected, expected_grads = results(model, "eager", inputs, counts, **options)
    found, found_grads = results(model, "sliding_gqa", inputs, counts, **options)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert found_grads.keys() == expected_grads.keys()
    for name, gradient in expected_grads.items():
        torch.testing.assert_close(found_grads[name], gradient, atol=2e-4 * gradient.abs().max().item(), rtol=0)


@every_family
def test_a_plain_prompt_runs_on_the_kernels_and_gives_eagers_logits_and_gradients(name, calls):
    model = family(name)
    same(model, tokens())
    assert calls == ["sliding_gqa_attention"] * model.config.num_hidden_layers
    calls.clear()
    same(model, tokens(), attention_mask=padding())  # all ones: nothing is padded
    assert set(calls) == {"sliding_gqa_attention"}


@every_family
def test_padding_on_either_side_is_never_seen(name, calls):
    model = family(name)
    for mask in (padding(left=6), padding(right=6), padding(left=WINDOW + 9)):
        same(model, tokens(), counts=mask.bool(), attention_mask=mask)
    assert set(calls) == {"_masked_attention"}


DOCUMENTS = (10, 4, 11)
POSITIONS = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt_oss"])
def test_packed_documents_do_not_see_each_other(name, calls):
    model, packed = family(name), tokens(rows=1)
    same(model, packed, position_ids=POSITIONS)
    assert set(calls) == {"_masked_attention"}
    model.set_attn_implementation("sliding_gqa")
    apart = torch.cat([model(document).logits for document in packed.split(DOCUMENTS, dim=1)], dim=1)
    together = model(packed, position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(together, apart, atol=2e-4, rtol=0)


def test_packed_documents_that_transformers_would_mix_are_refused():
    """gpt-oss makes no mask of the positions at all, the others none with a cache or with a mask for padding."""
    message = "documents are packed, but GptOssAttention got no mask that keeps them apart: give position_ids from 0"
    refused(message, family("gpt_oss"), tokens(rows=1), position_ids=POSITIONS)
    message = "documents are packed, but MistralAttention got no mask"
    refused(message, family("mistral"), tokens(rows=1), position_ids=POSITIONS, use_cache=True)
    refused(message, family("mistral"), tokens(), position_ids=POSITIONS, attention_mask=padding())
    refused(message, family("mistral"), cu_seq_lens_q=torch.tensor([0, 10, LENGTH], dtype=torch.int32))


def test_gpt_oss_separates_documents_by_a_mask(calls):
    model, packed = family("gpt_oss"), tokens(rows=1)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(DOCUMENTS))
    position = torch.arange(LENGTH)
    full = (document[:, None] == document) & (position[:, None] >= position)
    sliding = full & (position[:, None] < position + WINDOW)
    masks = {"full_attention": full[None, None], "sliding_attention": sliding[None, None]}
    model.set_attn_implementation("sliding_gqa")
    apart = torch.cat([model(part).logits for part in packed.split(DOCUMENTS, dim=1)], dim=1)
    together = model(packed, position_ids=POSITIONS, attention_mask=masks).logits
    torch.testing.assert_close(together, apart, atol=2e-4, rtol=0)


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


def generated(model, implementation, inputs, **options):
    model.set_attn_implementation(implementation)
    return model.generate(inputs, max_new_tokens=WINDOW + 5, do_sample=False, **options)


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
        if cache == "sliding" and not left:
            assert set(calls) == {"sliding_gqa_attention"}


def test_after_padding_has_left_the_window_the_kernels_run(calls):
    model = family("mistral")
    generated(model, "sliding_gqa", tokens(), attention_mask=padding(left=LENGTH - WINDOW - 2))
    layers = model.config.num_hidden_layers
    assert calls[:layers] == ["_masked_attention"] * layers  # the prompt
    assert set(calls[layers:]) == {"sliding_gqa_attention"}


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


def test_a_model_with_its_window_only_in_the_mask_gets_that_mask(calls):
    """Qwen2-MoE's attention is not told the window of its layers."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    model = family(
        (Qwen2MoeForCausalLM, Qwen2MoeConfig),
        dict(use_sliding_window=True, max_window_layers=1, num_experts=2, moe_intermediate_size=32,
             num_experts_per_tok=1, shared_expert_intermediate_size=32),
    )  # fmt: skip
    same(model, tokens())
    assert set(calls) == {"_masked_attention"}


def test_a_model_without_a_window_runs_on_the_kernels(calls):
    from transformers import LlamaConfig, LlamaForCausalLM

    same(family((LlamaForCausalLM, LlamaConfig), {}, sliding_window=None), tokens())
    assert set(calls) == {"sliding_gqa_attention"}


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_compiled_model_gives_the_same_logits(name):
    """While a graph is captured the padding cannot be looked at: then there is always a mask."""
    model, inputs, mask = family(name), tokens(), padding(left=6)
    model.set_attn_implementation("sliding_gqa")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs, use_cache=False).logits, model(inputs, use_cache=False).logits)
        found = compiled(inputs, attention_mask=mask, use_cache=False).logits
        expected = model(inputs, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


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


def refused(message, model, inputs=None, **options):
    model.set_attn_implementation("sliding_gqa")
    with pytest.raises(ValueError, match=message) as error:
        model(tokens() if inputs is None else inputs, **{"use_cache": False, **options})
    assert "\n" not in str(error.value)


def test_unsupported_arguments_are_refused():
    refused("output_attentions: the weights are never computed; load with", family("mistral"), output_attentions=True)
    refused("Gemma3Attention looks at later tokens too", family("gemma3", use_bidirectional_attention=True))
    with pytest.raises(ValueError, match="continuous batching is not supported"):
        ours._attend(torch.nn.Identity(), *[torch.zeros(1, 1, 2, 8)] * 3, None, cache=object())
    with pytest.raises(ValueError, match="Identity adds a position bias"):
        ours._attend(torch.nn.Identity(), *[torch.zeros(1, 1, 2, 8)] * 3, None, position_bias=torch.zeros(1))


def test_documents_separated_by_positions_may_also_be_given_as_lengths():
    lengths = torch.tensor([0, 10, 14, LENGTH], dtype=torch.int32)
    same(family("mistral"), tokens(rows=1), position_ids=POSITIONS, cu_seq_lens_q=lengths)


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
