import decoders
import pytest
import rope_speed
import torch
import train_speed

from model import GPT, GPTConfig
from model.huggingface import to_huggingface
from train.config import RunConfig, TrainerConfig

ROPE = rope_speed.Problem(T=9, Hq=4, Hkv=2, D=8, B=2, backward=True)


@pytest.mark.parametrize("name", rope_speed.CONTESTANTS)
def test_rotations_are_right_or_say_why_they_are_not_there(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # compiling takes ten seconds
    make, missing = rope_speed.CONTESTANTS[name]
    if reason := missing(ROPE):
        pytest.skip(reason)
    assert rope_speed.objection(make(ROPE), ROPE) is None


@pytest.mark.parametrize("name", rope_speed.NORM_CONTESTANTS)
def test_rotations_with_a_norm_are_right(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    problem = ROPE._replace(norm=True)
    assert rope_speed.objection(rope_speed.NORM_CONTESTANTS[name][0](problem), problem) is None


def test_a_norm_without_its_weights_gradient_is_refused():
    problem = ROPE._replace(norm=True)
    right = rope_speed.ours_fused(problem)

    def wrong(q, k, q_weight, k_weight):
        return right(q, k, q_weight.detach() + 0 * q_weight, k_weight)

    assert rope_speed.objection(wrong, problem).startswith("dq_weight is off by")


def test_a_rotation_by_other_angles_is_refused():
    def wrong(problem):
        right = rope_speed.eager(problem._replace(T=problem.T + 1))
        longer = torch.nn.functional.pad
        return lambda q, k: [x[:, :, 1:] for x in right(longer(q, (0, 0, 1, 0)), longer(k, (0, 0, 1, 0)))]

    (row,) = rope_speed.measure_point(ROPE, {"wrong": (wrong, lambda problem: None)}, 0)
    assert row["not_timed"].startswith("failed the check: q is off by") and "median_ms" not in row


def test_traffic_is_what_must_be_read_and_written():
    # q and k have (4 + 2) * 8 elements a token, read and written, and their gradients as well
    moved = rope_speed.bytes_moved(ROPE)
    assert moved == 2 * 9 * 6 * 8 * 4 * 2 * 2
    assert rope_speed.bytes_moved(ROPE._replace(backward=False, dtype=torch.bfloat16)) == moved // 4
    # with a norm, the backward also reads q and k again
    assert rope_speed.bytes_moved(ROPE._replace(norm=True)) == moved // 4 * 5


def test_the_trainers_default_is_timed():
    workloads = train_speed.workloads(torch.device("cpu"), quick=False)
    default = RunConfig().model_config(train_speed.VOCABULARY)
    assert (default, TrainerConfig().batch_size) in workloads.values()
    (long,) = (config for config, _ in workloads.values() if config.context_length == 2048)
    assert long.window == 128 and long.d_model == default.d_model


TINY = GPTConfig(vocab_size=20, context_length=8, window=3, n_layer=2, n_head=2, n_kv_head=1, d_model=8)


def test_flops_of_a_token():
    # a layer multiplies with qkv (8 x 16), proj (8 x 8) and the MLP (2 x 8 x 32); the head with 20 x 8
    weights = 2 * (8 * 16 + 8 * 8 + 2 * 8 * 32) + 20 * 8
    pairs = 2 * 2 * (1 + 2 + 3 * 6)  # layers, heads, and what 8 queries see
    assert train_speed.flops_per_token(TINY) == 6 * weights + 3 * 4 * 4 * pairs / 8


def test_models_that_disagree_are_refused():
    row, expected = {"loss": 2.0, "gradient_norm": 1.0}, {"loss": 2.0002, "gradient_norm": 1.0}
    assert train_speed.disagreement(row, expected, 1e-3) is None
    assert "loss 2.000000" in train_speed.disagreement(row, expected, 1e-4)
    assert "gradient norm" in train_speed.disagreement(row, {"loss": 2.0, "gradient_norm": 1.1}, 1e-4)
    assert train_speed.disagreement({**row, "loss": float("nan")}, expected, 1e-3)
    assert train_speed.disagreement(row, None, 1e-3)


def test_a_fused_model_with_other_weights_is_not_timed(monkeypatch):
    right = train_speed.models

    def with_one_other_weight(config, device):
        made = right(config, device)
        with torch.no_grad():
            made["ours, fused kernels"][0].blocks[0].attn.qkv.weight.mul_(2)
        return made

    monkeypatch.setattr(train_speed, "models", with_one_other_weight)
    rows = train_speed.measure_point("tiny", TINY, 2, torch.device("cpu"), "fp32", False, 0)
    fused, plain = rows[:2]
    assert "failed the check" in fused["not_timed"] and "median_ms" not in fused and "median_ms" in plain


def test_a_step_updates_the_weights_and_looking_at_the_loss_does_not():
    model = GPT(TINY, seed=0)
    x = torch.randint(20, (2, 8))
    step = train_speed.Step(model, lambda model, x, y: model(x, y)[1], x, x.roll(-1, 1), "fp32")
    before = model.wte.weight.detach().clone()
    step.loss_and_gradient_norm()
    assert torch.equal(model.wte.weight, before)
    step()
    assert not torch.equal(model.wte.weight, before)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_starcoder2_of_our_weights_is_the_same_function(tie_weights):
    pytest.importorskip("transformers")
    model = GPT(GPTConfig(**{**vars(TINY), "tie_weights": tie_weights}), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    tokens = torch.randint(20, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(to_huggingface(model)(tokens).logits, model(tokens)[0], atol=1e-5, rtol=1e-5)


def test_what_starcoder2_cannot_be_is_said():
    pytest.importorskip("transformers")
    assert decoders.why_not_starcoder2(TINY) is None
    assert "one window" in decoders.why_not_starcoder2(GPTConfig(**{**vars(TINY), "window_pattern": "SL"}))
    assert "rotary" in decoders.why_not_starcoder2(GPTConfig(**{**vars(TINY), "positions": "learned"}))
