"""Writing text with a model: `generate` yields tokens as they are made, `sample` returns them all.

    for token in generate(model, prompt, 500, temperature=0.8, top_k=10, seed=1):     # prompt (B, T), token (B,)
        print(tokenizer.decode(token.tolist()), end="", flush=True)

A model with rotary positions goes on for as long as one likes: with a window, a token costs the same at any position.
Learned positions end at context_length; past it the model reads the last context_length tokens anew for every token,
without a cache.
"""

import torch
import torch.nn.functional as F

from .choosing import Choice, Dice
from .steps import NextLogits
from .stopping import StopStrings

NOTHING = -1  # what a finished row yields


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
    compile=False,
):
    """An iterator over the next tokens of each row: at most max_new_tokens tensors (B,) on the model's device.

    tokens         the prompts: (B, T) integers, or a list of B sequences that may differ in length; T is at least 1.
    temperature, top_k, top_p, min_p, repetition_penalty, greedy
                   how a token is chosen: the fields of `Choice`.
    seed           row i is drawn with seed + i, or a sequence of B seeds: a row makes the same choices every time (on
                   one kind of device), whatever the other rows of its batch are. None is different every time.
    stop_tokens    a row that has drawn one of them is finished and yields -1 from then on; when all are, the iterator
                   ends.
    stop_strings   texts that finish a row likewise: at the token that completes one. They need the `tokenizer`, and
                   that the host looks at every token, for which a GPU has to wait.
    log_probabilities
                   True yields pairs (tokens, log-probabilities), both (B,): the natural logarithm of the probability
                   that the model itself gave the token, before penalty, temperature and cuts; 0 for finished rows.
    prefill_chunk  prompt tokens that are read at once: memory grows with it, not with the prompt. Where learned
                   positions have ended, the last context_length tokens are read at once, whatever it is.
    compile        run the steps under torch.compile; on CUDA, where they are a CUDA graph, it changes nothing.

    Nothing is shared with other iterators or with torch's random state, and a model in training mode is evaluated and
    found in training mode again between any two tokens. Raises ValueError for arguments that it cannot take.
    """
    device = model.wte.weight.device
    tokens, padding = _left_padded(tokens, device)
    _check_prompt(tokens, model.config.vocab_size)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative")
    choice = Choice(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        greedy=greedy,
    )
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} is below 1")
    stops = _Stops(stop_tokens, stop_strings, tokenizer, tokens, padding)
    dice = Dice(_seeds(seed, len(tokens)), device) if choice.draws else None
    seen = None if repetition_penalty == 1 else _seen(tokens, padding, model.config.vocab_size)
    steps = NextLogits(model, tokens, padding, max_new_tokens, prefill_chunk, compile)
    return _stream(steps, choice, dice, seen, stops, max_new_tokens, log_probabilities)


def sample(model, tokens, steps, temperature=1.0, sample=False, top_k=None, top_p=None, seed=None):
    """The prompts tokens (B, T) with `steps` more tokens each, (B, T + steps), as minGPT's function of this name.

    sample=False takes the likeliest token each time, sample=True draws one. The other arguments are `generate`'s.
    """
    new = generate(
        model, tokens, steps, temperature=temperature, greedy=not sample, top_k=top_k, top_p=top_p, seed=seed
    )
    return torch.cat([tokens, *(token[:, None].to(tokens) for token in new)], dim=1)


def _stream(steps, choice, dice, seen, stops, max_new_tokens, log_probabilities):
    new = None
    for _ in range(max_new_tokens):
        logits = steps.first() if new is None else steps.after(new)
        new = choice(logits, dice, seen)
        if seen is not None:
            seen.scatter_(1, new[:, None], True)
        shown = stops.hide(new, NOTHING)
        if log_probabilities:
            found = F.log_softmax(logits.float(), dim=-1).gather(1, new[:, None]).squeeze(1)
            yield shown, stops.hide(found, 0.0)
        else:
            yield shown
        if stops.all_after(new):
            return


class _Stops:
    """Which rows of a batch are finished, by a stop token or a stop string."""

    def __init__(self, tokens, strings, tokenizer, prompts, padding):
        device = prompts.device
        self.tokens = torch.as_tensor(list(tokens), dtype=torch.long, device=device)
        self.strings = None
        if strings:
            if tokenizer is None:
                raise ValueError(f"stop_strings={strings!r} need the tokenizer that writes the text: tokenizer=...")
            rows = [row[pad:] for row, pad in zip(prompts.tolist(), padding.tolist(), strict=True)]
            self.strings = StopStrings(strings, tokenizer, rows)
        self.some = len(self.tokens) > 0 or self.strings is not None
        self.finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)

    def hide(self, x, instead):
        """x (B,) with `instead` for the rows that are finished; always a tensor of its own."""
        return x.masked_fill(self.finished, instead) if self.some else x.clone()

    def all_after(self, new):
        """Take note of the newest tokens (B,); whether every row is finished."""
        if not self.some:
            return False
        if len(self.tokens):
            self.finished = self.finished | torch.isin(new, self.tokens)
        if self.strings is not None:
            ended = self.strings.ended(new.tolist())
            self.finished = self.finished | torch.tensor(ended, device=new.device)
        return bool(self.finished.all())


def _seeds(seed, rows):
    """A seed for each row, None where there is none."""
    if seed is None:
        return [None] * rows
    if isinstance(seed, int):
        return [seed + row for row in range(rows)]
    seeds = [int(s) for s in seed]
    if len(seeds) != rows:
        raise ValueError(f"seed has {len(seeds)} numbers, expected one for each of {rows} rows, or one number")
    return seeds


def _seen(tokens, padding, vocab_size):
    """(B, V) bool: which tokens the prompt of each row has, its padding left out."""
    own = torch.arange(tokens.shape[1], device=tokens.device) >= padding[:, None]
    seen = torch.zeros(len(tokens), vocab_size, dtype=torch.int32, device=tokens.device)
    return seen.scatter_add_(1, tokens.long(), own.int()) > 0


def _left_padded(tokens, device):
    """Prompts as one (B, T) tensor, shorter ones moved to its right end, and how many columns of padding each has."""
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
