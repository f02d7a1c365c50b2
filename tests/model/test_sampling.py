import itertools

import pytest
import torch
import torch.nn.functional as F
from mixes import FIELDS, MIXES, lively

from model import GPT, CharTokenizer, GPTConfig, generate, penalized_logits, top_k_logits, top_p_logits
from model.decoding import Decoder
from model.sampling import sample


def make(name="rope-window-gqa", **kwargs):
    return lively(GPT(MIXES[name], **kwargs)).eval()


def tokens_of(iterator):
    return torch.stack(list(iterator), dim=1)


@torch.no_grad()
def greedy_without_cache(model, tokens, steps, context=None):
    """The most likely tokens, by a whole forward for each, over the last `context` tokens as minGPT does."""
    for _ in range(steps):
        logits = model(tokens if context is None else tokens[:, -context:])[0][:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.mark.parametrize("fused_kernels", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", ["rope", "rope-window", "rope-window-gqa", "pattern"])
def test_a_rotary_model_continues_past_its_context_as_without_a_cache(name, fused_kernels):
    model = make(name, fused_kernels=fused_kernels)
    prompt = torch.randint(41, (2, 5))
    assert torch.equal(sample(model, prompt, 120), greedy_without_cache(model, prompt, 120))


@pytest.mark.parametrize("prompt_length", [1, 40, 48, 60])
@pytest.mark.parametrize("name", ["original", "learned window"])
def test_past_learned_positions_every_token_reads_the_last_context_as_mingpt_does(name, prompt_length):
    model = make(name)
    prompt = torch.randint(41, (2, prompt_length))
    assert torch.equal(sample(model, prompt, 60), greedy_without_cache(model, prompt, 60, context=48))


def test_past_learned_positions_there_is_no_cache_once_no_padding_is_left():
    model = make("original")
    decoder = Decoder(model, torch.randint(41, (2, 46)), torch.tensor([0, 4], dtype=torch.int32), 20, 128)
    decoder.prefill()
    cached = []
    for _ in range(10):  # to column 56, of which 48 are read; the second row's padding lasts until column 52
        decoder.decode(torch.tensor([1, 2]))
        cached.append(decoder.cache is not None)
    assert cached == [True] * 5 + [False] * 5


def test_a_hook_of_the_model_runs_for_every_context_that_is_read_again():
    model, calls = make("original"), []
    prompt = torch.randint(41, (2, 48))
    expected = sample(model, prompt, 5)
    model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(sample(model, prompt, 5), expected) and len(calls) == 5


def test_last_logits_are_those_of_the_whole_forward():
    for name in ("original", "rope-window-gqa"):
        model, tokens = make(name).eval(), torch.randint(41, (2, 20))
        torch.testing.assert_close(model.last_logits(tokens), model(tokens)[0][:, -1])


@pytest.mark.parametrize("name", ["rope-window-gqa", "pattern", "original"])
def test_prompts_of_different_lengths_are_each_continued_as_alone(name):
    model = make(name)
    prompts = [torch.randint(41, (length,)).tolist() for length in (1, 30, 7, 44)]
    together = tokens_of(generate(model, prompts, 40, greedy=True, prefill_chunk=8))
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, sample(model, torch.tensor([prompt]), 40)[0, len(prompt) :])


@pytest.mark.parametrize("name", ["rope-window-gqa", "pattern", "original"])
def test_the_prompt_may_be_read_in_chunks_of_any_size(name):
    model = make(name)
    prompt = torch.randint(41, (2, 100))  # longer than the window and than the context
    whole = tokens_of(generate(model, prompt, 10, greedy=True, prefill_chunk=100))
    for chunk in (1, 7, 9, 64):
        assert torch.equal(tokens_of(generate(model, prompt, 10, greedy=True, prefill_chunk=chunk)), whole)


def test_after_the_prompt_the_rings_hold_the_window_and_no_more():
    model, slots = make("pattern"), []
    model.register_forward_hook(
        lambda module, args, kwargs, result: slots.append([len(k[0, 0]) for k in kwargs["cache"].k]), with_kwargs=True
    )
    list(generate(model, torch.randint(41, (1, 40)), 3, prefill_chunk=16))
    assert slots == [[24, 24, 43]] * 3 + [[9, 9, 43]] * 2


def test_a_row_is_finished_by_its_own_stop_token():
    model = make()
    prompt = torch.randint(41, (3, 4))
    free = tokens_of(generate(model, prompt, 30, temperature=20.0, seed=1))  # hardly a token twice in a row
    stops = {int(free[0, 3]), int(free[1, 11]), int(free[2, 7])}
    stopped = tokens_of(generate(model, prompt, 30, temperature=20.0, seed=1, stop_tokens=stops))
    ends = [next(i for i, token in enumerate(row.tolist()) if token in stops) for row in free]
    assert stopped.shape[1] == max(ends) + 1 < 30
    assert len(set(ends)) > 1
    for row, expected, end in zip(stopped, free, ends, strict=True):
        assert torch.equal(row[: end + 1], expected[: end + 1])
        assert row[end + 1 :].eq(-1).all()


def test_a_seed_gives_the_same_text_whatever_else_draws():
    model = make()
    prompt = torch.randint(41, (2, 4))
    alone = [tokens_of(generate(model, prompt, 20, seed=seed)) for seed in (1, 2)]
    assert not torch.equal(*alone)
    state = torch.get_rng_state()
    first, second = generate(model, prompt, 20, seed=1), generate(model, prompt, 20, seed=2)
    pairs = list(zip(first, second, strict=True))  # token by token in turn
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    for drawn, expected in zip(zip(*pairs, strict=True), alone, strict=True):
        assert torch.equal(torch.stack(drawn, dim=1), expected)


def test_a_row_of_a_batch_is_drawn_as_if_it_were_alone():
    model = make()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [1, 2, 3]]
    options = {"top_p": 0.95, "repetition_penalty": 1.2}
    together = tokens_of(generate(model, prompts, 300, seed=7, **options))  # more than a block of random numbers
    for row, prompt in enumerate(prompts):
        alone = tokens_of(generate(model, [prompt], 300, seed=7 + row, **options))
        assert torch.equal(together[row], alone[0])
    assert not torch.equal(together[0], together[3])  # the same prompt, another seed
    same = tokens_of(generate(model, prompts, 300, seed=[7, 1, 2, 7], **options))
    assert torch.equal(same[0], same[3]) and torch.equal(same[0], together[0])


@pytest.mark.parametrize(
    "name, backend, count",
    [
        *((name, "banded", 40) for name in ("rope-window-gqa", "pattern", "original", "untied")),
        ("rope-window-gqa", "triton", 4),
    ],
)
def test_a_batch_invariant_prompt_has_the_same_bits_alone_and_in_any_batch(name, backend, count, device):
    """Tokens and log-probabilities, of prompts of different lengths in batches of 1, 2 and 5."""
    model = make(name, backend=backend).to(device)
    prompts = [torch.randint(41, (length,)).tolist() for length in (3, 12, 9, 3, 10)]

    def continued(rows, stop_tokens=()):
        stream = generate(
            model, [prompts[row] for row in rows], count, seed=rows, temperature=0.9, top_k=9, repetition_penalty=1.1,
            prefill_chunk=8, stop_tokens=stop_tokens, log_probabilities=True, batch_invariant=True,
        )  # fmt: skip
        return [torch.stack(part, dim=1) for part in zip(*stream, strict=True)]

    stop_tokens = [int(continued([1])[0][0, 1])]  # the second row ends at its second token, if not at its first
    alone = [continued([row], stop_tokens) for row in range(5)]
    assert alone[1][0].shape[1] <= 2
    for rows in ([0, 1], [4, 0], [2, 3, 1, 0, 4]):
        tokens, log_probabilities = continued(rows, stop_tokens)
        assert tokens.shape[1] == max(alone[row][0].shape[1] for row in rows)
        for i, row in enumerate(rows):
            own, own_log_probabilities = alone[row]
            length = own.shape[1]
            assert torch.equal(tokens[i, :length], own[0]) and (tokens[i, length:] == -1).all()
            assert torch.equal(log_probabilities[i, :length], own_log_probabilities[0])
            assert not log_probabilities[i, length:].any()


def test_a_row_is_finished_by_a_stop_string_across_tokens():
    model, tokenizer = make(), CharTokenizer([chr(ord("A") + i) for i in range(41)])
    prompts = [[1, 2], [3, 4, 5], [6]]
    free = tokens_of(generate(model, prompts, 40, temperature=20.0, seed=3))
    texts = [tokenizer.decode(row) for row in free]
    strings = [texts[0][4:7], texts[1][20:22]]  # they may occur earlier too, so the end is searched
    ends = [min((text.find(s) + len(s) for s in strings if s in text), default=40) for text in texts]
    options = {"temperature": 20.0, "seed": 3, "stop_strings": strings, "tokenizer": tokenizer}
    stopped = tokens_of(generate(model, prompts, 40, **options))
    assert ends[0] == 7 and ends[1] <= 22 < ends[2]
    for row, expected, end in zip(stopped, free, ends, strict=True):
        assert torch.equal(row[:end], expected[:end]) and row[end:].eq(-1).all()
    two = tokens_of(generate(model, prompts[:2], 40, **options))
    assert two.shape[1] == max(ends[:2])  # the iterator ends with its last row


def test_a_stop_string_that_the_prompt_ends_with_stops_nothing():
    model, tokenizer = make(), CharTokenizer([chr(ord("A") + i) for i in range(41)])
    text = tokenizer.decode(tokens_of(generate(model, [[1, 2]], 20, greedy=True))[0])
    string = "BC" if "BC" not in text else pytest.fail("choose another prompt")
    stopped = generate(model, [[1, 2]], 20, greedy=True, stop_strings=string, tokenizer=tokenizer)
    assert tokenizer.decode(tokens_of(stopped)[0]) == text


def test_log_probabilities_are_those_of_the_model_before_filters():
    model, options = make(), {"temperature": 3.0, "top_k": 5, "repetition_penalty": 1.5, "seed": 0}
    prompt = torch.randint(41, (2, 12))
    pairs = list(generate(model, prompt, 30, **options, log_probabilities=True))
    tokens, found = (torch.stack(part, dim=1) for part in zip(*pairs, strict=True))
    assert torch.equal(tokens, tokens_of(generate(model, prompt, 30, **options)))
    with torch.no_grad():
        logits = model(torch.cat([prompt, tokens], dim=1))[0][:, 11:-1]
    expected = logits.log_softmax(dim=-1).gather(2, tokens[..., None]).squeeze(2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    stop = int(tokens[0, 3])
    cut = list(generate(model, prompt, 30, **options, stop_tokens=[stop], log_probabilities=True))
    assert cut[-1][1][0] == 0 == cut[-1][0][0] + 1  # a finished row: -1, with log-probability 0


@torch.no_grad()
def test_a_repetition_penalty_counts_prompt_and_text_of_the_row_but_not_its_padding():
    model = make()
    prompts = [[4, 0, 9, 1, 1, 30], [5]]  # the second row is padded with zeros
    together = tokens_of(generate(model, prompts, 30, greedy=True, repetition_penalty=3.0))
    for row, text in zip(together, prompts, strict=True):
        length = len(text)
        for _ in range(30):
            logits = model(torch.tensor([text]))[0][:, -1]
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[0, text] = True
            text = [*text, int(penalized_logits(logits, seen, 3.0).argmax())]
        assert row.tolist() == text[length:]


def test_changing_a_yielded_token_in_place_changes_nothing():
    model = make()
    prompt = torch.randint(41, (2, 4))
    drawn = []
    for token in generate(model, prompt, 20, greedy=True):
        drawn.append(token.clone())
        token.fill_(0)
    assert torch.equal(torch.stack(drawn, dim=1), sample(model, prompt, 20)[:, 4:])


def test_without_a_seed_every_text_is_different_and_torchs_state_is_left_alone():
    model = make()
    prompt = torch.randint(41, (1, 4))
    state = torch.get_rng_state()
    drawn = [tokens_of(generate(model, prompt, 30, temperature=3.0)) for _ in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_are_drawn_as_often_as_the_model_says():
    model = lively(GPT(GPTConfig(**{**FIELDS, "vocab_size": 7})), scale=0.1).eval()
    prompt = torch.randint(7, (1, 4)).expand(20000, 4)
    temperature, top_k, top_p = 0.7, 6, 0.9
    logits = model(prompt[:1])[0][0, -1].detach() / temperature
    expected = F.softmax(top_p_logits(top_k_logits(logits, top_k), top_p), dim=-1)
    assert 2 <= (expected > 0).sum() <= 6
    drawn = next(generate(model, prompt, 1, temperature=temperature, top_k=top_k, top_p=top_p, seed=0))
    found = torch.bincount(drawn, minlength=7) / len(drawn)
    assert found[expected == 0].eq(0).all()
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)  # 4 standard errors


@pytest.mark.parametrize(
    "options", [{"greedy": True}, {"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-40}]
)
def test_settings_that_leave_one_token_take_the_most_likely(options):
    model = make()
    prompt = torch.randint(41, (2, 4))
    assert torch.equal(tokens_of(generate(model, prompt, 20, **options)), sample(model, prompt, 20)[:, 4:])


def test_top_k_keeps_the_k_largest_and_what_equals_the_kth():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, -1.0, -5.0, -2.0]])
    inf = float("inf")
    assert top_k_logits(logits, 2).tolist() == [[3, -inf, 2, 2], [0, -1, -inf, -inf]]
    assert torch.equal(top_k_logits(logits, 9), logits)
    assert logits[0, 1] == 1  # the argument is not changed
    with pytest.raises(ValueError, match="k=0 is below 1"):
        top_k_logits(logits, 0)


def test_top_p_keeps_the_fewest_tokens_that_hold_the_probability():
    logits = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.3, 0.5]]).log()
    kept = [(top_p_logits(logits, p) > float("-inf")).tolist() for p in (0.01, 0.55, 0.85, 1.0)]
    assert kept[0] == [[False, True, False], [False, False, True]]
    assert kept[1] == [[False, True, False], [False, True, True]]
    assert kept[2] == [[False, True, True], [True, True, True]]
    assert kept[3] == [[True, True, True]] * 2
    with pytest.raises(ValueError, match=r"p=0 is not in \(0, 1\]"):
        top_p_logits(logits, 0)


def test_a_model_in_training_is_in_training_again_between_any_two_tokens():
    model = GPT(GPTConfig(**FIELDS, dropout=0.5), fused_kernels=False)
    model.train()
    model.blocks[1].eval()  # as someone does who freezes a layer
    before = [module.training for module in model.modules()]
    prompt = torch.randint(41, (1, 4))
    iterator = generate(model, prompt, 20, greedy=True)
    drawn = []
    for token in itertools.islice(iterator, 10):
        drawn.append(token)
        assert [module.training for module in model.modules()] == before
        assert torch.is_grad_enabled()
    del iterator  # abandoned half-way
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.stack(drawn, dim=1), sample(model.eval(), prompt, 10)[:, 4:])  # drawn without dropout


def test_sampling_between_two_training_steps_changes_neither():
    losses = []
    for sampling in (False, True):
        model = GPT(MIXES["rope-window-gqa"], seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(0)
        for _ in range(3):
            tokens, targets = torch.randint(41, (2, 4, 40))
            loss = model(tokens, targets)[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if sampling:
                sample(model, tokens[:1], 60, sample=True)
        losses.append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["rope-window-gqa", "pattern", "original"])
def test_tokens_and_memory_are_made_on_demand(name):
    iterator = generate(make(name), torch.tensor([[1, 2]]), 10**12, seed=0)
    assert len(list(itertools.islice(iterator, 3))) == 3
    assert list(generate(make(), torch.tensor([[1, 2]]), 0)) == []


def test_sample_has_mingpts_arguments_and_returns_prompt_and_continuation():
    model = make()
    prompt = torch.randint(41, (2, 4), dtype=torch.int32)
    drawn = sample(model, prompt, 30, 1.0, True, 10, seed=3)
    assert drawn.shape == (2, 34) and drawn.dtype == torch.int32
    assert torch.equal(drawn[:, :4], prompt)
    assert torch.equal(drawn[:, 4:], tokens_of(generate(model, prompt, 30, top_k=10, seed=3)).int())
    assert torch.equal(sample(model, prompt, 0), prompt)


def test_generation_under_autocast_and_in_bfloat16():
    model = make()
    prompt = torch.randint(41, (2, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sample(model, prompt, 30).shape == (2, 50)
    assert sample(model.to(torch.bfloat16), prompt, 30).shape == (2, 50)


LETTERS = CharTokenizer([chr(ord("A") + i) for i in range(41)])


@pytest.mark.parametrize(
    ("tokens", "same"),
    [
        ([1, 2, 3], [[1, 2, 3]]),
        ((1, 2, 3), [[1, 2, 3]]),
        (torch.tensor([1, 2, 3]), [[1, 2, 3]]),
        (list(torch.tensor([1, 2, 3])), [[1, 2, 3]]),
        (torch.tensor([1, 2, 3]).numpy(), [[1, 2, 3]]),
        ("BCD", [[1, 2, 3]]),
        (["BCD", "E"], [[1, 2, 3], [4]]),
    ],
    ids=str,
)
def test_one_prompt_needs_no_list_and_a_text_is_encoded(tokens, same):
    model = make()
    expected = tokens_of(generate(model, same, 20, seed=1))
    assert torch.equal(tokens_of(generate(model, tokens, 20, seed=1, tokenizer=LETTERS)), expected)
    model.tokenizer = LETTERS
    assert torch.equal(tokens_of(generate(model, tokens, 20, seed=1)), expected)


@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"top_k": 30, "repetition_penalty": 1.5}], ids=str)
def test_no_token_is_drawn_that_the_tokenizer_cannot_decode(options):
    """A model may have more tokens than its tokenizer: people pad the vocabulary to a multiple of 64."""
    model, few = make(), CharTokenizer("ABC")
    prompts = [[1, 40], [0]]
    drawn = tokens_of(generate(model, prompts, 60, temperature=5.0, seed=1, tokenizer=few, **options))
    assert drawn.max() <= 2 and few.decode(drawn[0])
    assert tokens_of(generate(model, prompts, 60, temperature=5.0, seed=1, **options)).max() > 2


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.tensor([[1, 41]]), {}, "tokens reaches from 1 to 41, outside the vocabulary of 0 to 40"),
        (torch.tensor([[-1, 4]]), {}, "tokens reaches from -1 to 4, outside"),
        (torch.tensor([[1.0]]), {}, "tokens has dtype torch.float32, expected integers"),
        (torch.tensor(1), {}, r"tokens has shape \(\), expected \(B, T\)"),
        (5, {}, "tokens is 5, expected a prompt, or a list of them"),
        ("ABC", {}, "tokens is a text, and the model has no tokenizer: give tokenizer=..., or load"),
        (["A", "B"], {}, "tokens is a text, and the model has no tokenizer"),
        ("A!", {"tokenizer": CharTokenizer("AB")}, "'!' not in the vocabulary of 2 characters"),
        ([[1]], {"seed": -1}, r"seed=-1 is not a whole number from 0 to 2\*\*63 - 1"),
        ([[1], [1]], {"seed": 2**63 - 1}, f"seed={2**63} is not a whole number from 0"),
        (torch.zeros(2, 0, dtype=torch.long), {}, "tokens has no columns: a prompt needs at least one token"),
        ([[1], []], {}, "with an empty one: every row needs at least one token"),
        ([[1]], {"temperature": -1}, "temperature=-1 is not a number of at least 0"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan is not a number"),
        ([[1]], {"top_k": 0}, "top_k=0 is below 1"),
        ([[1]], {"top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
        ([[1]], {"top_p": 1.1}, r"top_p=1.1 is not in \(0, 1\]"),
        ([[1]], {"min_p": 1.5}, r"min_p=1.5 is not in \[0, 1\]"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty=0 is not a number above 0"),
        ([[1], [2]], {"seed": [1, 2, 3]}, "seed has 3 numbers, expected one for each of 2 rows"),
        ([[1]], {"stop_strings": ["A"]}, "need the tokenizer of the text: tokenizer=..."),
        ([[1]], {"stop_strings": [""], "tokenizer": CharTokenizer("AB")}, r"stop_strings=\[''\] has an empty string"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens=-1 is negative"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk=0 is below 1"),
        ([[1]], {"compile": True, "batch_invariant": True}, "would compile a step for every row: leave one out"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call_not_at_the_first_token(tokens, options, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(make(), tokens, **{"max_new_tokens": 1, **options})
    assert "\n" not in str(error.value)
