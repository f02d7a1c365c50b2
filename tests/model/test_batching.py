"""Many prompts at once: every text is what its prompt gets alone, whatever takes the place of whatever."""

import itertools

import pytest
import torch
from mixes import MIXES, lively

from model import GPT, CharTokenizer, KVCache, generate
from model.decoding import make_step
from model.sampling import generate_batch

LENGTHS = (1, 30, 7, 44, 3, 60, 12, 2, 9)
TOKENIZER = CharTokenizer([chr(ord("A") + i) for i in range(41)])
names = pytest.mark.parametrize("name", ["rope-window-gqa", "pattern", "original", "learned window"])


def make(name="rope-window-gqa", **options):
    return lively(GPT(MIXES[name], **options)).eval()


def prompts_of(*lengths):
    return [torch.randint(41, (length,)).tolist() for length in lengths]


def texts_of(stream, count):
    """What each prompt got: a list of tuples for each."""
    texts = [[] for _ in range(count)]
    for prompt, *new in stream:
        texts[prompt].append(tuple(new))
    return texts


def alone(model, prompt, *args, **options):
    return [tuple(x.item() for x in new) for new in generate(model, [prompt], *args, log_probabilities=True, **options)]


OWN = {  # of each of nine prompts
    "max_new_tokens": [40, 70, 1, 5, 90, 0, 33, 60, 8],
    "temperature": [0.7, 1, 0, 1.5, 0.7, 1, 1, 0.7, 2],
    "top_k": [None, 5, None, None, 9, None, None, 3, None],
    "top_p": [None, None, 0.9, 0.8, None, None, None, 0.95, None],
    "repetition_penalty": [1.0, 1.3, 1.0, 1.1, 1.0, 1.0, 2.0, 1.0, 1.0],
    "stop_tokens": [[], [3, 4], [], [], [], [], [1, 2, 5, 6, 7], [], []],
    "stop_strings": [[], [], [], [], ["A", "CB", "F"], [], [], "B", []],
}
OWN["stop_strings"] = [[given] if isinstance(given, str) else given for given in OWN["stop_strings"]]


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["shared", "invariant"])
@pytest.mark.parametrize("fused_kernels", [True, False], ids=["fused", "plain"])
@names
def test_each_prompt_gets_with_its_own_settings_what_it_gets_alone(name, fused_kernels, batch_invariant):
    model, prompts = make(name, fused_kernels=fused_kernels), prompts_of(*LENGTHS)
    options = {"tokenizer": TOKENIZER, "prefill_chunk": 8}
    together = generate_batch(
        model, prompts, batch=3, seed=5, log_probabilities=True, batch_invariant=batch_invariant, **OWN, **options
    )
    for i, text in enumerate(texts_of(together, 9)):
        expected = alone(model, prompts[i], seed=5 + i, **{name: values[i] for name, values in OWN.items()}, **options)
        assert [token for token, _ in text] == [token for token, _ in expected]
        for (_, found), (_, wanted) in zip(text, expected, strict=True):
            assert found == (wanted if batch_invariant else pytest.approx(wanted, abs=1e-3))


@pytest.mark.parametrize("batch", [1, 2, 9, 40])
def test_the_text_does_not_depend_on_how_many_are_written_at_once(batch):
    model, prompts = make(), prompts_of(*LENGTHS) * 5
    expected = texts_of(generate_batch(model, prompts, 25, batch=8, seed=3), 45)
    assert texts_of(generate_batch(model, prompts, 25, batch=batch, seed=3), 45) == expected
    assert expected[0] != expected[9]  # the same prompt, another seed


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["shared", "invariant"])
def test_a_row_that_ends_gives_its_place_to_the_next_prompt_at_once(batch_invariant):
    options = {"batch": 2, "greedy": True, "batch_invariant": batch_invariant}
    stream = generate_batch(make(), prompts_of(3, 3, 3, 3), [4, 12, 4, 4], **options)
    order = [prompt for prompt, _ in stream]
    first = [order.index(prompt) for prompt in range(4)]
    last = [len(order) - 1 - order[::-1].index(prompt) for prompt in range(4)]
    assert first == sorted(first)  # begun in order
    assert last[0] < first[2] <= last[0] + 2 and last[2] < first[3] <= last[2] + 2
    assert last[1] > first[3]  # the second was written all the time
    for i in range(len(order)):
        running = sum(first[p] <= i <= last[p] for p in range(4))
        assert running <= 2


def test_a_long_prompt_is_read_in_chunks_between_the_tokens_of_others():
    model, chunk = make(), 8
    stream = generate_batch(model, prompts_of(2, 100), [40, 5], batch=2, greedy=True, prefill_chunk=chunk)
    order = [prompt for prompt, _ in stream]
    assert 100 // chunk <= order.index(1) <= 100 // chunk + 3


@torch.no_grad()
@pytest.mark.parametrize("backend", ["banded", "triton"])
@pytest.mark.parametrize("name", ["rope-window-gqa", "pattern"])
def test_a_row_that_was_copied_over_another_one_shows_nothing_of_it(name, backend):
    """The former row left NaN: a new one that reads an old slot, or multiplies its value by 0, would show it."""
    model, length = make(name, backend=backend), 5
    own = KVCache(model.config, 1, max_new_tokens_per_call=length, max_length=length + 3)
    tokens = torch.randint(41, (1, length + 1))
    model(tokens[:, :-1], cache=own)
    own.fit()
    cache = KVCache(model.config, 3)
    rows = cache.first_rows(2)
    step = make_step(model, rows)  # before the rows come and go, as in use: it clears what is unwritten now
    for x in (*cache.k, *cache.v):
        x.fill_(float("nan"))
    for row in (1, 0):  # the second copy is inside one cache
        cache.copy_row(row, cache if row == 0 else own, 1 - row, length)
    rows.columns = length
    logits = step(tokens[0, -1:].expand(2))
    torch.testing.assert_close(logits, model(tokens)[0][:, -1].expand(2, -1), atol=1e-4, rtol=1e-4)
    assert cache.lengths.tolist() == [length + 1, length + 1, 0]  # shared with the rows


def test_new_memory_that_holds_nan_shows_in_no_text():
    model, prompts = make("pattern"), prompts_of(*LENGTHS)
    expected = texts_of(generate_batch(model, prompts, 30, batch=4, greedy=True), 9)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert texts_of(generate_batch(model, prompts, 30, batch=4, greedy=True), 9) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_cache_of_rows_without_a_window_grows_with_the_longest():
    model = make("rope")
    prompts = prompts_of(3, 90, 5)
    texts = texts_of(generate_batch(model, prompts, [200, 30, 120], batch=2, greedy=True, prefill_chunk=16), 3)
    for prompt, text, count in zip(prompts, texts, (200, 30, 120), strict=True):
        assert text == [(int(t),) for t in generate(model, [prompt], count, greedy=True, prefill_chunk=16)]


def test_a_model_in_training_mode_is_evaluated_and_trains_again_between_two_tokens():
    model = make()
    expected = list(generate_batch(model, [[1, 2], [3]], 9, seed=1))
    model.train()
    for pair, wanted in zip(generate_batch(model, [[1, 2], [3]], 9, seed=1), expected, strict=True):
        assert model.training and pair == wanted


def test_nothing_is_shared_with_other_iterators_or_torchs_random_state():
    model, state = make(), torch.get_rng_state()
    first, second = (generate_batch(model, [[1, 2], [3], [7]], 20, batch=2, seed=1) for _ in range(2))
    assert all(a == b for a, b in itertools.zip_longest(first, second))
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_are_prompts_and_tokens_outside_the_vocabulary_are_not_drawn():
    model = make()
    few = CharTokenizer("ABCDE")
    pairs = list(generate_batch(model, ["AB", "EDC"], 60, temperature=50.0, seed=0, tokenizer=few))
    assert {token for _, token in pairs} == set(range(5))
    assert pairs == list(generate_batch(model, [[0, 1], [4, 3, 2]], 60, temperature=50.0, seed=0, tokenizer=few))


def test_no_prompts_and_no_tokens_are_an_empty_iterator():
    assert list(generate_batch(make(), [], 5)) == list(generate_batch(make(), [[1], [2]], 0)) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": [[1], []]}, "prompt 1: it has shape"),
        ({"prompts": [[1], [2, 41]]}, "prompt 1: tokens reaches from 2 to 41"),
        ({"prompts": [[0.5]]}, "prompt 0: tokens has dtype"),
        ({"prompts": ["A"]}, "no tokenizer"),
        ({"batch": 0}, "batch=0 is below 1"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 is below 1"),
        ({"max_new_tokens": [3, -1]}, "max_new_tokens=-1 is negative"),
        ({"max_new_tokens": [3]}, "max_new_tokens has 1 values, expected one for each of 2 prompts"),
        ({"temperature": [1.0, -2.0]}, "temperature=-2.0 is not"),
        ({"seed": [1]}, "seed has 1 numbers"),
        ({"stop_strings": "A"}, "need the tokenizer"),
        ({"stop_strings": [[""], []]}, "empty string"),
        ({"stop_tokens": [[1], [2], [3]]}, "stop_tokens has 3 values"),
    ],
)
def test_wrong_arguments_are_errors_before_the_first_token(options, message):
    arguments = {"prompts": [[1, 2], [3]], "max_new_tokens": 5, **options}
    with pytest.raises(ValueError, match=message):
        generate_batch(make(), **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rope-window-gqa", "pattern", "original"])
def test_on_a_gpu_there_is_a_graph_for_each_width_and_the_text_is_the_same(name):
    model, prompts = make(name).cuda(), prompts_of(*LENGTHS)
    texts = texts_of(generate_batch(model, prompts, 60, batch=5, greedy=True), 9)
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == [(int(t),) for t in generate(model, [prompt], 60, greedy=True)]
