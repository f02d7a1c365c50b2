"""Writing text with a model: `generate` yields tokens as they are made, `sample` returns them all.

    for token in generate(model, prompt, 500, temperature=0.8, top_k=10, seed=1):     # prompt (B, T), token (B,)
        print(tokenizer.decode(token.tolist()), end="", flush=True)

A model with rotary positions goes on for as long as one likes: with a window, a token costs the same at any position.
Learned positions end at context_length; past it the model reads the last context_length tokens anew for every token.
"""

import math

import torch
import torch.nn.functional as F

from .steps import NextLogits

NOTHING = -1  # what a finished row yields


def generate(
    model,
    tokens,
    max_new_tokens,
    *,
    temperature=1.0,
    top_k=None,
    top_p=None,
    greedy=False,
    seed=None,
    stop_tokens=(),
    prefill_chunk=128,
):
    """An iterator over the next tokens of each row: at most max_new_tokens tensors (B,) on the model's device.

    tokens         the prompts: (B, T) integers, or a list of B sequences that may differ in length; T is at least 1.
    temperature    divides the logits; 0 takes the likeliest token, as greedy=True does.
    top_k          draw from the k likeliest tokens only.
    top_p          draw from the fewest tokens that have this probability together, in (0, 1]; applied after top_k.
    seed           makes the same choice every time (for one device and batch); None is different every time.
    stop_tokens    a row that has drawn one of them is finished and yields -1 from then on; when all are, the iterator
                   ends.
    prefill_chunk  prompt tokens that are read at once: memory grows with it, not with the prompt.

    Nothing is shared with other iterators or with torch's random state, and a model in training mode is evaluated and
    found in training mode again between any two tokens. Raises ValueError for arguments that it cannot take.
    """
    device = model.wte.weight.device
    tokens, padding = _left_padded(tokens, device)
    _check_prompt(tokens, model.config.vocab_size)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature} is not a number of at least 0 (0 takes the likeliest token)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} is below 1: it is how many tokens are left to draw from, or None for all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is not in (0, 1]: it is the probability that is kept, 1 or None for all")
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} is below 1")
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)

    def choose(logits):  # (B, V) -> (B,)
        if greedy or temperature == 0:
            return logits.argmax(dim=-1)
        # the largest logit becomes 0 first: a tiny temperature must not divide two of them to infinity
        logits = (logits.float() - logits.max(dim=-1, keepdim=True).values) / temperature
        logits = logits if top_k is None else top_k_logits(logits, top_k)
        logits = logits if top_p is None else top_p_logits(logits, top_p)
        return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1, generator=generator).squeeze(1)

    stop_tokens = torch.as_tensor(list(stop_tokens), dtype=torch.long, device=device)
    steps = NextLogits(model, tokens, padding, max_new_tokens, prefill_chunk)
    return _stream(steps, choose, max_new_tokens, stop_tokens)


def sample(model, tokens, steps, temperature=1.0, sample=False, top_k=None, top_p=None, seed=None):
    """The prompts tokens (B, T) with `steps` more tokens each, (B, T + steps), as minGPT's function of this name.

    sample=False takes the likeliest token each time, sample=True draws one. The other arguments are `generate`'s.
    """
    new = generate(
        model, tokens, steps, temperature=temperature, greedy=not sample, top_k=top_k, top_p=top_p, seed=seed
    )
    return torch.cat([tokens, *(token[:, None].to(tokens) for token in new)], dim=1)


def top_k_logits(logits, k):
    """logits (..., V) with all but the k largest of each row set to -inf; those equal to the k-th stay."""
    if k < 1:
        raise ValueError(f"k={k} is below 1")
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def top_p_logits(logits, p):
    """logits (..., V) with all but the fewest tokens that hold probability p together set to -inf.

    Nucleus sampling, arXiv:1904.09751. The token that crosses p stays, so that at least one does.
    """
    if not 0 < p <= 1:
        raise ValueError(f"p={p} is not in (0, 1]")
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = F.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the likelier tokens hold
    ordered = ordered.masked_fill(before >= p, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _stream(steps, choose, max_new_tokens, stop_tokens):
    finished = torch.zeros(steps.rows, dtype=torch.bool, device=stop_tokens.device)
    new = None
    for _ in range(max_new_tokens):
        new = choose(steps.first() if new is None else steps.after(new))
        yield new.masked_fill(finished, NOTHING)
        if len(stop_tokens):
            finished = finished | torch.isin(new, stop_tokens)
            if finished.all():
                return


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
