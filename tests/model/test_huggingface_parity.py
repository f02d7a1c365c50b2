"""GPT-2 and StarCoder2 of transformers and our GPT agree: logits, generated tokens, every bit of the weights."""

import pytest
import torch
from hugging import same_weights
from mixes import FIELDS, MIXES, both_paths, lively

from model import GPT, GPTConfig, generate
from model.huggingface import from_huggingface, to_huggingface

transformers = pytest.importorskip("transformers")

# every size odd, or a multiple of an odd number
SIZES = {
    "gpt2": dict(vocab_size=97, n_positions=33, n_embd=60, n_layer=3, n_head=5, attn_pdrop=0, embd_pdrop=0,
                 resid_pdrop=0),
    "starcoder2": dict(vocab_size=97, hidden_size=60, intermediate_size=240, num_hidden_layers=3,
                       num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=40, sliding_window=7),
}  # fmt: skip
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def rope(kind, **options):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **options}}


VARIANTS = {
    "gpt2": ("gpt2", {}),
    "gpt2, a narrow MLP": ("gpt2", {"n_inner": 100}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2, an MLP three times the width": ("starcoder2", {"intermediate_size": 180}),
    "starcoder2, untied": ("starcoder2", {"tie_word_embeddings": False, "norm_epsilon": 1e-3}),
    "starcoder2, no window": ("starcoder2", {"sliding_window": None}),
    "starcoder2, a KV head each": ("starcoder2", {"num_key_value_heads": 6}),
    "starcoder2, one KV head": ("starcoder2", {"num_key_value_heads": 1}),
    "starcoder2, theta": ("starcoder2", rope("default", rope_theta=500.0)),
    "starcoder2, linear": ("starcoder2", rope("linear", factor=2.0)),
    "starcoder2, yarn": ("starcoder2", rope("yarn", factor=4.0, original_max_position_embeddings=10)),
    "starcoder2, llama3": ("starcoder2", rope("llama3", **LLAMA3)),
}  # fmt: skip
every_variant = pytest.mark.parametrize("name", VARIANTS)


def theirs(name, dtype=torch.float32, **changes):
    """A random model of transformers, on its eager attention."""
    kind, options = VARIANTS[name]
    model_class = {"gpt2": transformers.GPT2LMHeadModel, "starcoder2": transformers.Starcoder2ForCausalLM}[kind]
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = model_class.config_class(**{**SIZES[kind], **tokens, **options, **changes}, attn_implementation="eager")
    return lively(model_class(config), scale=0.1).to(dtype).eval()


@every_variant
@both_paths
def test_logits_are_those_of_transformers(name, fused_kernels):
    model = theirs(name)
    gpt = from_huggingface(model, fused_kernels=fused_kernels)
    tokens = torch.randint(97, (2, 33))
    with torch.no_grad():
        torch.testing.assert_close(gpt(tokens)[0], model(tokens).logits, atol=1e-4, rtol=0)
    assert gpt.num_parameters() == model.num_parameters()
    assert gpt.fused_kernels == fused_kernels and not gpt.training


@every_variant
def test_greedy_generation_is_the_same_token_for_token(name):
    model = theirs(name)
    prompt, length = torch.randint(97, (2, 5)), 33 if name.startswith("gpt2") else 60  # past the window and the context
    # without this mask transformers takes tokens that are pad_token_id for padding
    everything = torch.ones_like(prompt)
    expected = model.generate(prompt, attention_mask=everything, max_new_tokens=length - 5, do_sample=False)
    written = torch.stack(list(generate(from_huggingface(model), prompt, length - 5, greedy=True)), dim=1)
    assert torch.equal(torch.cat((prompt, written), dim=1), expected)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_gives_the_same_bits(name, dtype):
    model = theirs(name, dtype)
    gpt = from_huggingface(model)
    back = to_huggingface(gpt)
    assert type(back) is type(model) and same_weights(back, model)
    assert {parameter.dtype for parameter in (*gpt.parameters(), *back.parameters())} == {dtype}
    kind, options = VARIANTS[name]
    for field in {*SIZES[kind], "tie_word_embeddings"} | options.keys() - {"rope_parameters"}:
        assert getattr(back.config, field) == getattr(model.config, field), field


def test_a_converted_model_shares_no_memory():
    model = theirs("gpt2")
    gpt = from_huggingface(model)
    back = to_huggingface(gpt)
    with torch.no_grad():
        gpt.wte.weight.zero_()
        gpt.blocks[0].attn.proj.weight.zero_()
    for other in (model, back):
        assert all(parameter.abs().sum() > 0 for parameter in other.parameters())


EXPORTED = ("original", "rope", "rope-window", "rope-window-gqa", "multi-query", "untied")


@pytest.mark.parametrize("name", EXPORTED)
def test_ours_becomes_theirs_and_comes_back(name):
    gpt = lively(GPT(MIXES[name])).train()
    state = torch.get_rng_state()
    model = to_huggingface(gpt)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    back = from_huggingface(model)
    assert back.config == gpt.config and same_weights(back, gpt)
    tokens = torch.randint(41, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens).logits, gpt(tokens)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"window": None, "window_pattern": "SL"},  # sees everything in every layer, however it is written
        {"window_pattern": "SSSL"},  # which three layers do not reach
        {"rope_scaling": ("ntk", 2.0)},
        {"rope_scaling": ("llama3", LLAMA3), "rope_theta": 5e5, "norm_epsilon": 1e-6},
        {"dropout": 0.1},
        {"mlp_width": 100},
    ],
)
def test_every_config_that_they_support_is_exported(change):
    gpt = lively(GPT(GPTConfig(**{**FIELDS, **change}))).eval()
    model = to_huggingface(gpt)
    tokens = torch.randint(41, (2, 60))  # past the context length, where scaled positions differ most
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, gpt(tokens)[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(from_huggingface(model)(tokens)[0], gpt(tokens)[0], atol=1e-5, rtol=0)
    assert model.config.attention_dropout == model.config.residual_dropout == gpt.config.dropout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pattern", "Starcoder2ForCausalLM is the nearest, and cannot have window_pattern 'SSL'; set_window"),
        ("partial rotation", "Starcoder2ForCausalLM is the nearest, and cannot have rotary_dim 4"),
        ("learned window", "Starcoder2ForCausalLM is the nearest, and cannot have positions 'learned'"),
    ],
)
def test_a_config_that_they_have_no_class_for_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        to_huggingface(GPT(MIXES[name]))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu', and only 'gelu_new' can be"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu', and only"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, and only False"),
        ("starcoder2", {"use_bias": False}, "use_bias is False, and only True"),
        ("starcoder2", {"head_dim": 20}, "head_dim is 20, and only 10 can be converted for a width of 60 and 6 heads"),
        ("starcoder2", rope("dynamic", factor=2.0), "rope_type is 'dynamic', and only default, linear, yarn and"),
    ],
)  # fmt: skip
def test_a_model_that_we_do_not_support_is_refused_with_the_field(kind, change, message):
    with pytest.raises(ValueError, match=message):
        from_huggingface(theirs(kind, **change))


def test_another_architecture_is_named_with_the_list_of_those_that_can_be_converted():
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=1))
    message = (
        "BloomForCausalLM cannot become a GPT: model_type is 'bloom', and only gpt2, starcoder2, llama, mistral, "
        "qwen2, qwen3, olmo2, olmo3, smollm3, gemma2 and gemma3_text can be converted"
    )
    with pytest.raises(ValueError, match=message):
        from_huggingface(bloom)
    with pytest.raises(ValueError, match="Linear is neither a model of transformers nor a directory"):
        from_huggingface(torch.nn.Linear(1, 1))


def test_a_model_with_another_head_is_refused_with_the_weights_that_are_too_many():
    config = transformers.GPT2Config(**SIZES["gpt2"], num_labels=2)
    with pytest.raises(ValueError, match=r"GPT2ForSequenceClassification does not fit .*: score.weight is not of this"):
        from_huggingface(transformers.GPT2ForSequenceClassification(config))


@pytest.mark.parametrize("name", ["gpt2", "starcoder2"])
def test_a_model_without_a_head_is_one_whose_head_is_tied(name):
    model = theirs(name)
    body = from_huggingface(model.base_model)
    assert same_weights(body, from_huggingface(model))
    with pytest.raises(ValueError, match=r"does not fit config.json: lm_head.weight is missing$"):
        from_huggingface(theirs(name, tie_word_embeddings=False).base_model)


def test_different_dropouts_become_the_largest_with_a_warning():
    model = theirs("gpt2", attn_pdrop=0.3, resid_pdrop=0.2)
    with pytest.warns(UserWarning, match=r"takes the largest of resid_pdrop 0.2, embd_pdrop 0, attn_pdrop 0.3"):
        assert from_huggingface(model).config.dropout == 0.3
