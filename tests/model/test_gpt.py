import copy
import math
import warnings

import pytest
import torch
from mixes import FIELDS, MIXES, both_paths, every_mix, lively

from kernels import resolve_backend
from model import GPT, GPTConfig, KVCache


@every_mix
@both_paths
def test_changing_a_later_token_leaves_every_earlier_logit_unchanged_bit_for_bit(config, fused_kernels):
    model = lively(GPT(config, fused_kernels=fused_kernels)).eval()
    tokens = torch.randint(config.vocab_size, (2, 37))
    with torch.no_grad():
        before = model(tokens)[0]
        for changed in (1, 8, 9, 20, 36):
            other = tokens.clone()
            other[:, changed] = (other[:, changed] + 1) % config.vocab_size
            after = model(other)[0]
            assert torch.equal(after[:, :changed], before[:, :changed])
            assert not torch.equal(after[:, changed], before[:, changed])


@every_mix
@both_paths
def test_inputs_of_the_future_and_outside_the_window_get_zero_gradient(config, fused_kernels):
    model = lively(GPT(config, fused_kernels=fused_kernels))
    for layer, block in enumerate(model.blocks):
        window = config.layer_window(layer) or 37
        for query in (0, 8, 9, 23, 36):
            x = torch.randn(2, 37, config.d_model, requires_grad=True)
            block.attn(x)[:, query].square().sum().backward()
            first = max(0, query - window + 1)
            assert x.grad[:, query + 1 :].eq(0).all()
            assert x.grad[:, config.layer_prefix(layer) : first].eq(0).all()
            assert x.grad[:, first : query + 1].ne(0).any(dim=-1).all()


@every_mix
def test_fused_and_plain_attention_give_the_same_logits_and_gradients(config):
    fused = lively(GPT(config))
    plain = GPT(config, fused_kernels=False)
    plain.load_state_dict(fused.state_dict())
    tokens, targets = torch.randint(config.vocab_size, (2, 2, 48))
    for model in (fused, plain):
        model.logits, loss = model(tokens, targets)
        loss.backward()
    torch.testing.assert_close(fused.logits, plain.logits, atol=1e-4, rtol=1e-4)
    for (name, mine), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("config", [MIXES["rope-window-gqa"], MIXES["original"]], ids=["modified", "original"])
def test_the_loss_is_the_mean_over_the_targets_that_count(config):
    model = lively(GPT(config)).eval()
    tokens, targets = torch.randint(config.vocab_size, (2, 3, 20))
    targets[:, 12:16], targets[:, 16:] = -1, -100
    logits, loss = model(tokens, targets)
    assert logits.shape == (3, 20, config.vocab_size)
    expected = -logits[:, :12].log_softmax(-1).gather(2, targets[:, :12, None]).mean()
    torch.testing.assert_close(loss, expected)
    assert model(tokens)[1] is None


def test_an_untrained_model_gives_every_token_the_same_probability():
    model = GPT(MIXES["rope-window-gqa"], seed=0)
    tokens, targets = torch.randint(41, (2, 8, 40))
    assert model(tokens, targets)[1].item() == pytest.approx(math.log(41), abs=0.1)


def test_the_initial_weights_are_those_of_gpt2():
    model = GPT(GPTConfig(**{**FIELDS, "d_model": 256, "n_layer": 8, "positions": "learned"}), seed=0)
    for name, parameter in model.named_parameters():
        if "ln_" in name and name.endswith("weight"):
            assert parameter.eq(1).all()
        elif name.endswith("bias"):
            assert parameter.eq(0).all()
        else:
            std = 0.02 / 4 if "proj" in name else 0.02  # sqrt(2 * 8 layers) = 4
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.1 * std


def test_a_seed_makes_the_same_model_whatever_the_random_state_and_leaves_it_alone():
    config = MIXES["rope-window-gqa"]
    torch.manual_seed(1)
    first, state = GPT(config, seed=5), torch.get_rng_state()
    torch.manual_seed(2)
    second = GPT(config, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(state, torch.manual_seed(1).get_state())
    assert not torch.equal(first.wte.weight, GPT(config, seed=6).wte.weight)


def test_without_a_seed_torchs_own_seed_decides():
    models = [GPT(MIXES["original"]) for seed in (3, 3, 4) if torch.manual_seed(seed)]
    assert torch.equal(models[0].wpe.weight, models[1].wpe.weight)
    assert not torch.equal(models[0].wpe.weight, models[2].wpe.weight)


def test_tied_weights_are_one_parameter_and_counted_once():
    tied, untied = GPT(MIXES["rope-window-gqa"]), GPT(MIXES["untied"])
    assert untied.num_parameters() - tied.num_parameters() == 41 * 32
    assert len(set(tied.state_dict())) == len(list(tied.parameters()))


def test_set_window_makes_the_model_of_that_window():
    narrow = lively(GPT(MIXES["rope-window-gqa"])).eval()
    wide = GPT(GPTConfig(**{**FIELDS, "window": 20, "window_pattern": "SL"})).eval()
    wide.load_state_dict(narrow.state_dict())
    tokens = torch.randint(41, (2, 48))
    assert not torch.allclose(narrow(tokens)[0], wide(tokens)[0], atol=1e-3)
    narrow.set_window(20, "SL")
    assert torch.equal(narrow(tokens)[0], wide(tokens)[0])
    assert narrow.config == wide.config
    with pytest.raises(ValueError, match="window=0 is not a whole number"):
        narrow.set_window(0)
    narrow.set_window(None)
    assert [block.attn.window for block in narrow.blocks] == [None] * 3


def test_rotary_positions_continue_past_the_context_and_learned_positions_end_there():
    tokens = torch.randint(41, (1, 49))
    assert GPT(MIXES["rope-window"])(tokens)[0].shape == (1, 49, 41)
    with pytest.raises(ValueError, match=r"tokens has 49 positions, but the model learned 48 \(context_length\)"):
        GPT(MIXES["original"])(tokens)


def test_training_with_dropout_runs_plain_attention_and_warns_once():
    config = GPTConfig(**FIELDS, dropout=0.2)
    fused, plain = GPT(config, seed=0), GPT(config, fused_kernels=False, seed=0)
    tokens = torch.randint(41, (2, 48))
    with pytest.warns(UserWarning, match=r"dropout=0.2 while training: attention runs in plain PyTorch"):
        first = fused(tokens)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.equal(fused(tokens)[0], first)  # the dropout is there
        results = []
        for model in (fused, plain):
            torch.manual_seed(0)
            results.append(model(tokens)[0])
        assert torch.equal(*results)
        fused.eval()
        assert torch.equal(fused(tokens)[0], fused(tokens)[0])


def test_tables_and_masks_made_while_sampling_serve_training():
    for fused_kernels in (True, False):
        model = GPT(MIXES["rope-window-gqa"], fused_kernels=fused_kernels)
        tokens, targets = torch.randint(41, (2, 2, 48))
        with torch.inference_mode():
            model(tokens)
        model(tokens, targets)[1].backward()


def test_rotary_tables_keep_their_precision_and_are_no_part_of_the_checkpoint():
    model = lively(GPT(MIXES["rope-window-gqa"]), scale=0.1).eval()
    assert not any("rope" in name or "cos" in name for name in model.state_dict())
    tokens = torch.randint(41, (1, 4000))
    exact = copy.deepcopy(model).double()(tokens)[0]
    half = model.to(torch.bfloat16)
    assert half.blocks[0].attn.rope(4000, tokens.device)[0].dtype == torch.float32
    error = (half(tokens)[0] - exact).abs()
    assert error[:, -100:].mean() < 2 * error[:, :100].mean()  # rounded angles would be far off at position 4,000


def test_layers_share_one_set_of_tables():
    model = GPT(MIXES["rope-window-gqa"])
    model(torch.zeros(1, 5, dtype=torch.long))
    assert len({id(block.attn.rope(5, torch.device("cpu"))[0]) for block in model.blocks}) == 1
    assert len(model.blocks[0].attn.rope(5, torch.device("cpu"))[0]) == 48
    model(torch.zeros(1, 60, dtype=torch.long))
    assert len(model.blocks[2].attn.rope(5, torch.device("cpu"))[0]) == 96  # doubled


def test_a_wrong_scaling_is_refused_when_the_model_is_made():
    with pytest.raises(ValueError, match="'linaer'"):
        GPT(GPTConfig(**FIELDS, rope_scaling=("linaer", 2.0)))


@both_paths
def test_an_unknown_backend_is_refused_when_the_model_is_made(fused_kernels):
    with pytest.raises(ValueError) as expected:
        resolve_backend("cutlass", "cpu")
    with pytest.raises(ValueError, match=r"^backend is 'cutlass', expected one of ") as refused:
        GPT(MIXES["rope"], fused_kernels=fused_kernels, backend="cutlass")
    assert str(refused.value) == str(expected.value)


def test_a_backend_that_cannot_run_here_is_refused_in_the_forward(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = GPT(MIXES["rope"], backend="triton")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run on cpu: .* use backend='auto' or 'banded'"):
        model(torch.zeros(1, 3, dtype=torch.long))


def test_a_model_works_under_torch_compile_as_one_graph():
    model = lively(GPT(MIXES["rope-window-gqa"]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (16, 48, 31):
        tokens, targets = torch.randint(41, (2, 2, length))
        torch.testing.assert_close(compiled(tokens, targets)[1], model(tokens, targets)[1])


def test_a_cached_forward_records_no_gradient():
    model = GPT(MIXES["rope-window-gqa"])
    cache = KVCache(model.config, 1, max_new_tokens_per_call=4)
    logits, loss = model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long), cache)
    assert not logits.requires_grad and not loss.requires_grad
