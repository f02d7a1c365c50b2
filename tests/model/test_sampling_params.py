import pytest
import torch
import torch.nn.functional as F

from model import SamplingParams, min_p_logits, penalized_logits
from model.sampling_params import BLOCK, RowGenerators

INF = float("inf")


def test_min_p_keeps_the_tokens_with_a_share_of_the_largest_probability():
    logits = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.3, 0.5]]).log()
    kept = [(min_p_logits(logits, p) > -INF).tolist() for p in (0.0, 0.3, 0.55, 1.0)]
    assert kept[0] == [[True, True, True]] * 2
    assert kept[1] == [[False, True, True], [True, True, True]]
    assert kept[2] == [[False, True, False], [False, True, True]]
    assert kept[3] == [[False, True, False], [False, False, True]]
    with pytest.raises(ValueError, match=r"p=1.1 is not in \[0, 1\]"):
        min_p_logits(logits, 1.1)


def test_a_penalty_makes_seen_tokens_less_likely_on_both_sides_of_zero():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalized_logits(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]
    assert penalized_logits(logits, seen, 0.5).tolist() == [[4.0, -1.0, 2.0, -2.0]]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_hugging_faces_generate(options):
    processors = pytest.importorskip("transformers").generation.logits_process
    tokens, logits = torch.randint(30, (4, 6)), 3 * torch.randn(4, 30)
    theirs = logits
    for name, kind in {  # in the order in which generate applies them
        "repetition_penalty": processors.RepetitionPenaltyLogitsProcessor,
        "temperature": processors.TemperatureLogitsWarper,
        "top_k": processors.TopKLogitsWarper,
        "top_p": processors.TopPLogitsWarper,
        "min_p": processors.MinPLogitsWarper,
    }.items():
        if name in options:
            theirs = kind(options[name])(tokens, theirs)
    seen = torch.zeros(4, 30, dtype=torch.bool).scatter_(1, tokens, True)
    params = SamplingParams(**options)
    ours = params.filter_logits(penalized_logits(logits, seen, params.repetition_penalty))
    torch.testing.assert_close(F.softmax(ours, dim=-1), F.softmax(theirs, dim=-1))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}], ids=str)
def test_tokens_are_drawn_as_often_as_their_probability_says(options):
    params, rows = SamplingParams(**options), 200
    logits = torch.tensor([1.0, -INF, 2.0, 0.5, -INF, -1.0, 1.5, -INF]).expand(rows, 8)
    generators = RowGenerators(range(rows), "cpu")
    drawn = torch.cat([params.choose(logits, generators) for _ in range(BLOCK)])
    found = torch.bincount(drawn, minlength=8) / len(drawn)
    expected = F.softmax(params.filter_logits(logits[0:1])[0], dim=-1)
    assert found[expected == 0].eq(0).all() and (expected == 0).sum() >= 3
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)  # 4 standard errors


class ConstantGenerators:
    """In place of `RowGenerators`: always the same number."""

    def __init__(self, number):
        self.number = number

    def uniform(self):
        return torch.full((1, 1), self.number)


def test_the_smallest_and_largest_random_numbers_draw_possible_tokens():
    logits = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]])
    assert SamplingParams().choose(logits, ConstantGenerators(2.0**-24)).tolist() == [1]
    assert SamplingParams().choose(logits, ConstantGenerators(1.0)).tolist() == [3]


def test_random_numbers_of_a_row_depend_on_its_seed_alone_and_are_above_0():
    generators, alone = RowGenerators([3, 1, 3], "cpu"), RowGenerators([1], "cpu")
    numbers = torch.cat([generators.uniform() for _ in range(BLOCK + 3)], dim=1)
    assert torch.equal(numbers[0], numbers[2]) and not torch.equal(numbers[0], numbers[1])
    assert torch.equal(numbers[1], torch.cat([alone.uniform() for _ in range(BLOCK + 3)], dim=1)[0])
    assert 0 < numbers.min() < 0.01 and 0.99 < numbers.max() <= 1
    assert len(set(numbers[0].tolist())) > BLOCK  # the second block is another one
    assert not torch.equal(*(RowGenerators([None], "cpu").uniform() for _ in range(2)))
