"""What a model writes by itself: at every evaluation, and when training is done."""

from collections.abc import Iterator

import torch

from model import CharTokenizer, generate

TEMPERATURE, TOP_K = 0.8, 40


def passage(model, tokenizer, length: int, seed: int) -> Iterator[str]:
    """The text of `length` tokens, piece by piece, that follow a line break (the first token, where there is none).

    The same weights and seed write the same; torch's random state is left alone.
    """
    characters = isinstance(tokenizer, CharTokenizer)
    prompt = [0] if characters and "\n" not in tokenizer.stoi else tokenizer.encode("\n") or [0]
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    written = generate(model, tokens, length, temperature=TEMPERATURE, top_k=TOP_K, seed=seed)
    return tokenizer.stream((int(token) for token in written), prompt)
