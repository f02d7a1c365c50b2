"""Guessing ahead writes the text of plain writing, whatever is guessed; what was taken back leaves no trace."""

import itertools

import pytest
import torch
from torch.nn.functional import softmax

from model import GPT, GPTConfig, KVCache, generate
from model.decoding import make_step
from model.speculative import LONGEST_PAUSE, MOST_GUESSES, Ngram, Pace

SIZES = dict(vocab_size=11, context_length=64, n_layer=2, n_head=4, n_kv_head=2, d_model=32)
WINDOWS = {"sliding": dict(window=9), "mixed": dict(window=9, window_pattern="SL"), "all": {}}
PREFIXES = {"prefix": dict(window=9, prefix=4), "far prefix": dict(window=9, prefix=12, context_length=40)}
SETTINGS = {
    "greedy": dict(greedy=True),
    "drawn": dict(seed=3),
    "filtered": dict(seed=5, temperature=0.3, top_k=4, repetition_penalty=1.3),
}
PROMPT = [[1, 2, 3, 4, 5, 6, 1, 2, 3]]


def model_of(seed=0, **settings):
    return GPT(GPTConfig(**SIZES | settings), seed=seed).double().eval()


def written(model, **settings):
    return [int(token) for token in generate(model, PROMPT, 120, **settings)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_the_text_is_that_of_plain_writing(windows, settings, monkeypatch):
    taken = []
    learn = Pace.learn
    monkeypatch.setattr(Pace, "learn", lambda pace, *counts: taken.append(counts) or learn(pace, *counts))
    model = model_of(**windows)
    expected = written(model, **settings)
    small = model_of(seed=1, window=4, n_layer=1, d_model=16)
    for draft in ("ngram", small, model):
        taken.clear()
        assert written(model, draft=draft, **settings) == expected
        assert taken or draft == "ngram"
    assert all(guessed == right for guessed, right in taken)  # the last draft is the model itself


def test_log_probabilities_and_stops_are_those_of_plain_writing():
    model = model_of(window=9)
    settings = dict(seed=1, log_probabilities=True, stop_tokens=[7])
    plain, guessed = (list(generate(model, PROMPT, 60, draft=draft, **settings)) for draft in (None, model))
    assert len(plain) == len(guessed) < 60
    for (a, x), (b, y) in zip(plain, guessed, strict=True):
        assert a == b and x.shape == y.shape == (1,)
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("windows", PREFIXES.values(), ids=PREFIXES)
def test_beside_a_prefix_the_text_is_that_of_plain_writing(windows):
    """From a prompt shorter than the prefix: wrong guesses stand in its slots, too."""
    model, small = model_of(**windows), model_of(seed=1, window=4, prefix=1, n_layer=1, d_model=16)
    settings = dict(seed=3, temperature=0.7)
    expected = list(generate(model, [[1, 2]], 60, **settings))
    for draft in ("ngram", small):
        assert list(generate(model, [[1, 2]], 60, draft=draft, **settings)) == expected


def test_a_draft_of_another_dtype_guesses_too():
    model, draft = model_of(window=9), model_of(seed=1, window=4, n_layer=1, d_model=16).bfloat16()
    assert written(model, seed=3, draft=draft) == written(model, seed=3)


def test_a_module_that_is_not_the_models_own_writes_the_same():
    """With a hook, several tokens go through the model's own forward, not through the step of a CPU."""
    model = model_of(window=9)
    expected = written(model, greedy=True)
    model.blocks[0].register_forward_hook(lambda *_: None)
    assert written(model, greedy=True, draft="ngram") == expected


def test_drawn_tokens_have_the_models_distribution():
    """The third new token of 400 texts, by Pearson's chi-square: 10 degrees of freedom, P(> 29.6) = 0.001."""
    model, draft = model_of(window=9), model_of(seed=1, window=4, n_layer=1, d_model=16)
    pairs = torch.cartesian_prod(torch.arange(11), torch.arange(11))
    with torch.no_grad():
        model.ln_f.weight.mul_(4)
        logits = model(torch.cat([torch.tensor(PROMPT).expand(121, -1), pairs], dim=1))[0]
    first, second, third = softmax(logits[:, -3:], -1).unbind(1)
    of_pair = first[0, pairs[:, 0]] * second.gather(1, pairs[:, 1:])[:, 0]
    expected = 400 * (of_pair[:, None] * third).sum(0)
    drawn = [int(list(generate(model, PROMPT, 4, seed=seed, draft=draft))[2]) for seed in range(400)]
    counts = torch.bincount(torch.tensor(drawn), minlength=11)
    assert expected.max() > 2 * expected.min() > 10
    assert ((counts - expected) ** 2 / expected).sum() < 29.6


@torch.no_grad()
@pytest.mark.parametrize(
    ("windows", "by_step"),
    [*itertools.product(WINDOWS.values(), (False, True)), *((windows, False) for windows in PREFIXES.values())],
)
def test_what_is_taken_back_leaves_no_trace(windows, by_step):
    model = model_of(**windows)
    tokens = torch.randint(11, (1, 70))
    cache = KVCache(model.config, 1, max_new_tokens_per_call=5, max_length=70, dtype=torch.float64)
    step = make_step(model, cache) if by_step else lambda new: model(new[None], cache=cache)[0][0]
    expected, at = model(tokens)[0][0], 0
    for count, back in ((5, 0), (5, 5), (4, 3), (1, 1), (5, 2), (5, 4), (5, 5), (3, 1), (5, 0), (5, 0), (5, 5)) * 2:
        new = tokens[0, at : at + count - back]
        wrong = torch.randint(11, (back,))
        logits = step(torch.cat([new, wrong]))
        torch.testing.assert_close(logits[: count - back], expected[at : at + count - back])
        cache.rollback(back)
        at += count - back
        assert cache.columns == at and cache.lengths.tolist() == [at]
    assert at > 30


@torch.no_grad()
def test_each_row_takes_back_its_own_number():
    model = model_of(window=9)
    tokens = torch.randint(11, (2, 30))
    cache = KVCache(model.config, 2, max_new_tokens_per_call=4, dtype=torch.float64)
    at = [0, 0]
    for back in ([0, 0], [3, 1], [0, 2], [4, 0], [1, 1], [0, 3]):
        call = torch.stack([tokens[row, at[row] : at[row] + 4] for row in range(2)])
        logits = model(call, cache=cache)[0]
        for row in range(2):
            expected = model(tokens[row : row + 1])[0][0, at[row] : at[row] + 4]
            torch.testing.assert_close(logits[row], expected)
            at[row] += 4 - back[row]
        cache.rollback(back)
        assert cache.lengths.tolist() == at


def test_what_cannot_be_taken_back_is_refused_and_nothing_changes():
    model = model_of(window=9)
    cache = KVCache(model.config, 2, max_new_tokens_per_call=3)
    for _ in range(2):
        model.float()(torch.zeros(2, 3, dtype=torch.long), cache=cache)
    cache.rollback([2, 1])
    for count, message in (
        (7, "rollback of 7 tokens: the cache holds 5"),
        (-1, "rollback of -1 tokens"),
        ([5, 0], r"rollback of \[5, 0\] tokens: a row holds fewer"),
        ([1, 1, 1], "rollback takes one number, or one for each of 2 rows: got 3"),
        (2, "rollback of 2 tokens after 2: a ring keeps what the newest max_new_tokens_per_call=3 replaced"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.rollback(count)
        assert cache.lengths.tolist() == [4, 5]
    everything = KVCache(model_of().config, 1, max_new_tokens_per_call=3)
    everything.advance(3, everything.config)
    everything.advance(3, everything.config)
    everything.rollback(6)  # without a window every position has a slot
    assert everything.columns == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft": "trigram"}, "draft is 'trigram', expected 'ngram' or a GPT"),
        ({"draft": torch.nn.Linear(1, 1)}, "draft is a Linear, expected 'ngram' or a GPT"),
        ({"draft": model_of().to("meta")}, "draft is on meta, the model on cpu: move one of them"),
        ({"draft": model_of(vocab_size=12)}, "draft has another vocabulary: 12 tokens, the model 11"),
        ({"draft": model_of(positions="learned")}, "draft needs rotary positions"),
        ({"draft": "ngram", "compile": True}, "draft with batch_invariant or compile"),
        ({"draft": "ngram", "tokens": [[1], [2]]}, "draft guesses for one prompt, got 2"),
    ],
)
def test_wrong_drafts_are_refused_in_one_line(settings, message):
    tokens = settings.pop("tokens", PROMPT)
    with pytest.raises(ValueError, match=message) as error:
        generate(model_of(window=9), tokens, 5, **settings)
    assert "\n" not in str(error.value)


def test_ngrams_guess_what_followed_the_longest_match():
    text = list(range(20))
    ngram = Ngram([*text, 5, 6, 7, 8])
    assert ngram.guess(2, None) == [9, 10]
    assert Ngram(text).guess(4, None) == []
    assert Ngram([1, 2] * 20).guess(5, None) == [1, 2, 1, 2, 1]


def test_wrong_guesses_become_rare():
    pace, calls = Pace(), 0
    for _ in range(1000):
        if count := pace.next():
            calls += 1
            pace.learn(count, 0)
    assert calls < 1000 / LONGEST_PAUSE + 10
    for _ in range(5):
        pace.learn(pace.count, pace.count)
    assert pace.count == MOST_GUESSES
