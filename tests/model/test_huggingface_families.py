"""Llama, Mistral, Qwen, OLMo, SmolLM and Gemma as our GPT, and back: logits, greedy text, bits, directories."""

import dataclasses

import pytest
import torch
from hugging import CHARACTERS, TEXT, same_weights
from mixes import FIELDS, both_paths, lively

from model import GPT, GPTConfig, from_pretrained, generate, save_pretrained
from model.huggingface import export_pretrained, from_huggingface, to_huggingface
from model.huggingface.families import FAMILIES
from model.huggingface.fields import config_from_theirs, config_to_theirs, family_of

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=40, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
WINDOW = {"sliding_window": 6}
SLIDING = {**WINDOW, "use_sliding_window": True}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 10}
S, L = "sliding_attention", "full_attention"


def rope(kind="default", theta=1e4, **options):
    return {"rope_type": kind, "rope_theta": theta, **options}


BY_LAYER = {"layer_types": [S, L, S, L], "rope_parameters": {L: rope("linear", 500.0, factor=2.0), S: rope(theta=50.0)}}
# model_type, what it needs beyond SIZES, window_pattern
VARIANTS = {
    "llama": ("llama", {"rope_parameters": rope("llama3", 5e3, **LLAMA3), "rms_norm_eps": 1e-3}, "S"),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}, "S"),
    "llama, tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}, "S"),
    "mistral": ("mistral", {**WINDOW, "head_dim": 6}, "S"),
    "qwen2": ("qwen2", {"rope_parameters": rope("yarn", **YARN)}, "S"),
    "qwen2, windows": ("qwen2", {**SLIDING, "max_window_layers": 1}, "LSSS"),
    "qwen3": ("qwen3", {"head_dim": 12}, "S"),
    "qwen3, windows": ("qwen3", {"head_dim": 8, **SLIDING, "layer_types": [S, S, S, L]}, "SSSL"),
    "olmo2": ("olmo2", {"num_hidden_layers": 2}, "S"),
    "olmo3": ("olmo3", {**WINDOW, "num_hidden_layers": 6}, "SSSL"),
    "olmo3, yarn": ("olmo3", {**WINDOW, "rope_parameters": {L: rope("yarn", **YARN), S: rope()}}, "SSSL"),
    "smollm3": ("smollm3", {}, "LLLN"),
    "smollm3, windows": (
        "smollm3", {**SLIDING, "layer_types": [S, L, S, L], "no_rope_layers": [1, 0, 1, 1]}, "SNSL"
    ),
    "gemma2": ("gemma2", {**WINDOW, "head_dim": 10, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0}, "SL"),
    "gemma2, no softcaps": (
        "gemma2", {**WINDOW, "head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None}, "SL"
    ),
    "gemma3": ("gemma3_text", {**WINDOW, "head_dim": 10, "query_pre_attn_scalar": 5, "num_hidden_layers": 7}, "SSSSSL"),
    "gemma3, by layer": (
        "gemma3_text",
        {**WINDOW, "head_dim": 6, **BY_LAYER, "final_logit_softcapping": 3.0},
        "SL",
    ),
    "gemma3, all slide": ("gemma3_text", {**WINDOW, "head_dim": 6, **BY_LAYER, "layer_types": [S] * 4}, "S"),
    "gemma3, no window": ("gemma3_text", {"head_dim": 6, "sliding_window": 40, "layer_types": [L] * 4}, "S"),
}  # fmt: skip
every_variant = pytest.mark.parametrize("name", VARIANTS)


def theirs(name, **changes):
    """A random model of transformers on its eager attention; its norms and biases are random, too."""
    kind, options, _ = VARIANTS[name]
    model_class = getattr(transformers, FAMILIES[kind].model_class)
    options = {**SIZES, **options, **changes}
    return lively(model_class(model_class.config_class(**options, attn_implementation="eager")), scale=0.15).eval()


@every_variant
@both_paths
def test_logits_are_those_of_transformers(name, fused_kernels):
    model = theirs(name)
    gpt = from_huggingface(model, fused_kernels=fused_kernels)
    tokens = torch.randint(61, (2, 44))  # past the window and max_position_embeddings
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(gpt(tokens)[0], expected, atol=1e-4, rtol=0)
    assert expected.abs().max() > 1 and gpt.num_parameters() == model.num_parameters()
    assert gpt.config.window_pattern == VARIANTS[name][2]


@every_variant
def test_greedy_generation_is_the_same_token_for_token(name):
    model = theirs(name)
    prompt = torch.randint(61, (2, 4))
    everything = torch.ones_like(prompt)  # without it, token 0 is padding
    expected = model.generate(prompt, attention_mask=everything, max_new_tokens=20, do_sample=False)
    written = torch.stack(list(generate(from_huggingface(model), prompt, 20, greedy=True)), dim=1)
    assert torch.equal(torch.cat((prompt, written), dim=1), expected)


@every_variant
def test_a_round_trip_gives_the_same_bits(name):
    model = theirs(name)
    gpt = from_huggingface(model)
    back = to_huggingface(gpt)
    assert type(back) is type(model) and same_weights(back, model)
    for field in {*SIZES, *VARIANTS[name][1]} - {"pad_token_id", "rope_parameters", "max_window_layers"}:
        assert getattr(back.config, field) == getattr(model.config, field), field
    again = from_huggingface(back)
    assert again.config == gpt.config and same_weights(again, gpt)


@every_variant
def test_bf16_shards_and_our_own_directory_keep_the_bits(name, tmp_path):
    model = theirs(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    gpt = from_huggingface(tmp_path / "theirs")
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.bfloat16}
    assert same_weights(gpt, from_huggingface(model))
    save_pretrained(gpt, tmp_path / "ours")
    ours, _ = from_pretrained(tmp_path / "ours")
    assert ours.config == gpt.config and same_weights(ours, gpt)
    export_pretrained(ours, tmp_path / "back")
    assert same_weights(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back"), model)


MODERN = dict(FIELDS, n_layer=4, norm="rms", mlp="swiglu", bias=False, tie_weights=False)
OLMO = dict(MODERN, norm_position="after", qk_norm="all")
GEMMA = dict(MODERN, norm="rms1", norm_position="both", mlp="geglu", embedding_scale=32**0.5, tie_weights=True)
EXPORTS = {
    "nothing to rotate": ("gpt2", dict(FIELDS, window=None, n_kv_head=4, positions="learned", window_pattern="LN")),
    "no window": ("llama", dict(MODERN, window=None)),
    "biases": ("llama", dict(MODERN, window=None, bias=True, rope_scaling=("linear", 2.0))),
    "one window": ("mistral", dict(MODERN, head_dim=12)),
    "biases of q, k and v": ("qwen2", dict(MODERN, qkv_bias=True)),
    "qk_norm": ("qwen3", dict(MODERN, qk_norm=True, head_dim=6, window_pattern="LSS")),
    "norms after": ("olmo2", dict(OLMO, window=None)),
    "SSSL, norms after": ("olmo3", dict(OLMO, window_pattern="SSSL", rope_scaling=("ntk", 2.0))),
    "two rotations": ("olmo3", dict(OLMO, window_pattern="SL", local_rope_theta=50.0, rope_scaling=("yarn", YARN))),
    "one rotation, scaled": ("olmo3", dict(OLMO, window_pattern="SL", rope_scaling=("yarn", YARN))),
    "SSSL": ("smollm3", dict(MODERN, window_pattern="SSSL", attention_scale=8**-0.5)),
    "no rotation": ("smollm3", dict(MODERN, window_pattern="SN", bias=True)),
    "softcaps": ("gemma2", dict(GEMMA, attention_softcap=2, logit_softcap=3, attention_scale=5**-0.5)),
    "norms of heads": ("gemma3_text", dict(GEMMA, qk_norm=True, window_pattern="SSSL", local_rope_theta=50.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_a_gpt_becomes_the_first_family_that_can_say_it(name):
    model_type, fields = EXPORTS[name]
    gpt = lively(GPT(GPTConfig(**fields)), scale=0.15).eval()
    model = to_huggingface(gpt)
    assert model.config.model_type == model_type
    tokens = torch.randint(41, (2, 48))
    with torch.no_grad():
        expected = gpt(tokens)[0]
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(from_huggingface(model)(tokens)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["olmo3", "gemma3_text"])
def test_a_trained_pattern_is_written_by_transformers_from_a_directory(kind, tmp_path):
    fields = {"olmo3": OLMO, "gemma3_text": dict(GEMMA, qk_norm=True)}[kind]
    gpt = lively(GPT(GPTConfig(**{**fields, "window_pattern": "SSSL"})), scale=0.15).eval()
    export_pretrained(gpt, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.model_type == kind and model.config.layer_types == [S, S, S, L]
    prompt = torch.randint(1, 41, (1, 4))
    written = torch.stack(list(generate(gpt, prompt, 50, greedy=True)), dim=1)
    assert torch.equal(model.generate(prompt, max_new_tokens=50, do_sample=False)[:, 4:], written)


@pytest.mark.parametrize("name", EXPORTS)
def test_autotokenizer_reads_the_characters_of_every_family_but_qwen2(name, tmp_path):
    gpt = GPT(GPTConfig(**{**EXPORTS[name][1], "vocab_size": CHARACTERS.vocab_size}))
    reader = transformers.AutoTokenizer
    if EXPORTS[name][0] == "qwen2":
        with pytest.warns(UserWarning, match="AutoTokenizer reads every qwen2 directory as a Qwen2Tokenizer: if the"):
            export_pretrained(gpt, tmp_path, CHARACTERS)
        assert type(reader.from_pretrained(tmp_path)).__name__ == "Qwen2Tokenizer"
        reader = transformers.PreTrainedTokenizerFast
    else:
        export_pretrained(gpt, tmp_path, CHARACTERS)
    tokenizer = reader.from_pretrained(tmp_path)
    assert tokenizer(TEXT)["input_ids"] == CHARACTERS.encode(TEXT)
    assert tokenizer.decode(CHARACTERS.encode(TEXT)) == TEXT


# what the tests above would not notice if these models did not depend on it
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma2", {"embedding_scale": 1.0}),
        ("gemma2", {"attention_scale": None}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma3", {"local_rope_theta": None}),
        ("gemma3", {"window_pattern": "SL"}),
        ("olmo3, yarn", {"local_rope_theta": None}),
        ("smollm3", {"window_pattern": "L"}),
        ("llama", {"norm_epsilon": 1e-6}),
    ],
)
def test_a_field_that_is_missed_changes_the_logits(name, change):
    gpt = from_huggingface(theirs(name))
    other = GPT(dataclasses.replace(gpt.config, **change))
    other.load_state_dict(gpt.state_dict())
    tokens = torch.randint(61, (2, 44))
    with torch.no_grad():
        assert (other.eval()(tokens)[0] - gpt(tokens)[0]).abs().max() > 1e-3
    assert getattr(gpt.config, *change) != change[next(iter(change))]


OLDER = {
    "qwen2": [
        {"sliding_window": 9, "use_sliding_window": False, "max_window_layers": 2},
        {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3, "rope_theta": 1e6},
        {"use_sliding_window": True, "num_hidden_layers": 30},
    ],
    "qwen3": [{"head_dim": None, "rope_theta": 1e6}, {"rope_scaling": {"rope_type": "yarn", **YARN}}],
    "llama": [
        {"num_key_value_heads": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    ],
    "mistral": [{}, {"sliding_window": None}],
    "olmo3": [{}, {"rope_scaling": {"rope_type": "yarn", **YARN, "attention_factor": 1.2}, "rope_theta": 500000}],
    "smollm3": [
        {},
        {"no_rope_layer_interval": 3},
        {"num_hidden_layers": 6, "no_rope_layers": [1, 1, 0, 1, 1, 0], "use_sliding_window": False},
    ],
    "gemma2": [{}, {"num_hidden_layers": 5, "head_dim": 8, "query_pre_attn_scalar": 8, "hidden_act": "gelu"}],
    "gemma3_text": [
        {},
        {"rope_theta": 1e5, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"sliding_window": 512, "sliding_window_pattern": 2, "rope_scaling": None},
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", OLDER)
def test_a_config_of_transformers_4_means_what_transformers_5_reads_in_it(kind):
    """Its fields, and what is left out."""
    for fields in OLDER[kind]:
        values = {**SIZES, **fields, "model_type": kind}
        if values.get("head_dim", 0) is None:
            del values["head_dim"]
        read = transformers.AutoConfig.for_model(**values).to_dict()
        assert config_from_theirs(values) == config_from_theirs(read)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_config_leaves_out_is_as_in_transformers(kind):
    family = FAMILIES[kind]
    config = getattr(transformers, family.model_class).config_class()
    for name, value in {**{name: meanings[0] for name, meanings in family.fixed.items()}, **family.dropouts}.items():
        assert getattr(config, name) == value, name
    written = {"num_key_value_heads", "head_dim"}  # None becomes a number there
    for name in family.defaults.keys() - written - {"rope_theta", "rope_local_base_freq", "sliding_window"}:
        assert getattr(config, name) == family.defaults[name], name


@pytest.mark.parametrize("name", ["gemma3_text", "olmo3", "qwen3"])
def test_an_exported_config_means_the_same_to_transformers_4(name):
    fields = {
        "gemma3_text": dict(GEMMA, qk_norm=True, local_rope_theta=50.0, rope_theta=500.0, rope_scaling=("linear", 2.0)),
        "olmo3": dict(OLMO, rope_theta=500.0, rope_scaling=("yarn", YARN), local_rope_theta=500.0),
        "qwen3": dict(MODERN, qk_norm=True, rope_theta=500.0, rope_scaling=("yarn", YARN)),
    }[name]
    config = GPTConfig(**{**fields, "window_pattern": "LSSS"})
    values = config_to_theirs(config)
    assert values["model_type"] == name and config_from_theirs(values) == config
    if name == "qwen3":  # before layer_types
        assert values["max_window_layers"] == 1
        del values["layer_types"]
    del values["rope_parameters"]
    assert config_from_theirs(values) == config


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu' can be converted"),
        ("llama", {"attention_bias": True}, "attention_bias is True and mlp_bias False, and only equal ones"),
        ("llama", {"rope_parameters": rope("dynamic", factor=2.0)}, "rope_type is 'dynamic', and only default, linear"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "its weights are quantized"),
        ("llama", {"hidden_size": ...}, "it lacks hidden_size"),
        ("mistral", {"num_key_value_heads": ...}, "it lacks num_key_value_heads"),
        ("qwen2", {"head_dim": 10}, "head_dim is 10, and only 8 can be converted for a width of 32 and 4 heads"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True, and only False"),
        ("olmo3", {"layer_types": [S, L, "chunked_attention", L]}, "layer_types is .*chunked_attention.* and only"),
        ("olmo3", {"layer_types": [S, L]}, "and only 4 of sliding_attention and full_attention can be converted"),
        ("olmo3", {"sliding_window": None}, "layer_types has sliding_attention, but there is no sliding_window"),
        ("olmo3", {"rope_parameters": {L: rope(), S: rope("linear", factor=2.0)}}, "of sliding_attention are scaled"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 6}, "no_rope_layers: layer 3 has a window and no"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True, and only None"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, and only None"),
        ("gemma3", {}, "model_type is 'gemma3', and only gpt2, .* and gemma3_text can be converted"),
    ],
)  # fmt: skip
def test_a_model_that_we_do_not_support_is_refused_with_the_field(kind, change, message):
    values = {**SIZES, "model_type": kind, **change}
    with pytest.raises(ValueError, match=message):
        config_from_theirs({name: value for name, value in values.items() if value is not ...})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(MODERN, mlp="relu2"), "MistralForCausalLM is the nearest, and cannot have mlp 'relu2'$"),
        (dict(MODERN, window=None, qkv_bias=True, qk_norm=True), "Qwen2.* is the nearest, and .* have qk_norm True$"),
        (dict(OLMO, window_pattern="SN"), "Olmo3.* is the nearest, and cannot have window_pattern 'SN'; set_w"),
        (dict(MODERN, norm_position="both"), "MistralForCausalLM is the nearest, .* have norm_position 'both'$"),
        (dict(MODERN, window_pattern="SL", local_rope_theta=50.0), "SmolLM3.* cannot have local_rope_theta 50.0$"),
        (dict(MODERN, attention_scale=0.3), "MistralForCausalLM is the nearest, and cannot have attention_scale 0.3$"),
        (dict(GEMMA, attention_scale=0.3), "Gemma2ForCausalLM is the nearest, and cannot have attention_scale 0.3$"),
        (dict(GEMMA, embedding_scale=2.0), "Gemma2ForCausalLM is the nearest, and cannot have embedding_scale 2.0$"),
        (dict(GEMMA, n_head=5, n_kv_head=5, head_dim=8), "Gemma2ForCausalLM is the nearest, and cannot have n_head 5$"),
    ],
)  # fmt: skip
def test_a_config_that_no_family_can_say_is_refused_with_what_the_nearest_lacks(fields, message):
    with pytest.raises(ValueError, match=rf"transformers has no class for this model: .*{message}"):
        family_of(GPTConfig(**fields))


def test_the_dropout_of_attention_becomes_ours_with_a_warning():
    assert config_to_theirs(GPTConfig(**MODERN, dropout=0.1))["attention_dropout"] == 0.1
    with pytest.warns(UserWarning, match="attention_dropout 0.1 becomes that of embeddings and branches"):
        assert from_huggingface(theirs("llama", attention_dropout=0.1)).config.dropout == 0.1
