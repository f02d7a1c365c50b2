"""The blocks of today's models: each field is its formula written out, and every path computes it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from mixes import FIELDS, both_paths, lively

from model import GPT, GPTConfig, KVCache, generate
from model.blocks import relu2, swiglu
from model.decoding import CPUStep, why_not_cpu_step
from model.gpt import flops_per_token
from model.huggingface import to_huggingface
from train.optim import make_optimizer

BLOCKS = {
    "RMSNorm": {"norm": "rms"},
    "SwiGLU": {"mlp": "swiglu", "mlp_width": 40},
    "ReLU squared": {"mlp": "relu2"},
    "QK-norm": {"qk_norm": True},
    "no bias": {"bias": False},
    "all": {"norm": "rms", "mlp": "swiglu", "mlp_width": 40, "qk_norm": True, "bias": False},
    "learned positions": {"norm": "rms", "qk_norm": True, "positions": "learned"},
    "Gemma": {
        "norm": "rms1", "norm_position": "both", "mlp": "geglu", "qk_norm": True, "bias": False, "head_dim": 12,
        "attention_scale": 0.4, "attention_softcap": 1.5, "logit_softcap": 2.0, "embedding_scale": 3.0,
        "local_rope_theta": 300.0, "window_pattern": "SL",
    },
    "OLMo": {
        "norm": "rms", "norm_position": "after", "mlp": "swiglu", "qk_norm": "all", "bias": False, "qkv_bias": True,
        "rope_scaling": ("linear", 4.0), "local_rope_theta": 1e4, "window_pattern": "SSL",
    },
    "NoPE": {"window_pattern": "SN", "qk_norm": True},
}  # fmt: skip
every_block = pytest.mark.parametrize("fields", BLOCKS.values(), ids=BLOCKS)


def make(fields, **options):
    torch.manual_seed(0)
    return lively(GPT(GPTConfig(**FIELDS | fields), **options)).eval()


def exact_norm(x, weight, bias, config):
    """The norm over the last dimension, written out."""
    centred = x - x.mean(-1, keepdim=True) if config.norm == "layer" else x
    weight = 1 + weight if config.norm == "rms1" else weight
    x = centred / (centred.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * weight
    return x if bias is None else x + bias


def exact_block(block, x, config):
    """A block in full attention without positions, written out one head at a time: (T, C) of x (T, C)."""
    weights, D = dict(block.named_parameters()), config.head_dim

    def linear(name, x):
        x = x @ weights[f"{name}.weight"].t()
        return x + weights[f"{name}.bias"] if (config.qkv_bias if name == "attn.qkv" else config.bias) else x

    def norm(name, x, config=config):
        return exact_norm(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), config)

    def branch(number, x, sub_layer):
        out = sub_layer(x if config.norm_position == "after" else norm(f"ln_{number}", x))
        return x + (out if config.norm_position == "before" else norm(f"post_{number}", out))

    def attention(x):
        q, k, v = linear("attn.qkv", x).split([n * D for n in (config.n_head, config.n_kv_head, config.n_kv_head)], -1)
        rms = dataclasses.replace(config, norm="rms" if config.norm == "layer" else config.norm)
        if config.qk_norm == "all":
            q, k = norm("attn.q_norm", q, rms), norm("attn.k_norm", k, rms)
        q, k, v = (heads.split(D, dim=-1) for heads in (q, k, v))
        if config.qk_norm is True:
            q, k = [norm("attn.q_norm", h, rms) for h in q], [norm("attn.k_norm", h, rms) for h in k]
        out = []
        for head, query in enumerate(q):
            kv = head // (config.n_head // config.n_kv_head)
            scores = query @ k[kv].t() * (config.attention_scale or D**-0.5)
            if cap := config.attention_softcap:
                scores = cap * torch.tanh(scores / cap)
            hidden = torch.ones(len(x), len(x)).triu(1).bool()
            out.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[kv])
        return linear("attn.proj", torch.cat(out, dim=-1))

    def mlp(x):
        hidden = linear("mlp.fc", x)
        if config.mlp in ("swiglu", "geglu"):
            gate, hidden = hidden[:, : config.mlp_width], hidden[:, config.mlp_width :]
            hidden = hidden * (
                F.gelu(gate, approximate="tanh") if config.mlp == "geglu" else gate * torch.sigmoid(gate)
            )
        elif config.mlp == "relu2":
            hidden = hidden.clamp(min=0) ** 2
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        return linear("mlp.proj", hidden)

    return branch(2, branch(1, x, attention), mlp)


@every_block
@both_paths
def test_a_block_is_its_formula(fields, fused_kernels):
    model = make({**fields, "positions": "learned", "window": None}, fused_kernels=fused_kernels).double()
    x = torch.randn(11, model.config.d_model, dtype=torch.float64)
    torch.testing.assert_close(model.blocks[0](x[None])[0], exact_block(model.blocks[0], x, model.config))


@both_paths
def test_embedding_and_logits_are_their_formulas(fused_kernels):
    plain = make({"n_layer": 1}, fused_kernels=fused_kernels)
    gemma = make({"n_layer": 1, "embedding_scale": 3.0, "logit_softcap": 2.0}, fused_kernels=fused_kernels)
    tokens = torch.randint(41, (2, 11))
    with torch.no_grad():
        capped = gemma(tokens)[0]
        plain.blocks.load_state_dict(gemma.blocks.state_dict())
        x = plain.blocks[0](3 * gemma.wte.weight[tokens])
        logits = F.layer_norm(x, (32,), gemma.ln_f.weight, gemma.ln_f.bias) @ gemma.wte.weight.t()
    torch.testing.assert_close(capped, 2 * torch.tanh(logits / 2))


@both_paths
def test_each_kind_of_layer_rotates_by_its_own_angles(fused_kernels):
    def logits(**fields):
        model = make({"rope_theta": 1e5, "rope_scaling": ("linear", 4.0), **fields}, fused_kernels=fused_kernels)
        return model(torch.arange(40)[None])[0]

    long = logits(window_pattern="L")
    assert torch.equal(logits(window_pattern="L", local_rope_theta=100.0), long)
    local = logits(window_pattern="S", local_rope_theta=100.0)
    assert torch.equal(local, logits(window_pattern="S", rope_theta=100.0, rope_scaling=None))
    assert not torch.allclose(local, logits(window_pattern="S"), atol=1e-2)
    assert not torch.allclose(logits(window_pattern="N"), long, atol=1e-2)


def test_the_first_layer_without_rotation_does_not_know_the_order_of_earlier_tokens():
    model = make({"window_pattern": "N", "n_layer": 1})
    tokens = torch.arange(20)
    other = torch.cat([tokens[torch.randperm(19)], tokens[19:]])
    last, of_other = (model(row[None])[0][0, -1] for row in (tokens, other))
    torch.testing.assert_close(last, of_other)


def test_set_window_gives_each_layer_the_angles_of_its_kind():
    model = make({"window_pattern": "SL", "local_rope_theta": 100.0})
    model.set_window(9, "LS")
    other = make({"window_pattern": "LS", "local_rope_theta": 100.0})
    tokens = torch.arange(40)[None]
    assert torch.equal(model(tokens)[0], other(tokens)[0])


def test_the_loss_in_pieces_knows_the_softcap(monkeypatch):
    model = make({"logit_softcap": 0.5})
    tokens = torch.randint(41, (2, 31))
    whole = model(tokens[:, :-1], tokens[:, 1:])[1]
    monkeypatch.setattr("model.gpt.rows_of_piece", lambda _: 7)
    pieces = model(tokens[:, :-1], tokens[:, 1:], with_logits=False)[1]
    torch.testing.assert_close(pieces, whole)


@every_block
def test_fused_and_plain_agree_in_the_loss_and_every_gradient(fields):
    fused, plain = make(fields), make(fields, fused_kernels=False)
    tokens = torch.randint(41, (2, 31))
    for model in (fused, plain):
        model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad.any(), name
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )


@every_block
@both_paths
def test_cached_tokens_have_the_logits_of_the_full_forward(fields, fused_kernels):
    model = make(fields, fused_kernels=fused_kernels)
    tokens = torch.randint(41, (2, 40))
    cache = KVCache(model.config, 2, max_new_tokens_per_call=12, max_length=48)
    with torch.no_grad():
        parts = [model(chunk, cache=cache)[0] for chunk in (tokens[:, :12], *tokens[:, 12:].split(1, dim=1))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens)[0], rtol=1e-4, atol=1e-4)


@every_block
def test_greedy_writing_takes_the_best_token_of_the_full_forward(fields):
    model = make(fields)
    tokens = torch.randint(41, (1, 12))
    for new in generate(model, tokens, 20, temperature=0.0):
        with torch.no_grad():
            assert new.item() == model(tokens)[0][0, -1].argmax()
        tokens = torch.cat([tokens, new.view(1, 1)], dim=1)


@every_block
def test_a_saved_model_is_read_with_its_fields_and_bits(fields, tmp_path):
    model = make(fields)
    model.save_pretrained(tmp_path)
    read = GPT.from_pretrained(tmp_path)
    assert read.config == model.config
    weights = read.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_bf16_autocast_gives_attention_one_dtype():
    model = make(BLOCKS["all"])
    tokens = torch.randint(41, (2, 30))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)[0].float()
    exact = model(tokens)[0].detach()
    assert (logits - exact).norm() < 0.03 * exact.norm()


def test_a_model_without_biases_has_matrices_and_gains_only():
    names = [name for name, _ in make(BLOCKS["no bias"]).named_parameters()]
    assert names and not [name for name in names if name.endswith("bias")]
    ends = [name for name, _ in make({"norm": "rms"}).named_parameters() if name.endswith("bias")]
    assert ends and not [name for name in ends if "ln_" in name]  # RMSNorm has none, linear layers do


def test_new_gains_are_one():
    model = GPT(GPTConfig(**FIELDS | BLOCKS["all"]), seed=1)
    gains = [weight for name, weight in model.named_parameters() if "ln_" in name or "_norm" in name]
    assert len(gains) == 4 * 3 + 1
    assert all((gain == 1).all() for gain in gains)
    model = GPT(GPTConfig(**FIELDS | BLOCKS["Gemma"]), seed=1)
    gains = [weight for name, weight in model.named_parameters() if weight.ndim == 1]
    assert len(gains) == 6 * 3 + 1
    assert not any(gain.any() for gain in gains)  # 1 + 0


def test_muon_takes_the_matrices_and_no_gain_decays():
    model = make(BLOCKS["all"])
    groups = make_optimizer(
        model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.99), optimizer="muon"
    ).param_groups
    assert len(groups[0]["params"]) == 4 * 3
    assert {tuple(p.shape) for p in groups[2]["params"]} == {(32,), (8,)}
    assert groups[2]["weight_decay"] == 0


def test_swiglu_has_three_matrices_to_count():
    two = GPTConfig(**FIELDS | {"mlp_width": 40})
    three = dataclasses.replace(two, mlp="swiglu")
    assert flops_per_token(three) - flops_per_token(two) == 6 * 3 * 32 * 40


def test_activations_of_known_numbers():
    x = torch.tensor([-2.0, 0.0, 3.0, 1.0, 5.0, 2.0])
    assert relu2(x).tolist() == [0, 0, 9, 1, 25, 4]
    torch.testing.assert_close(swiglu(x), x[:3] * x[:3].sigmoid() * x[3:])


@every_block
@pytest.mark.parametrize("padding", [[0], [0, 3, 9]], ids=["one row", "ragged rows"])
def test_logits_of_the_cpu_step_are_the_models(fields, padding):
    model = make(fields)
    tokens = torch.randint(41, (len(padding), 40))

    def cache_after(columns):
        cache = KVCache(model.config, len(padding), max_new_tokens_per_call=columns, max_length=48, padding=padding)
        model(tokens[:, :columns], cache=cache)
        cache.fit()
        return cache

    step, cache = CPUStep(model, cache_after(12)), cache_after(12)
    assert why_not_cpu_step(model, cache) is None
    for new in tokens[:, 12:].T:
        torch.testing.assert_close(step(new), model(new[:, None], cache=cache)[0][:, -1], atol=1e-4, rtol=1e-4)


@every_block
def test_several_tokens_of_a_row_are_one_cpu_step(fields):
    model = make(fields)
    tokens = torch.randint(41, (1, 40))
    cache = KVCache(model.config, 1, max_new_tokens_per_call=12, max_length=48)
    model(tokens[:, :12], cache=cache)
    cache.fit(5)
    step, logits = CPUStep(model, cache), model(tokens)[0][0]
    for first in range(12, 40, 4):
        new = tokens[0, first : first + 4]
        torch.testing.assert_close(step(new), logits[first : first + 4], atol=1e-4, rtol=1e-4)


def test_no_class_of_hugging_face_is_named_for_what_it_cannot_be():
    with pytest.raises(ValueError, match="Starcoder2ForCausalLM is the nearest, and cannot have norm 'rms'"):
        to_huggingface(make({"norm": "rms"}))


@pytest.mark.parametrize(
    "field, message",
    [
        ({"norm": "batch"}, "norm='batch' is unknown: take one of layer, rms, rms1"),
        ({"norm_position": "behind"}, "norm_position='behind' is unknown: take one of before, after, both"),
        ({"mlp": "relu"}, "mlp='relu' is unknown: take one of gelu, relu2, swiglu, geglu"),
        ({"qk_norm": 1}, "qk_norm=1 is unknown: take one of False, True, all"),
        ({"bias": None}, "bias=None is unknown: take one of True, False"),
        ({"qkv_bias": "no"}, "qkv_bias='no' is unknown: take one of True, False"),
        ({"head_dim": 0}, "head_dim=0 is not a whole number of at least 1"),
        ({"head_dim": 7}, "7 elements of a head of 7 cannot be rotated in pairs"),
        ({"logit_softcap": 0}, "logit_softcap=0 is not a number above 0"),
        ({"attention_scale": "1"}, "attention_scale='1' is not a number above 0"),
        ({"local_rope_theta": -1.0}, "local_rope_theta=-1.0 is not a number above 0"),
        ({"window_pattern": "SG"}, "is not made of the letters S .* and N"),
    ],
)
def test_wrong_fields_say_what_to_write(field, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**FIELDS | field)
