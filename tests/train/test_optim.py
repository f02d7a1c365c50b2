"""The schedule in tokens, and which parameters are decayed."""

import pytest
import torch

from model import GPT, GPTConfig
from train.optim import learning_rate_at, make_optimizer

SCHEDULE = {"peak": 1.0, "warmup_tokens": 100, "final_tokens": 1100}


def test_the_learning_rate_rises_in_a_line_then_falls_along_a_cosine_to_a_tenth():
    rates = [learning_rate_at(tokens, **SCHEDULE) for tokens in (1, 50, 100, 350, 600, 1100, 5000)]
    quarter = 0.1 + 0.9 * (1 + 2**-0.5) / 2
    assert rates == pytest.approx([0.01, 0.5, 1.0, quarter, 0.55, 0.1, 0.1])


def test_without_decay_the_peak_stays():
    assert [learning_rate_at(t, **SCHEDULE, decay=False) for t in (50, 100, 600, 5000)] == [0.5, 1.0, 1.0, 1.0]


def test_a_run_without_warm_up_begins_at_the_peak():
    assert learning_rate_at(0, peak=2.0, warmup_tokens=0, final_tokens=10) == 2.0
    assert learning_rate_at(6, peak=2.0, warmup_tokens=5, final_tokens=5) == pytest.approx(0.2)


def test_only_matrices_are_decayed_and_tied_weights_once():
    config = {"vocab_size": 11, "context_length": 8, "n_layer": 2, "n_head": 2, "d_model": 16}
    model = GPT(GPTConfig(**config, positions="learned"))
    optimizer = make_optimizer(model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.99))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for name, p in model.named_parameters() if p.dim() == 2}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    assert {name for name, p in model.named_parameters() if id(p) not in decayed} >= {"ln_f.weight", "ln_f.bias"}


def test_decay_shrinks_a_matrix_that_has_no_gradient_and_leaves_a_bias():
    model = torch.nn.Linear(3, 3)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.ones_(model.bias)
    optimizer = make_optimizer(model, learning_rate=0.5, weight_decay=0.1, betas=(0.9, 0.99))
    (0 * model(torch.zeros(1, 3)).sum()).backward()
    optimizer.step()
    assert torch.equal(model.weight, torch.full((3, 3), 0.95)) and torch.equal(model.bias, torch.ones(3))
