"""RMSNorm, the MLPs, the norm of q and k, no biases: each is the formula written out, and every path computes it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from mixes import FIELDS, both_paths, lively

from model import GPT, GPTConfig, KVCache, generate
from model.decoding import why_not_cpu_step
from model.gpt import flops_per_token, relu2, swiglu
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
}
every_block = pytest.mark.parametrize("fields", BLOCKS.values(), ids=BLOCKS)


def make(fields, **options):
    torch.manual_seed(0)
    return lively(GPT(GPTConfig(**FIELDS | fields), **options)).eval()


def exact_norm(x, weight, bias, config):
    """The norm over the last dimension, written out."""
    centred = x if config.norm == "rms" else x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * weight
    return x if bias is None else x + bias


def exact_block(block, x, config):
    """A block in full attention without positions, written out one head at a time: (T, C) of x (T, C)."""
    weights, D = dict(block.named_parameters()), config.head_dim

    def linear(name, x):
        x = x @ weights[f"{name}.weight"].t()
        return x + weights[f"{name}.bias"] if config.bias else x

    def norm(name, x, config=config):
        return exact_norm(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), config)

    heads = linear("attn.qkv", norm("ln_1", x)).split(D, dim=-1)
    out = []
    for head in range(config.n_head):
        kv = config.n_head + head // (config.n_head // config.n_kv_head)
        q, k, v = heads[head], heads[kv], heads[kv + config.n_kv_head]
        if config.qk_norm:
            rms = dataclasses.replace(config, norm="rms")
            q, k = norm("attn.q_norm", q, rms), norm("attn.k_norm", k, rms)
        scores = (q @ k.t() / D**0.5).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ v)
    x = x + linear("attn.proj", torch.cat(out, dim=-1))
    hidden = linear("mlp.fc", norm("ln_2", x))
    if config.mlp == "swiglu":
        gate, hidden = hidden[:, : config.mlp_width], hidden[:, config.mlp_width :]
        hidden = gate * torch.sigmoid(gate) * hidden
    elif config.mlp == "relu2":
        hidden = hidden.clamp(min=0) ** 2
    else:
        hidden = F.gelu(hidden, approximate="tanh")
    return x + linear("mlp.proj", hidden)


@every_block
@both_paths
def test_a_block_is_its_formula(fields, fused_kernels):
    model = make({**fields, "positions": "learned", "window": None}, fused_kernels=fused_kernels).double()
    x = torch.randn(11, model.config.d_model, dtype=torch.float64)
    torch.testing.assert_close(model.blocks[0](x[None])[0], exact_block(model.blocks[0], x, model.config))


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
def test_the_cpu_step_says_what_it_does_not_have(fields):
    model = make(fields)
    cache = KVCache(model.config, 1, max_new_tokens_per_call=1, max_length=48)
    model(torch.randint(41, (1, 1)), cache=cache)
    assert "LayerNorm, GELU and biases only, not" in why_not_cpu_step(model, cache)
    for name in fields.keys() & {"norm", "mlp", "qk_norm", "bias"}:
        assert name in why_not_cpu_step(model, cache)


def test_no_class_of_hugging_face_is_named_for_what_it_cannot_be():
    with pytest.raises(ValueError, match="neither GPT-2 nor StarCoder2 has norm 'rms'"):
        to_huggingface(make({"norm": "rms"}))


@pytest.mark.parametrize(
    "field, message",
    [
        ({"norm": "batch"}, "norm='batch' is unknown: take one of layer, rms"),
        ({"mlp": "relu"}, "mlp='relu' is unknown: take one of gelu, swiglu, relu2"),
        ({"qk_norm": 1}, "qk_norm=1 is neither True nor False"),
        ({"bias": None}, "bias=None is neither True nor False"),
    ],
)
def test_wrong_fields_say_what_to_write(field, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**FIELDS | field)
