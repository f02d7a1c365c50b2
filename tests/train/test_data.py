"""Examples and batches: next-token targets, the split, the vocabulary, and the shuffled order."""

import numpy as np
import pytest
import torch

from model import CharTokenizer
from train.data import CharDataset, evaluation_batches, permuted, split, stream, training_batches
from train.tokens import encoder

TEXT = "When are you going\nto the play?\n"


def test_targets_are_the_next_characters():
    dataset = CharDataset(TEXT, block_size=5)
    for i in (0, 3, len(dataset) - 1, -1):
        x, y = dataset[i]
        start = i % len(dataset)
        assert "".join(dataset.itos[int(t)] for t in x) == TEXT[start : start + 5]
        assert "".join(dataset.itos[int(t)] for t in y) == TEXT[start + 1 : start + 6]
    assert len(dataset) == len(TEXT) - 5
    assert x.dtype == y.dtype == torch.int64


def test_every_position_is_one_example_and_no_more():
    dataset = CharDataset(TEXT, block_size=5)
    assert [len(x) for x, _ in dataset] == [5] * len(dataset)
    with pytest.raises(IndexError, match="of a data set of 27"):
        dataset[len(dataset)]


def test_a_batch_is_its_items():
    dataset = CharDataset(TEXT, block_size=7)
    x, y = dataset.batch([4, 0, 9])
    for row, index in enumerate([4, 0, 9]):
        assert torch.equal(x[row], dataset[index][0]) and torch.equal(y[row], dataset[index][1])


def test_the_vocabulary_is_the_characters_of_the_text():
    dataset = CharDataset(TEXT, block_size=5)
    assert dataset.vocab_size == len(set(TEXT))
    assert [dataset.itos[dataset.stoi[c]] for c in TEXT] == list(TEXT)
    assert sorted(dataset.stoi.values()) == list(range(dataset.vocab_size))


@pytest.mark.parametrize("text", [TEXT, "naïve — 日本語 🎭 \U0010ffff", "".join(map(chr, range(32, 1000)))])
def test_the_fast_encoding_is_the_tokenizers(text):
    tokenizer = CharTokenizer.from_text(text)
    assert encoder(tokenizer)(text).tolist() == tokenizer.encode(text)


def test_characters_outside_a_given_vocabulary_are_named():
    with pytest.raises(ValueError, match="'Z'"):
        CharDataset(TEXT + "Z", block_size=5, tokenizer=CharTokenizer.from_text(TEXT))


@pytest.mark.parametrize("length", [0, 1, 5])
def test_a_text_shorter_than_one_example_is_refused(length):
    with pytest.raises(ValueError, match=rf"text has {length} characters, one example of context length 5 needs 6"):
        CharDataset("a" * length, block_size=5)
    assert len(CharDataset("a" * 6, block_size=5)) == 1


def test_a_block_size_below_one_is_refused():
    with pytest.raises(ValueError, match=r"block_size\) is 0, wanted at least 1"):
        CharDataset(TEXT, block_size=0)


def test_the_split_is_by_position_and_loses_nothing():
    text = "".join(chr(100 + i) for i in range(105))
    training, held_out = split(text)
    assert training + held_out == text and len(training) == 94


class ItemByItem:
    """The contract of any other data set: a length, and items."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if not isinstance(index, int):
            raise TypeError("a data set of others may take plain integers only")
        return self.dataset[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_other_data_sets_give_the_same_batches_and_leave_the_random_state_alone(workers):
    dataset = CharDataset(TEXT, block_size=5)
    fast = training_batches(dataset, 4, seed=3, first_batch=2)
    before = torch.get_rng_state()
    slow = training_batches(ItemByItem(dataset), 4, seed=3, first_batch=2, num_workers=workers)
    for _ in range(20):
        for a, b in zip(next(fast), next(slow), strict=True):
            assert torch.equal(a, b)
    slow.close()
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(evaluation_batches(dataset, 4, 10), evaluation_batches(ItemByItem(dataset), 4, 10), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_batches_from_a_later_one_on_are_those_of_the_whole_run():
    dataset = CharDataset(TEXT, block_size=5)
    whole, later = training_batches(dataset, 4, seed=1), training_batches(dataset, 4, seed=1, first_batch=70)
    expected = [next(whole)[0] for _ in range(75)][70:]
    assert all(torch.equal(next(later)[0], x) for x in expected)


def test_evaluation_takes_the_same_examples_from_the_whole_text_every_time():
    dataset = CharDataset("".join(map(chr, range(100, 300))), block_size=5)
    first = torch.cat([x for x, _ in evaluation_batches(dataset, 4, 10)])
    assert torch.equal(first, torch.cat([x for x, _ in evaluation_batches(dataset, 3, 10)]))
    assert len(first) == 10 and first[0, 0] == 0 and first[-1, -1] == 198
    assert sum(len(x) for x, _ in evaluation_batches(dataset, 64, 10**6)) == len(dataset)


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


def test_the_stream_can_start_at_any_position():
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
