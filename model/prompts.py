"""Prompts as users give them, and as a model reads them: encoded, checked, padded, each with its seed."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F


def encode_prompts(tokens, tokenizer):
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


def left_padded(tokens, device):
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


def check_prompt(tokens, vocab_size):
    """Raise ValueError unless tokens (B, T) are integers of the vocabulary, and T is at least 1."""
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens has dtype {tokens.dtype}, expected integers")
    if tokens.shape[1] == 0:
        raise ValueError("tokens has no columns: a prompt needs at least one token")
    if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"tokens reaches from {int(tokens.min())} to {int(tokens.max())}, outside the vocabulary of 0 to "
            f"{vocab_size - 1}"
        )


def row_seeds(seed, rows):
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


def seen_tokens(tokens, padding, vocab_size):
    """(B, V) bool: the tokens in the prompt of each row, without its padding."""
    in_prompt = torch.arange(tokens.shape[1], device=tokens.device) >= padding[:, None]
    seen = torch.zeros(len(tokens), vocab_size, dtype=torch.int32, device=tokens.device)
    return seen.scatter_add_(1, tokens.long(), in_prompt.int()) > 0
