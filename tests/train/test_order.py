"""The order of examples: every one once an epoch, known from the seed and the position alone."""

import numpy as np
import pytest

from train.data import permuted, stream

LENGTHS = [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4096, 4097]


@pytest.mark.parametrize("length", LENGTHS)
def test_an_epoch_has_every_example_once(length):
    for epoch in range(3):
        assert sorted(permuted(np.arange(length), length, 5, epoch)) == list(range(length))


def test_the_stream_is_epoch_after_epoch():
    whole = stream(0, 30, 10, 1)
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
        np.testing.assert_array_equal(
            whole[10 * epoch : 10 * epoch + 10], permuted(np.arange(10), 10, seed=1, epoch=epoch)
        )


def test_the_stream_can_be_entered_anywhere():
    whole = stream(0, 1000, 37, 3)
    for start, count in [(0, 1), (36, 2), (100, 300), (999, 1)]:
        np.testing.assert_array_equal(stream(start, count, 37, 3), whole[start : start + count])


def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(permuted(np.arange(50), 50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_no_trace_of_the_original_order_is_left():
    """Over many seeds, position and example, and neighbouring examples, are as uncorrelated as chance has it."""
    length, seeds = 1000, 200
    with_position, with_neighbour = [], []
    for seed in range(seeds):
        order = permuted(np.arange(length), length, seed, 0)
        with_position.append(np.corrcoef(order, np.arange(length))[0, 1])
        with_neighbour.append(np.corrcoef(order[1:], order[:-1])[0, 1])
    for found in (np.array(with_position), np.array(with_neighbour)):
        assert abs(found.mean()) < 5 / np.sqrt(length * seeds)
        assert 0.8 < found.std() * np.sqrt(length) < 1.2


def test_billions_of_examples_cost_nothing():
    length = 10_000_000_019
    examples = stream(length - 50, 100, length, 0)
    assert examples.min() >= 0 and examples.max() < length and len(set(examples[:50])) == 50
