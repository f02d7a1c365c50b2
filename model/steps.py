"""The logits of the next token, step by step: the prompt is read into a cache in parts, then a token a step.

A step is `GraphStep` on a CUDA device and `TokenStep` on a CPU, each where it does what the model does; else it is the
model itself. Past the end of learned positions every token moves all others, so that a cache would be of no use: there
the last context is read as in training, without one.
"""

from contextlib import contextmanager

import torch

from . import graph_step, token_step
from .graph_step import GraphStep
from .kv_cache import KVCache
from .token_step import TokenStep, what_else


class NextLogits:
    """The logits (B, V) of the next token, step by step, through a cache.

    compile: run steps under torch.compile, where they are not a CUDA graph.
    """

    def __init__(self, model, tokens, padding, max_new_tokens, prefill_chunk, compile=False):
        self.model, self.padding, self.prefill_chunk, self.compile = model, padding, prefill_chunk, compile
        self.rows, self.columns = tokens.shape
        self.cache = self.step = None
        self.plain = what_else(model) is None
        self.longest_padding = int(padding.max()) if self.rows else 0
        self.most_columns = self.columns + max_new_tokens
        # the prompt; with learned positions always the tokens of one context, which have to be read anew past its end
        self.tokens = tokens
        self.context = model.config.context_length if model.config.positions == "learned" else None

    def first(self):
        return self._read()

    def after(self, new):
        """The logits after one more token of each row, new (B,)."""
        self.columns += 1
        if self.context is not None:
            self.tokens = torch.cat([self.tokens, new[:, None]], dim=1)
            if self.columns > self.context:
                return self._read()
        if self.cache.bounded and self.cache.columns == self.cache.max_length:
            self.cache.extend(min(self.most_columns, 2 * self.cache.max_length))
            self.step = None
        if self.step is None:
            self.step = self._make_step()
        with _evaluating(self.model):
            return self.step(new)

    def _make_step(self):
        if graph_step.why_not(self.model, self.cache) is None:
            return GraphStep(self.model, self.cache)
        if token_step.why_not(self.model, self.cache) is None:
            return TokenStep(self.model, self.cache, self.compile)
        model = torch.compile(self.model) if self.compile else self.model

        @torch.no_grad()
        def step(new):
            return model(new[:, None], cache=self.cache)[0][:, -1]

        return step

    @torch.no_grad()
    def _read(self):
        """The logits after self.tokens (with learned positions the last context of them), read into a new cache."""
        dropped = 0 if self.context is None else max(0, self.columns - self.context)
        self.tokens = self.tokens[:, -self.context :] if self.context else self.tokens
        if self.context is not None and self.columns >= self.context and self.longest_padding <= dropped:
            self.cache = None  # no step will read it
            with _evaluating(self.model):
                return self.model.last_logits(self.tokens) if self.plain else self.model(self.tokens)[0][:, -1]
        device = self.tokens.device
        autocast = torch.is_autocast_enabled(device.type)
        self.cache = KVCache(
            self.model.config,
            self.rows,
            max_new_tokens_per_call=min(self.tokens.shape[1], self.prefill_chunk),
            max_length=self.context or min(self.most_columns, self.columns + 64),  # grows as the text does
            device=device,
            dtype=torch.get_autocast_dtype(device.type) if autocast else self.model.wte.weight.dtype,
            padding=(self.padding - dropped).clamp(min=0),
        )
        with _evaluating(self.model):
            for chunk in self.tokens.split(self.prefill_chunk, dim=1):
                logits = self.model(chunk, cache=self.cache)[0][:, -1]
        self.cache.fit_single_tokens()
        self.step = None
        self.tokens = self.tokens if self.context else None
        return logits


@contextmanager
def _evaluating(model):
    """Evaluation mode inside, and every module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
