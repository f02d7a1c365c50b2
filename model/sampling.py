"""Generating text: `generate` yields tokens as they are made, `sample` returns them all.

    for token in generate(model, prompt, 500, temperature=0.8, top_k=10, seed=1):     # prompt (B, T), token (B,)
        print(tokenizer.decode(token.tolist()), end="", flush=True)

A model with rotary positions generates any number of tokens; with a window, a token costs the same at any position.
Learned positions end at context_length: after that every token reads the last context_length tokens again.
"""

from collections import deque
from collections.abc import Iterable
from itertools import zip_longest

import torch
import torch.nn.functional as F

from .decoding import Decoder
from .sampling_params import RowGenerators, SamplingParams
from .tokenizer import overlap

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
    compile        compile the steps with torch.compile; no effect on CUDA, where they are a CUDA graph.

    The iterator shares nothing with other iterators or with torch's random state. A model in training mode is
    evaluated, and is in training mode again between any two tokens. Raises ValueError for wrong arguments.
    """
    device = model.wte.weight.device
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    tokens, padding = _left_padded(_prompts(tokens, tokenizer), device)
    _check_prompt(tokens, model.config.vocab_size)
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
    decodable = None if tokenizer is None else tokenizer.vocab_size

    def stream(tokens, padding, seeds):
        finished = FinishedRows(stop_tokens, stop_strings, tokenizer, tokens, padding)
        generators = RowGenerators(seeds, device) if params.is_random else None
        seen = None if repetition_penalty == 1 else _seen_tokens(tokens, padding, model.config.vocab_size)
        decoder = Decoder(model, tokens, padding, max_new_tokens, prefill_chunk, compile)
        return _stream(decoder, params, generators, seen, finished, decodable, max_new_tokens, log_probabilities)

    seeds = _row_seeds(seed, len(tokens))
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


class StopStrings:
    """For each row of a batch, whether the text after its prompt contains one of the strings.

    A string may span several tokens, and may be part of one. prompts: the tokens of each row's prompt.
    """

    def __init__(self, strings, tokenizer, prompts):
        self.tokens = [deque() for _ in prompts]
        self.texts = [
            TextUntil(tokenizer.stream(iter(tokens.popleft, None), prompt), strings)
            for tokens, prompt in zip(self.tokens, prompts, strict=True)
        ]

    def update(self, new):
        """Add one token a row, a list; returns a bool a row, True if the token completes a string."""
        found = []
        for tokens, text, token in zip(self.tokens, self.texts, new, strict=True):
            running = not text.ended
            if running:
                tokens.append(token)
                next(text)
            found.append(running and text.ended)
        return found


class TextUntil:
    """An iterator over the pieces of a text, up to the first stop string, which is left out.

    held   text not yet returned, because it may begin a stop string. It comes with a later piece or at the end; a
           reader that stops early finds it here.
    """

    def __init__(self, pieces, strings):
        self.pieces, self.strings, self.held = iter(pieces), _checked_strings(strings), ""
        self.ended = False

    def __iter__(self):
        return self

    def __next__(self):
        if self.ended:
            raise StopIteration
        try:
            text = self.held + next(self.pieces)
        except StopIteration:
            self.ended = True
            text, self.held = self.held, ""
            if text:
                return text
            raise
        ends = [text.find(string) for string in self.strings if string in text]
        if ends:
            self.ended, self.held = True, ""
            return text[: min(ends)]
        shown = len(text) - max((overlap(text, string) for string in self.strings), default=0)
        self.held = text[shown:]
        return text[:shown]


def _checked_strings(strings):
    """The stop strings as a tuple. Raises ValueError for an empty one and for anything but text."""
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop_strings={list(strings)!r} has an empty string, or something that is not text")
    return strings


def _row_seeds(seed, rows):
    """A seed, or None, for each row."""
    if seed is None:
        return [None] * rows
    seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != rows:
        raise ValueError(f"seed has {len(seeds)} numbers, expected one for each of {rows} rows, or one number")
    for row_seed in seeds:
        if not 0 <= row_seed < 2**63:
            raise ValueError(f"seed={row_seed} is not a whole number from 0 to 2**63 - 1")
    return seeds


def _seen_tokens(tokens, padding, vocab_size):
    """(B, V) bool: the tokens in the prompt of each row, without its padding."""
    in_prompt = torch.arange(tokens.shape[1], device=tokens.device) >= padding[:, None]
    seen = torch.zeros(len(tokens), vocab_size, dtype=torch.int32, device=tokens.device)
    return seen.scatter_add_(1, tokens.long(), in_prompt.int()) > 0


def _prompts(tokens, tokenizer):
    """Any prompts of `generate` as (B, T) integers or a list of sequences: one becomes a list, texts are encoded."""
    if isinstance(tokens, torch.Tensor):
        return tokens[None] if tokens.dim() == 1 else tokens
    if not isinstance(tokens, Iterable):
        raise ValueError(f"tokens is {tokens!r}, expected a prompt, or a list of them: texts, or sequences of integers")
    prompts = [tokens] if isinstance(tokens, str) else list(tokens)
    if prompts and not isinstance(prompts[0], str) and torch.as_tensor(prompts[0]).dim() == 0:
        return [prompts]
    if tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            "tokens is a text, and the model has no tokenizer: give tokenizer=..., or load the model by from_pretrained"
        )
    return [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def _left_padded(tokens, device):
    """Prompts as one tensor (B, T), shorter ones padded on the left, and the padding columns of each row (B,)."""
    if isinstance(tokens, torch.Tensor):
        if tokens.dim() != 2:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, expected (B, T), or a list of B sequences")
        return tokens.to(device), torch.zeros(len(tokens), dtype=torch.int32, device=device)
    rows = [torch.as_tensor(row, device=device) for row in tokens]
    if not rows or any(row.dim() != 1 or len(row) == 0 for row in rows):
        raise ValueError("tokens is a list without prompts or with an empty one: every row needs at least one token")
    padding = [max(map(len, rows)) - len(row) for row in rows]
    padded = torch.stack([F.pad(row, (count, 0)) for row, count in zip(rows, padding, strict=True)])
    return padded, torch.tensor(padding, dtype=torch.int32, device=device)


def _check_prompt(tokens, vocab_size):
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens has dtype {tokens.dtype}, expected integers")
    if tokens.shape[1] == 0:
        raise ValueError("tokens has no columns: a prompt needs at least one token")
    if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"tokens reaches from {int(tokens.min())} to {int(tokens.max())}, outside the vocabulary of 0 to "
            f"{vocab_size - 1}"
        )
