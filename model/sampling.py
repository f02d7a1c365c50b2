"""Generating text: `generate` yields tokens as they are made, `sample` returns them all.

    for token in generate(model, prompt, 500, temperature=0.8, top_k=10, seed=1):     # prompt (B, T), token (B,)
        print(tokenizer.decode(token.tolist()), end="", flush=True)

A model with rotary positions generates any number of tokens; with a window, a token costs the same at any position.
Learned positions end at context_length: after that every token reads the last context_length tokens again.
"""

from itertools import zip_longest

import torch
import torch.nn.functional as F

from .batching import generate_batch as generate_batch  # beside `generate`, for users
from .decoding import Decoder
from .prompts import check_prompt, encode_prompts, left_padded, row_seeds, seen_tokens
from .sampling_params import RowGenerators, SamplingParams
from .speculative import check_draft, guessed_ahead
from .stop_strings import StopStrings

FINISHED = -1  # the token that a finished row yields


def generate(
    model,
    tokens,
    max_new_tokens,
    *,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=1.0,
    greedy=False,
    seed=None,
    stop_tokens=(),
    stop_strings=(),
    tokenizer=None,
    log_probabilities=False,
    prefill_chunk=128,
    batch_invariant=False,
    draft=None,
    cache_dtype=None,
    compile=False,
):
    """An iterator over the next tokens of each row: at most max_new_tokens tensors (B,) on the model's device.

    tokens         the prompts: (B, T) integers, or a list of B sequences of any lengths; T is at least 1. One prompt
                   may come as (T,) integers, and with a tokenizer a prompt may be a text.
    temperature, top_k, top_p, min_p, repetition_penalty, greedy
                   how a token is chosen: the fields of `SamplingParams`.
    seed           row i is drawn with seed + i, or a sequence of B seeds, from 0 to 2**63 - 1. A seed gives a row the
                   same text every time (on one kind of device), whatever the other rows of the batch are. None:
                   different every time.
    stop_tokens    a row that has drawn one of them is finished and yields -1 from then on. The iterator ends when all
                   rows are finished.
    stop_strings   texts that finish a row in the same way, at the token that completes one. They need a tokenizer, and
                   the host must read every token, which a GPU has to wait for.
    tokenizer      None takes model.tokenizer. No token outside its vocabulary is drawn: a model may have more tokens.
    log_probabilities
                   True yields pairs (tokens, log-probabilities), both (B,): the natural logarithm of the model's
                   probability for the token, before penalty, temperature and filters; 0 for finished rows.
    prefill_chunk  prompt tokens that are read at once: memory grows with it, not with the prompt. Past the end of
                   learned positions, the last context_length tokens are read at once in any case.
    batch_invariant
                   True gives a prompt the same bits alone and in any batch, on one machine: each row is computed by
                   itself, so that a token of B rows takes the time of B tokens. False: the rows of a batch share each
                   step, and products of more rows may round otherwise. Not with compile.
    draft          guesses tokens ahead, which the model reads in one call; the text stays that of plain writing, as far
                   as a call of several tokens rounds alike. A smaller `GPT` with the same vocabulary, or "ngram": the
                   text goes on as it did the last time that its newest tokens stood in it, which pays for texts that
                   repeat themselves. For one prompt, and rotary positions (model/speculative.py).
    cache_dtype    torch.int8 keeps the keys and values as int8 with a scale for each token and head, in about half the
                   memory of 16 bits; None keeps them as they are. Not with a draft.
    compile        on a CPU: compile the step of one row whose layers all slide, which takes a C++ compiler and a minute
                   the first time (model/compiled_step.py). No effect on CUDA, where a step is a CUDA graph.

    The iterator shares nothing with other iterators or with torch's random state. A model in training mode is
    evaluated, and is in training mode again between any two tokens. Raises ValueError for wrong arguments.
    """
    device = model.wte.weight.device
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    tokens, padding = left_padded(encode_prompts(tokens, tokenizer), device)
    check_prompt(tokens, model.config.vocab_size)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative")
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        greedy=greedy,
    )
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} is below 1")
    if batch_invariant and compile:
        raise ValueError("batch_invariant=True with compile=True would compile a step for every row: leave one out")
    if cache_dtype not in (None, torch.int8):
        raise ValueError(f"cache_dtype is {cache_dtype}, expected None or torch.int8")
    if draft is not None:
        if cache_dtype is not None:
            raise ValueError("cache_dtype with draft: a cache of int8 takes no guesses, leave one out")
        check_draft(draft, model, len(tokens), batch_invariant or compile)
    decodable = None if tokenizer is None else tokenizer.vocab_size

    def stream(tokens, padding, seeds):
        finished = FinishedRows(stop_tokens, stop_strings, tokenizer, tokens, padding)
        generators = RowGenerators(seeds, device) if params.is_random else None
        seen = None if repetition_penalty == 1 else seen_tokens(tokens, padding, model.config.vocab_size)
        if draft is not None:
            made = guessed_ahead(
                model, draft, tokens, params, generators, seen, decodable, max_new_tokens, prefill_chunk
            )
            return _one_by_one(made, finished, log_probabilities)
        options = {"compile": compile, "cache_dtype": cache_dtype}
        decoder = Decoder(model, tokens, padding, max_new_tokens, prefill_chunk, **options)
        return _stream(decoder, params, generators, seen, finished, decodable, max_new_tokens, log_probabilities)

    seeds = row_seeds(seed, len(tokens))
    if not batch_invariant or len(tokens) == 0:
        return stream(tokens, padding, seeds)
    rows = zip(tokens.split(1), padding.tolist(), seeds, strict=True)
    streams = [stream(row[:, pad:], padding.new_zeros(1), [seed]) for row, pad, seed in rows]
    return _side_by_side(streams, device, log_probabilities)


def sample(
    model, tokens, steps, temperature=1.0, sample=False, top_k=None, top_p=None, seed=None, batch_invariant=False
):
    """The prompts tokens (B, T) with `steps` more tokens each, (B, T + steps), as minGPT's function of this name.

    sample=False takes the most likely token each time, sample=True draws one. The other arguments are `generate`'s.
    """
    new = generate(
        model, tokens, steps, temperature=temperature, greedy=not sample, top_k=top_k, top_p=top_p, seed=seed,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    return torch.cat([tokens, *(token[:, None].to(tokens) for token in new)], dim=1)


def _stream(decoder, params, generators, seen, finished, decodable, max_new_tokens, log_probabilities):
    new = None
    for _ in range(max_new_tokens):
        with decoder.threads():
            logits = decoder.prefill() if new is None else decoder.decode(new)
            new = params.choose(logits[:, :decodable], generators, seen if seen is None else seen[:, :decodable])
            if seen is not None:
                seen.scatter_(1, new[:, None], True)
            shown = finished.mask(new, FINISHED)
            if log_probabilities:
                chosen = F.log_softmax(logits.float(), dim=-1).gather(1, new[:, None]).squeeze(1)
                shown = shown, finished.mask(chosen, 0.0)
        yield shown
        if finished.update(new):
            return


def _one_by_one(made, finished, log_probabilities):
    """The tokens of `guessed_ahead`, as `_stream` yields them."""
    for tokens, logits in made:
        for i in range(len(tokens)):
            new = tokens[i : i + 1]
            if log_probabilities:
                yield new.clone(), F.log_softmax(logits[i].float(), dim=-1)[new]
            else:
                yield new.clone()
            if finished.update(new):
                return


def _side_by_side(streams, device, log_probabilities):
    """What the streams of single rows yield as one batch, until all have ended; a row that has ended is finished."""
    finished = torch.full((1,), FINISHED, device=device)
    if not log_probabilities:
        yield from map(torch.cat, zip_longest(*streams, fillvalue=finished))
        return
    for items in zip_longest(*streams, fillvalue=(finished, finished.new_zeros(1, dtype=torch.float32))):
        yield tuple(map(torch.cat, zip(*items, strict=True)))


class FinishedRows:
    """Which rows of a batch are finished, by a stop token or a stop string."""

    def __init__(self, stop_tokens, stop_strings, tokenizer, prompts, padding):
        device = prompts.device
        self.stop_tokens = torch.as_tensor(list(stop_tokens), dtype=torch.long, device=device)
        self.stop_strings = None
        if stop_strings:
            if tokenizer is None:
                raise ValueError(f"stop_strings={stop_strings!r} need the tokenizer of the text: tokenizer=...")
            rows = [row[pad:] for row, pad in zip(prompts.tolist(), padding.tolist(), strict=True)]
            self.stop_strings = StopStrings(stop_strings, tokenizer, rows)
        self.can_finish = len(self.stop_tokens) > 0 or self.stop_strings is not None
        self.finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)

    def mask(self, x, value):
        """A copy of x (B,) with `value` in finished rows."""
        return x.masked_fill(self.finished, value) if self.can_finish else x.clone()

    def update(self, new):
        """Count the new tokens (B,); True when every row is finished."""
        if not self.can_finish:
            return False
        if len(self.stop_tokens):
            self.finished = self.finished | torch.isin(new, self.stop_tokens)
        if self.stop_strings is not None:
            found = self.stop_strings.update(new.tolist())
            self.finished = self.finished | torch.tensor(found, device=new.device)
        return bool(self.finished.all())
