import dataclasses

import pytest

from model import ARCHITECTURES, GPT, GPTConfig, flops_per_token
from model.config import MODERN

FIELDS = dict(vocab_size=65, context_length=25, window=10, n_layer=4, n_head=4, n_kv_head=2, d_model=128)


def test_the_defaults_make_the_modified_architecture_with_as_many_kv_heads_as_heads():
    config = GPTConfig(vocab_size=65, context_length=25, n_layer=1, n_head=4, d_model=32)
    assert (config.architecture, config.n_kv_head, config.window, config.tie_weights) == ("rope", 4, None, True)


def test_the_mlp_is_four_times_as_wide_as_the_residual_stream_unless_stated():
    assert GPTConfig(**FIELDS).mlp_width == 512
    assert GPTConfig(**FIELDS, mlp_width=512) == GPTConfig(**FIELDS)
    model = GPT(GPTConfig(**FIELDS, mlp_width=96))
    assert model.blocks[0].mlp.fc.weight.shape == (96, 128)
    narrower = sum(parameter.numel() for parameter in GPT(GPTConfig(**FIELDS)).parameters()) - model.num_parameters()
    assert narrower == 4 * (512 - 96) * (2 * 128 + 1)
    assert flops_per_token(GPTConfig(**FIELDS)) - flops_per_token(model.config) == 6 * 4 * 2 * 128 * (512 - 96)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_set_of_fields_makes_every_step_and_the_config_knows_its_name(name):
    config = GPTConfig.for_architecture(name, **FIELDS)
    assert config.architecture == name
    assert config.positions == ("learned" if name == "original" else "rope")
    assert config.window == (10 if "window" in name or name == "modern" else None)
    assert config.n_kv_head == (2 if "gqa" in name or name == "modern" else 4)
    assert all(getattr(config, field) == value for field, value in MODERN.items()) == (name == "modern")


def test_another_combination_is_named_by_its_parts():
    assert GPTConfig(**{**FIELDS, "window": None}).architecture == "rope-gqa"
    assert GPTConfig(**{**FIELDS, "positions": "learned", "n_kv_head": 4}).architecture == "original-window"
    assert GPTConfig(**{**FIELDS, "window_pattern": "L"}).architecture == "rope-gqa"


def test_the_pattern_is_repeated_over_the_layers():
    config = GPTConfig(**{**FIELDS, "n_layer": 6, "window_pattern": "SSL"})
    assert [config.layer_window(i) for i in range(6)] == [10, 10, None, 10, 10, None]


def test_a_config_cannot_be_changed_and_equal_fields_are_equal_configs():
    config = GPTConfig(**FIELDS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 5
    assert config == GPTConfig(**FIELDS)
    assert (
        config.differences(dataclasses.replace(config, n_layer=6, window=None)) == "n_layer 4 and 6, window 10 and None"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_head": 3}, r"n_kv_head=3 does not divide n_head=4 .* take one of 1, 2, 4"),
        ({"n_head": 3, "n_kv_head": 1}, "n_head=3 does not divide d_model=128"),
        ({"mlp_width": 0}, "mlp_width=0 is not a whole number of at least 1"),
        ({"mlp_width": 1.5}, "mlp_width=1.5 is not a whole number"),
        ({"window": 0}, "window=0 is not a whole number of at least 1"),
        ({"window": 2.5}, "window=2.5 is not a whole number"),
        ({"window": True}, "window=True is not a whole number"),
        ({"vocab_size": 0}, "vocab_size=0 is not"),
        ({"n_layer": "4"}, "n_layer='4' is not"),
        ({"window_pattern": ""}, "window_pattern='' is not made of the letters S"),
        ({"window_pattern": "SSx"}, "window_pattern='SSx' is not made of the letters S"),
        ({"positions": "sinusoidal"}, "positions='sinusoidal' is neither"),
        ({"d_model": 12}, "3 elements of a head of 3 cannot be rotated"),
        ({"rotary_dim": 34}, "34 elements of a head of 32 cannot be rotated"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is no pair"),
        ({"rope_theta": 0}, "rope_theta=0 is not positive"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability below 1"),
        ({"norm_epsilon": 0.0}, "norm_epsilon=0.0 is not positive"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        GPTConfig(**{**FIELDS, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "named", "message"),
    [
        (
            (65, 25),
            {},
            r"^GPTConfig: give names: vocab_size=\.\.\., context_length=\.\.\. \(others' block_size\), \.\.\.$",
        ),
        ((65, 25), {"n_embd": 8}, "^GPTConfig: give names: .*; n_embd is d_model here$"),
        (
            (),
            {"vocab_size": 65, "block_size": 25, "n_embd": 8},
            "block_size is context_length here; n_embd is d_model here$",
        ),
        ((), {"vocab": 65, "resid_pdrop": 0.1}, "vocab is vocab_size here; resid_pdrop is dropout here$"),
        ((), {"n_layers": 2}, "unexpected keyword argument 'n_layers'"),
    ],
)
def test_other_libraries_words_are_answered_with_ours(values, named, message):
    with pytest.raises(TypeError, match=message) as error:
        GPTConfig(*values, **named)
    assert "\n" not in str(error.value)


def test_a_step_without_its_own_field_is_refused():
    with pytest.raises(ValueError, match="'rope-window' needs a window"):
        GPTConfig.for_architecture("rope-window", **{**FIELDS, "window": None})
    with pytest.raises(ValueError, match="'rope-window-gqa' needs n_kv_head"):
        GPTConfig.for_architecture("rope-window-gqa", **{**FIELDS, "n_kv_head": None})
    with pytest.raises(ValueError, match="architecture 'gpt3' is unknown: take one of original, rope,"):
        GPTConfig.for_architecture("gpt3", **FIELDS)
