"""The average of the weights: what it is, that it is what a run keeps, and that looking at it changes nothing."""

import pytest
import torch
from test_metrics import trainer, weights

from model import from_pretrained
from train.optim import AverageWeights


def test_the_average_moves_towards_the_weights_faster_at_first():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average, expected = AverageWeights(model, 0.5), 0.0
    for step in range(1, 21):
        torch.nn.init.constant_(model.weight, float(step))
        average.update()
        expected += max(0.5, 9 / (10 + step)) * (step - expected)
        with average.in_place():
            assert model.weight.item() == pytest.approx(expected)
        assert model.weight.item() == step


def test_the_own_weights_come_back_after_an_error():
    model = torch.nn.Linear(2, 2)
    average, before = AverageWeights(model, 0.9), model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(model.weight, before)
        raise KeyError
    assert not model.weight.any()


def test_a_saved_average_goes_on_bit_for_bit():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    average, resumed = AverageWeights(model, 0.9), AverageWeights(model, 0.9)
    for step in range(6):
        torch.nn.init.normal_(model.weight)
        average.update()
        if step == 2:
            resumed.load_state_dict(average.state_dict())
        elif step > 2:
            resumed.update()
    with average.in_place():
        expected = weights(model)
    with resumed.in_place():
        assert torch.equal(weights(model), expected)


def test_the_average_is_evaluated_and_kept_as_best(tmp_path):
    made = trainer(tmp_path, ema_decay=0.9, learning_rate=0.03, max_steps=8)
    made.train()
    steps, found = made.history.series("held_out_loss")
    assert made.best_held_out_loss == found[-1] == min(found)
    assert made.held_out_loss() != found[-1]
    with made.average.in_place():
        assert made.held_out_loss() == found[-1]
        assert torch.equal(weights(from_pretrained(tmp_path / "best")[0]), weights(made.model))
    assert torch.equal(weights(from_pretrained(tmp_path / "last")[0]), weights(made.model))
